"""The policies that others are compared with."""

BASELINES = ("mtr", "write", "resolution", "random")
"""In tables of a sweep the first of them that the sweep has; in reports of many results all of them."""
