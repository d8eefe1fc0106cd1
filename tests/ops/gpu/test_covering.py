"""The combinations of options that the tests of the kernels run."""

from itertools import combinations, product

import pytest
from covering import covering_array


@pytest.mark.parametrize(("sizes", "most"), [((4, 3), 12), ((4, 4, 3, 2, 2, 2, 2), 19), ((2,) * 8, 8), ((3, 1, 2), 6)])
def test_any_two_values_meet(sizes, most):
    options = [[f"{option}{value}" for value in range(size)] for option, size in enumerate(sizes)]
    rows = covering_array(*options, strength=2)
    met = {pair for row in rows for pair in combinations(row, 2)}
    assert met == {pair for one, other in combinations(options, 2) for pair in product(one, other)}
    assert len(rows) <= most
    assert rows == covering_array(*options, strength=2)


def test_any_three_values_meet():
    options = [[0, 1], ["a", "b", "c"], [None, []], [2.0, 3.0]]  # some unhashable
    rows = covering_array(*options, strength=3)
    assert all(any(x in row and y in row and z in row for row in rows) for x, y, z in product(*options[:3]))
    assert len(rows) < 24
    assert sorted(covering_array(*options, strength=4), key=str) == sorted(product(*options), key=str)
