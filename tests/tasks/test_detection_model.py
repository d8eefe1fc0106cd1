"""The two-stage detector: its pyramid, its input from a reduced backbone, its training, its precision."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mtr_lab
from mtr_lab.backbones import Backbone
from mtr_lab.errors import UserError
from mtr_lab.tasks.detection.model import STRIDES, DetectionHead, Detector, SimpleFeaturePyramid, to_original

SMALL: dict[str, Any] = {"anchors": [[8], [16], [32], [48]], "ratios": [1.0], "width": 16, "hidden": 32}


def small_backbone(**changes: Any) -> Backbone:
    geometry = {"img_size": (64, 96), "patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 32, "num_classes": 5}
    return mtr_lab.create_model("vim_ti", **{**geometry, **changes})


@pytest.mark.parametrize("stride", STRIDES)
def test_the_pyramid_has_maps_at_its_strides(stride: int) -> None:
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(24, stride, 16)
    maps = pyramid(torch.randn(2, 24, 128 // stride, 64 // stride))
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        str(target): (2, 16, 128 // target, 64 // target) for target in STRIDES
    }


def test_every_level_keeps_places() -> None:
    """A change in one corner of the map changes that corner of every level, and not the opposite one."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(8, 8, 8)
    features = torch.randn(1, 8, 32, 32)
    changed = features.clone()
    changed[..., :2, :2] += 1
    for before, after in zip(pyramid(features).values(), pyramid(changed).values(), strict=True):
        differs = (before != after).any(dim=1)[0]
        assert differs[0, 0]
        assert not differs[differs.shape[0] // 2 :, differs.shape[1] // 2 :].any()


@pytest.mark.parametrize("restoration", ["nearest", "skip", "interpolate"])
def test_the_head_is_given_the_restored_map(restoration: str) -> None:
    torch.manual_seed(0)
    backbone = small_backbone(depth=4)
    detector = Detector(backbone, 2, **SMALL, restoration=restoration).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        whole = detector.features(images)
        normed, _ = backbone.norm_f(backbone.forward_state(images).stream)
        mtr_lab.patch(backbone, "mtr", ratio=0.3)
        restored = detector.features(images)
    place = backbone.class_position(96)
    patches = torch.cat([normed[:, :place], normed[:, place + 1 :]], dim=1)
    assert torch.allclose(whole.flatten(2).transpose(1, 2), patches, atol=1e-6)
    assert restored.shape == whole.shape == (2, 32, 8, 12)
    distinct = restored.flatten(2)[0].unique(dim=1).shape[1]
    assert distinct < 96 if restoration == "nearest" else distinct == 96  # merged patches share a value


def squares(count: int, generator: torch.Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images of noise with two bright squares, whose class is their colour."""
    images = 0.3 * torch.randn(count, 3, 64, 96, generator=generator)
    objects = []
    for image in images:
        boxes, labels = [], []
        for half in (0, 48):
            side = int(torch.randint(12, 28, (), generator=generator))
            left = half + int(torch.randint(0, 48 - side, (), generator=generator))
            top = int(torch.randint(0, 64 - side, (), generator=generator))
            label = int(torch.randint(0, 2, (), generator=generator))
            image[label, top : top + side, left : left + side] += 3
            boxes.append([left, top, left + side, top + side])
            labels.append(label)
        objects.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return images, objects


def as_batch(images: Tensor, objects: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    sizes = [(64, 96)] * len(images)
    return {"image": images, "size": sizes, "original_size": sizes, "objects": list(objects)}


def test_the_losses_fall_and_reach_the_whole_backbone() -> None:
    torch.manual_seed(0)
    detector = Detector(small_backbone(), 2, **SMALL).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    batch = as_batch(*squares(2, torch.Generator().manual_seed(0)))
    course = []
    for _ in range(10):
        loss = torch.stack(list(detector.losses(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[-1] < 0.6 * course[0]
    without = [name for name, value in detector.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without


def test_an_image_without_objects_has_gradients() -> None:
    torch.manual_seed(0)
    detector = Detector(small_backbone(), 2, **SMALL).train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = detector.losses(as_batch(torch.randn(2, 3, 64, 96), [nothing, nothing]))
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert detector.head.rpn.head.cls_logits.weight.grad.abs().sum() > 0  # "no object" is learned


def test_boxes_are_not_rounded_to_the_precision_of_the_features() -> None:
    torch.manual_seed(0)
    detector = Detector(small_backbone(), 2, **SMALL).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = detector.features(images)
        (found,) = detector.detect(as_batch(images, []), features)
    boxes = found["boxes"]
    assert len(boxes)
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


def test_masks_lie_in_their_boxes() -> None:
    torch.manual_seed(0)
    detector = Detector(small_backbone(), 2, **SMALL, masks=True).eval()
    images = torch.randn(1, 3, 64, 96)
    batch = {"image": images, "size": [(64, 96)], "original_size": [(128, 192)]}
    with torch.no_grad():
        (found,) = detector.detect(batch, detector.features(images))
    assert found["masks"].shape == (len(found["boxes"]), 128, 192)
    assert found["masks"].any()
    for mask, box in zip(found["masks"], found["boxes"], strict=True):
        rows, columns = torch.where(mask)
        if len(rows):
            around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (around - box)[:2].min() > -6  # a pixel of the mask is a fourteenth of the box
            assert (around - box)[2:].max() < 6


def test_detections_are_in_the_pixels_of_the_original_image() -> None:
    detection = {"boxes": torch.tensor([[10.0, 20, 30, 40]]), "scores": torch.ones(1)}
    back = to_original(detection, (50, 80), (100, 240))
    assert back["boxes"].tolist() == [[30, 40, 90, 80]]


def test_flops_of_the_head_grow_with_the_image() -> None:
    head = DetectionHead(32, 8, 2, **SMALL)
    small, large = head.flops(64, 96), head.flops(128, 192)
    convolutions = small - (4 * small - large) / 3  # the regions' share does not grow with the image
    assert 0 < convolutions < small
    regions = (4 * small - large) / 3
    # Of 300 regions: two convolutions and a layer over 7 x 7 x 16, then 3 classes and their boxes.
    assert regions == pytest.approx(300 * 2 * (2 * 49 * 9 * 16 * 16 + 49 * 16 * 32 + 32 * (3 + 12)), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"anchors": [[8], [16], [32]]}, r"3 lists of anchors: give one for each of the strides \(4, 8, 16, 32\)"),
        ({"anchors": [[8], [16], [32], [48, 64]]}, "give every stride the same number of sizes"),
        ({"restoration": "copy"}, "unknown restoration 'copy'"),
        ({"widht": 32}, r"unknown setting task\. 'widht'. Did you mean 'width'"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Detector(small_backbone(), 2, **{**SMALL, **changes})


def test_patches_too_far_apart() -> None:
    with pytest.raises(UserError, match=r"patches are 6 pixels apart: a feature pyramid needs one of \(4, 8, 16, 32\)"):
        Detector(small_backbone(img_size=60, patch_size=6, stride=6), 2, **SMALL)


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("mambavision_t", {"dim": 8, "in_dim": 8, "depths": (1, 1, 4, 3), "num_heads": (1, 1, 2, 2)}),
        ("vmamba_t", {"dims": 8, "depths": (1, 1, 3, 2)}),
    ],
)
def test_a_hierarchical_backbone_gives_its_four_maps(name: str, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    detector = Detector(mtr_lab.create_model(name, img_size=(64, 96), **geometry), 2, **SMALL)
    images, objects = squares(2, torch.Generator().manual_seed(0))
    maps = detector.eval().features(images)
    assert [map.shape[1:] for map in maps] == [(8 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    assert detector.head.flops(64, 96) > 0
    mtr_lab.patch(detector.backbone, "mtr", ratio=0.1, first_block=0, interval=1)
    with torch.no_grad():
        reduced = detector.features(images)
        detections = detector.detect(as_batch(images, objects), reduced)
    assert [map.shape for map in reduced] == [map.shape for map in maps]
    assert not torch.equal(reduced[3], maps[3])
    assert all(found["boxes"].isfinite().all() for found in detections)
    losses = detector.train().losses(as_batch(images, objects))
    torch.stack(list(losses.values())).sum().backward()
    idle = [key for key, value in detector.named_parameters() if value.requires_grad and value.grad is None]
    assert not idle


def test_maps_at_other_strides_are_refused() -> None:
    with pytest.raises(UserError, match=r"maps of \(8, 16\) channels at strides \(4, 8\): expected the strides"):
        DetectionHead((8, 16), (4, 8), 2, **SMALL)
