"""Tokens between two blocks: their state, their grid, and the paths along which they are scanned."""

from mtr_lab.tokens.grid import RESTORATIONS, check_restoration, convolve, fit_grid, restore
from mtr_lab.tokens.layout import Layout
from mtr_lab.tokens.paths import PATHS, ScanPath
from mtr_lab.tokens.state import Evidence, TokenState

__all__ = [
    "PATHS",
    "RESTORATIONS",
    "Evidence",
    "Layout",
    "ScanPath",
    "TokenState",
    "check_restoration",
    "convolve",
    "fit_grid",
    "restore",
]
