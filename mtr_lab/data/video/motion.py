"""Generated clips: one of two shapes moves, and its motion is the class. No single frame tells anything about it.

Place and size of all shapes have the same distribution in every frame of every class: places are uniform on a picture
whose opposite sides meet, sizes log-uniform.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtr_lab.data.video.decoding import Choose
from mtr_lab.errors import UserError, check_number

SIDE, FRAMES = 48, 16  # pixels, frames
CLASSES = ("bob", "clockwise", "counterclockwise", "down", "grow", "left", "right", "shrink", "swing", "up")
SPLITS = {"train": 0, "val": 1}
_SHAPES = 2
_SMALLEST, _LARGEST = 2.5, 5.5  # half of a shape's width, pixels
_BACKGROUND = 12  # grey levels
_NOISE = 0.002  # share of the pixels of every frame
_COLOURS = [(228, 26, 28), (55, 126, 184), (77, 175, 74), (255, 217, 47), (152, 78, 163), (255, 127, 0)]


class MotionSource:
    """``count`` clips of a split, equally many of each class up to one; a clip is a function of split and number.

    Raises:
        UserError: an unknown split, or no clip.
    """

    classes: Sequence[str] | None = CLASSES

    def __init__(self, split: str, count: int) -> None:
        if split not in SPLITS:
            raise UserError(f"generated clips have the splits {' and '.join(SPLITS)}, not {split!r}.")
        check_number("dataset.count", count, int, 1)
        self.location = f"generated clips, {split}"
        self.num_images: int | None = count
        self._split, self._count = split, count

    def __len__(self) -> int:
        return self._count

    def id(self, index: int) -> str:
        """The class and the number."""
        return f"{CLASSES[self.label(index)]}/{index:05}"

    def label(self, index: int) -> int:
        """The number of the class."""
        return index % len(CLASSES)

    def fingerprint(self) -> str:
        """Names the clips; what they look like follows from the code."""
        return f"motion {self._split} {self._count}"

    def read(self, index: int, choose: Choose) -> tuple[Tensor, str]:
        """The chosen frames of a clip, (n, 3, H, W) uint8, and no hash: a clip is its name."""
        frames = make_clip(CLASSES[self.label(index)], SPLITS[self._split], index)
        pixels = palette()[frames[list(choose(len(frames)))]]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), ""


def palette() -> np.ndarray:
    """The colours of the clips, (colours, 3) uint8: greys of the background, then those of shapes."""
    grey = np.linspace(50, 90, _BACKGROUND)
    background = np.stack([0.8 * grey, 0.9 * grey, grey], 1)
    return np.concatenate([background, _COLOURS]).astype(np.uint8)


def make_clip(name: str, *seed: int) -> np.ndarray:
    """A clip of a class, (FRAMES, SIDE, SIDE) uint8 indices of ``palette``; a function of class and seed."""
    rng = np.random.default_rng([CLASSES.index(name), *seed])
    frames = np.repeat(_background(rng)[None], FRAMES, 0)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    kinds, colours = rng.integers(3, size=_SHAPES), rng.permutation(len(_COLOURS))
    moving = rng.integers(_SHAPES)
    for shape in range(_SHAPES):
        y, x, radius = _course(name if shape == moving else None, rng)
        down = (rows - y[:, None, None] + SIDE / 2) % SIDE - SIDE / 2  # opposite sides of the picture meet
        across = (columns - x[:, None, None] + SIDE / 2) % SIDE - SIDE / 2
        covered = (_disc, _square, _diamond)[kinds[shape]](down, across) <= radius[:, None, None]
        frames[covered] = _BACKGROUND + colours[shape]
    noisy = rng.uniform(size=frames.shape) < _NOISE
    frames[noisy] = rng.integers(_BACKGROUND, size=noisy.sum())
    return frames


def save_clip(frames: np.ndarray, path: str) -> None:
    """Write a clip as an animated GIF, which keeps every pixel."""
    images = []
    for frame in frames:
        image = Image.fromarray(frame, "P")
        image.putpalette(palette().tobytes())
        images.append(image)
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0, optimize=False)


def _course(motion: str | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and half width of a shape in every frame; ``None`` stands still."""
    time = np.arange(FRAMES)
    y, x = (np.full(FRAMES, place) for place in rng.uniform(0, SIDE, 2))
    size, phase = rng.uniform(), rng.uniform(0, 2 * math.pi)
    sizes = np.full(FRAMES, size)
    way = rng.uniform(0.8, 1.5) * time  # pixels
    angle = phase + rng.uniform(0.35, 0.5) * time
    if motion in ("right", "left"):
        x = x + (way if motion == "right" else -way)
    elif motion in ("down", "up"):
        y = y + (way if motion == "down" else -way)
    elif motion in ("clockwise", "counterclockwise"):
        turn = angle if motion == "clockwise" else -angle
        y, x = y + 3.5 * np.sin(turn), x + 3.5 * np.cos(turn)
    elif motion == "swing":
        x = x + 4 * np.sin(angle)
    elif motion == "bob":
        y = y + 4 * np.sin(angle)
    elif motion in ("grow", "shrink"):
        sizes = (size + (1 if motion == "grow" else -1) * rng.uniform(0.08, 0.12) * time) % 1
    return y, x, _SMALLEST * (_LARGEST / _SMALLEST) ** sizes


def _background(rng: np.random.Generator) -> np.ndarray:
    """A smooth pattern of greys, (SIDE, SIDE) uint8."""
    coarse = rng.uniform(size=(9, 9)).astype(np.float32)
    fine = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (fine.clip(0, 0.999) * _BACKGROUND).astype(np.uint8)


def _disc(down: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.hypot(down, across)


def _square(down: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.maximum(abs(down), abs(across)) * 1.13  # the area of the disc


def _diamond(down: np.ndarray, across: np.ndarray) -> np.ndarray:
    return (abs(down) + abs(across)) * 0.8
