"""RandAugment on the device, against timm's transforms of Pillow images, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch import Tensor

from mtr_lab.data.classification.rand_augment import TRANSFORMS, RandAugment, transformed
from mtr_lab.errors import UserError

MEAN = (0.485, 0.456, 0.406)
WARPS = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


@pytest.fixture
def pixels() -> Tensor:
    """Smooth images with some noise and all values, (4, 3, 24, 36) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 4, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (24, 36), mode="bicubic").clamp(0, 1)
    return (255 * smooth + 6 * torch.rand(4, 3, 24, 36, generator=generator)).clamp(0, 255).byte()


def by_timm(pixels: Tensor, name: str, level: float, signed: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """(3, H, W) uint8 -> the same, by timm with its coin tossed to this sign."""
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: value if signed > 0 else -value)
    hparams = {"img_mean": tuple(round(255 * x) for x in MEAN), "interpolation": Image.Resampling.BILINEAR}
    operation = timm_augment.AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=hparams)
    image = operation(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("signed", [0.35, -0.9])
def test_each_transform_is_that_of_timm(
    pixels: Tensor, name: str, signed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, level = torch.full((4,), list(TRANSFORMS).index(name)), torch.full((4,), abs(signed))
    found = 255 * transformed(pixels / 255, place, level, torch.full((4,), signed), MEAN)
    expected = torch.stack([by_timm(image, name, abs(signed), signed, monkeypatch) for image in pixels])
    difference = (found - expected).abs()
    # Pillow rounds to bytes, and cuts off where a pixel's centre lies outside; bilinear weights reach further.
    assert difference.mean() < (3 if name in WARPS else 0.7)
    assert difference.quantile(0.9) < (3 if name in WARPS else 2.01)
    assert (pixels - expected.float()).abs().mean() > 1 or name in ("AutoContrast", "SharpnessIncreasing")


def test_an_image_of_one_colour_survives() -> None:
    flat = torch.full((len(TRANSFORMS), 3, 8, 8), 0.2)
    found = transformed(flat, torch.arange(len(TRANSFORMS)), torch.ones(len(flat)), -torch.ones(len(flat)), MEAN)
    assert found.isfinite().all()
    for name in ("AutoContrast", "Equalize", "SharpnessIncreasing", "ContrastIncreasing", "ColorIncreasing"):
        torch.testing.assert_close(found[list(TRANSFORMS).index(name)], flat[0], atol=1e-3, rtol=0)


def test_draws_are_those_of_the_notation(pixels: Tensor) -> None:
    augment = RandAugment.from_text("rand-m9-mstd0.5-inc1", MEAN)
    assert augment == RandAugment(9, 0.5, 2, 0.5, MEAN)
    random = torch.rand(4, augment.numbers, generator=torch.Generator().manual_seed(3))
    assert RandAugment(9, probability=0.0)(pixels / 255, random).equal(pixels / 255)
    whole = augment(pixels / 255, random)
    torch.testing.assert_close(augment(pixels[1:2] / 255, random[1:2]), whole[1:2])

    random[:, [0, 4]], random[:, [1, 5]] = 0.61, torch.tensor([0.4, 0.6])  # the tenth of fifteen, made once
    torch.testing.assert_close(augment(pixels / 255, random), 1 - pixels / 255)


def test_draws_and_strengths_have_their_shares() -> None:
    augment, draws = RandAugment(5, 1.0, layers=1), 3000
    images = torch.full((draws, 3, 3, 3), 0.25)
    random = torch.rand(draws, augment.numbers, generator=torch.Generator().manual_seed(4))
    random[:, 0] = 0.37  # brightness, the sixth of fifteen
    factors = augment(images, random)[:, 0, 0, 0] / 0.25
    assert (factors == 1).float().mean() == pytest.approx(0.5, abs=0.03)
    changes = (factors - 1)[factors != 1]
    assert (changes > 0).float().mean() == pytest.approx(0.5, abs=0.04)
    assert changes.abs().mean() == pytest.approx(0.45, abs=0.01)
    assert changes.abs().std() == pytest.approx(0.09, abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_images_without_being_waited_for(pixels: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    images = pixels.repeat(64, 1, 1, 1) / 255
    augment = RandAugment.from_text("rand-m9-mstd0.5-inc1", MEAN)
    random = torch.rand(len(images), augment.numbers, generator=generator)
    inputs = images.cuda(), random.cuda()
    augment(*inputs)  # libraries set themselves up
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = augment(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (found.cpu() - augment(images, random)).abs().flatten(1)
    # A value at the border between two bytes is rounded to either; equalisation and posterisation enlarge that.
    assert difference.median() < 1e-6
    assert (difference.mean(1) < 1e-4).float().mean() > 0.95
    assert difference.mean() < 1e-3


@pytest.mark.parametrize("text", ["rand-m9", "rand-m9-inc0", "augmix-m3", "rand-m9-inc1-x", "rand-m-inc1", "v0", True])
def test_other_notations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"auto_augment=.*such as rand-m9-mstd0\.5-inc1"):
        RandAugment.from_text(text, MEAN)
