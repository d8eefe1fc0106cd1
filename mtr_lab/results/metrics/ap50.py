"""Average precision at an overlap of 0.5, of masks if there are any."""

from mtr_lab.results.metrics.map import average_precision

METRIC = average_precision(
    1, key="ap50", order=50, name="AP50", heading="AP50", axis="AP50, %", latex="AP$_{50}$ (\\%)"
)
