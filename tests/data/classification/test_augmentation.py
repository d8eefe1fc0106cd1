"""Crops, flips and colours on the device, against torchvision's of the same parameters, image by image."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from mtr_lab.data.classification.augmentation import Augmentation, crop_boxes, jitter_colours, resample, rescaled


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (4, 3, 23, 31), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (17, 40)])
def test_crops_are_resized_as_torchvision_does(pixels: Tensor, interpolation: str, size: tuple[int, int]) -> None:
    boxes = [[0, 0, 23, 31], [5, 7, 11, 3], [22, 30, 1, 1], [2, 0, 20, 13]]
    mirrored = [[False, False], [True, False], [False, True], [True, True]]
    found = resample(pixels, torch.tensor(boxes).float(), size, torch.tensor(mirrored), interpolation)
    for image, box, (upside_down, mirror), one in zip(pixels, boxes, mirrored, found, strict=True):
        expected = F.resized_crop(image / 255, *box, size, InterpolationMode(interpolation), antialias=True)
        expected = F.vflip(expected) if upside_down else expected
        expected = F.hflip(expected) if mirror else expected
        torch.testing.assert_close(one, expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_colours_are_changed_as_torchvision_does(pixels: Tensor) -> None:
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    factors = torch.tensor([[0.6, 1.4, 1.2], [1.3, 0.7, 0.5], [1.0, 1.0, 1.0], [1.4, 1.4, 0.0]])
    order = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]])
    found = jitter_colours(pixels / 255, factors, order)
    for image, by, kinds, one in zip(pixels, factors, order, found, strict=True):
        expected = image / 255
        for kind in kinds:
            expected = changes[kind](expected, by[kind].item())
        torch.testing.assert_close(one, expected, atol=2e-4, rtol=0)  # torchvision's grey weighs red by 0.2989, too


def test_boxes_are_those_of_a_loop_over_trials() -> None:
    generator = torch.Generator().manual_seed(1)
    sides = torch.tensor([[40.0, 40.0], [10.0, 90.0], [300.0, 7.0], [64.0, 48.0]]).repeat(50, 1)
    trials, place = torch.rand(200, 20, generator=generator), torch.rand(200, 2, generator=generator)
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    found = crop_boxes(sides, trials, place, scale, ratio)
    kinds = set()
    for i, (height, width) in enumerate(sides.tolist()):
        for trial in range(10):
            area = height * width * (0.3 + 0.7 * trials[i, trial].item())
            shape = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * trials[i, 10 + trial].item())
            h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
            if h <= height and w <= width:
                expected = [int(place[i, 0] * (height - h + 1)), int(place[i, 1] * (width - w + 1)), h, w]
                break
        else:
            h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
            expected = [(height - h) // 2, (width - w) // 2, h, w]
        kinds.add(trial if found[i, 2] < height else "whole side")
        assert found[i].tolist() == expected
    assert len(kinds) > 3


def test_a_box_of_a_resized_image_covers_the_same_part_of_it() -> None:
    boxes, sides = torch.tensor([[10.0, 20.0, 30.0, 40.0], [99.0, 199.0, 1.0, 1.0]]), torch.tensor([[100.0, 200.0]])
    found = rescaled(boxes, sides.expand(2, 2), torch.empty(2, 3, 50, 50))
    assert found.tolist() == [[5.0, 5.0, 15.0, 10.0], [49.0, 49.0, 1.0, 1.0]]


def test_an_image_does_not_depend_on_its_batch(pixels: Tensor) -> None:
    augment = Augmentation((9, 12))
    random = torch.rand(4, augment.numbers, generator=torch.Generator().manual_seed(2))
    sides = torch.tensor([[23.0, 31.0]]).expand(4, 2)
    whole = augment(pixels, sides, random)
    assert whole.shape == (4, 3, 9, 12)
    torch.testing.assert_close(augment(pixels[2:3], sides[2:3], random[2:3]), whole[2:3])
    assert not torch.allclose(whole[:2], augment(pixels, sides, random.flip(0))[:2], atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_images_without_being_waited_for(pixels: Tensor) -> None:
    augment = Augmentation((9, 12))
    sides, random = torch.tensor([[23.0, 31.0]]).expand(4, 2), torch.rand(4, augment.numbers)
    inputs = [tensor.cuda() for tensor in (pixels, sides, random)]
    augment(*inputs)  # libraries set themselves up
    try:
        torch.cuda.set_sync_debug_mode("error")
        images = augment(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(images.cpu(), augment(pixels, sides, random), atol=1e-4, rtol=0)
