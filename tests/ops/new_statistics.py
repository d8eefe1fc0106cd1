"""Statistics that the library does not have; in a file, since Triton compiles only functions that are in files."""

from mtr_lab.ops.statistics import Statistic


def absolute(delta, u, y, maximum):
    return maximum(y, -y)


def taken(delta, u, y, maximum):
    return delta * maximum(u, -u)


NEW = {"absolute": Statistic(absolute, reads_output=True), "taken": Statistic(taken)}
