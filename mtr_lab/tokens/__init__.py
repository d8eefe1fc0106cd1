"""Tokens between two blocks: their state, the grid and the paths they lie on."""

from mtr_lab.tokens.grid import RESTORATIONS, check_restoration, convolve, restore
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
    "restore",
]
