"""Small images on disk, and a data module for them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtr_lab.data import ImageDataModule


@pytest.fixture
def data_config() -> dict[str, Any]:
    """Preprocessing to 16 × 16 pixels."""
    return {
        "input_size": (3, 16, 16),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.9,
    }


def _jpeg(seed: int) -> bytes:
    """A 24×20 JPEG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Path]:
    """``folders("val", a=3, b=2)``: class folders ``a`` and ``b`` of 3 and 2 images in ``tmp_path/val``."""

    def write(split: str = "", **images: int) -> Path:
        for name, count in images.items():
            directory = tmp_path / split / name
            directory.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                (directory / f"{index}.jpg").write_bytes(_jpeg(sum(map(ord, split + name)) * 1000 + index))
        return tmp_path

    return write


@pytest.fixture
def module(data_config: dict[str, Any]) -> Callable[..., ImageDataModule]:
    """Builds an ``ImageDataModule`` with 16-pixel preprocessing and, by default, batches of four."""

    def build(**options: Any) -> ImageDataModule:
        return ImageDataModule(**{"name": "test", "data_config": data_config, "batch_size": 4, **options})

    return build
