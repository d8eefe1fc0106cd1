"""The colour and the marker of each policy, in every chart: dashboard, figures, plots of the README."""

import hashlib
from typing import NamedTuple


class Look(NamedTuple):
    """How a policy is drawn."""

    colour: str
    on_dark: str
    """The colour on a dark background."""
    marker: str
    """Plotly's name of it; ``MATPLOTLIB_MARKERS`` has Matplotlib's."""


# Petroff, "Accessible color sequences for data visualization", arXiv 2107.02270; three are darker, to be read as text.
_BLUE, _RED, _ORANGE, _PURPLE, _GREEN = "#2f7fc8", "#bd1f01", "#c97f00", "#832db6", "#1b8a6b"
_BROWN, _TANGERINE, _OLIVE, _GREY, _CYAN = "#a96b59", "#e76300", "#8a7f45", "#717581", "#2f97a6"
_ON_DARK = {_BLUE: "#5aa5ea", _RED: "#ff6b4f", _PURPLE: "#c084f0", _GREEN: "#3fb892", _OLIVE: "#b3a763"}

MATPLOTLIB_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "pentagon": "p",
    "cross": "P",
    "x": "X",
    "star": "*",
    "hexagon": "h",
}


def _look(colour: str, marker: str) -> Look:
    return Look(colour, _ON_DARK.get(colour, colour), marker)


_LOOKS = {
    "mtr": _look(_BLUE, "circle"),
    "write": _look(_RED, "square"),
    "fovea": _look(_PURPLE, "diamond"),
    "resolution": _look(_GREEN, "triangle-up"),
    "random": _look(_GREY, "x"),
    "hsa": _look(_ORANGE, "triangle-down"),
    "utr": _look(_BROWN, "pentagon"),
    "rmeeto": _look(_CYAN, "cross"),
    "tome": _look(_OLIVE, "star"),
    "famba": _look(_OLIVE, "triangle-up"),
    "pumer": _look(_OLIVE, "diamond"),
    "evit": _look(_TANGERINE, "hexagon"),
    "storm": _look(_CYAN, "square"),
    "storm_evit": _look(_TANGERINE, "square"),
    "storm_random": _look(_GREY, "square"),
    "directions": _look(_PURPLE, "pentagon"),
    "mlp": _look(_RED, "star"),
    "quartermap": _look(_GREEN, "cross"),
    "adjacent": _look(_BROWN, "circle"),
}
_UNREDUCED = Look("#1d2126", "#e6e9ec", "circle")


def look(policy: str) -> Look:
    """The look of a policy: of one that comes with mtr_lab its own, of others one that follows from the name."""
    if policy == "none":
        return _UNREDUCED
    if policy in _LOOKS:
        return _LOOKS[policy]
    digest = int.from_bytes(hashlib.blake2s(policy.encode(), digest_size=4).digest())
    taken = {(known.colour, known.marker) for known in _LOOKS.values()}
    colours = dict.fromkeys(known.colour for known in _LOOKS.values())
    free = [(colour, marker) for colour in colours for marker in MATPLOTLIB_MARKERS if (colour, marker) not in taken]
    return _look(*free[digest % len(free)])
