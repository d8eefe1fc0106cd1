"""Colours of classes that readers with and without red-green blindness tell apart."""

from functools import cache

import numpy as np

_STEPS = 8  # of each channel among which colours are chosen
_LIGHTNESS = (25, 92)  # least and largest, of 100: text and white paper stay visible
# From linear RGB to what a reader sees. Machado, Oliveira, Fernandes, "A physiologically-based model for simulation of
# color vision deficiency", 2009: table 1, severity 1.0.
_VISIONS = (
    np.eye(3),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
)
LOST, WON, OTHER = (213, 94, 0), (0, 114, 178), (240, 228, 66)
"""What a reduction makes wrong, makes right and changes otherwise. Okabe and Ito: apart for all readers."""
_FIRST = (73, 109, 255)
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@cache
def _ordered() -> np.ndarray:
    """All colours (n, 3) uint8: each is as far as possible from those before it, for the reader who sees least."""
    levels = np.linspace(0, 255, _STEPS).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    seen = np.stack([cielab(_linear(colours) @ vision.T) for vision in _VISIONS])  # (readers, n, 3)
    lightness = seen[0, :, 0]
    usable = np.flatnonzero((lightness >= _LIGHTNESS[0]) & (lightness <= _LIGHTNESS[1]))
    colours, seen = colours[usable], seen[:, usable]
    chosen = [int(np.argmin(np.linalg.norm(colours - _FIRST, axis=1)))]
    nearest = np.full(len(colours), np.inf)
    for _ in range(len(colours) - 1):
        last = seen[:, chosen[-1]][:, None]
        nearest = np.minimum(nearest, np.linalg.norm(seen - last, axis=-1).min(0))
        chosen.append(int(nearest.argmax()))
    return colours[chosen].astype(np.uint8)


def class_colours(count: int) -> np.ndarray:
    """One colour per class, (count, 3) uint8; the first colours are the same for any count, up to about 400."""
    colours = _ordered()
    return colours[np.arange(count) % len(colours)]


def cielab(linear: np.ndarray) -> np.ndarray:
    """Linear RGB (*, 3) from 0 to 1 -> CIELAB (*, 3), white of daylight; Euclidean distances are ΔE."""
    xyz = linear.clip(0, 1) @ _TO_XYZ.T / _TO_XYZ.sum(1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def _linear(colours: np.ndarray) -> np.ndarray:
    """sRGB from 0 to 255 -> linear RGB from 0 to 1."""
    values = colours / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
