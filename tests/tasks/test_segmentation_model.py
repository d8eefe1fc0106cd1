"""The segmentation head on any backbone, patched or not, and joined windows."""

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from mtr_lab import create_model, patch, unpatch
from mtr_lab.backbones import Backbone
from mtr_lab.data.segmentation.label_maps import IGNORE
from mtr_lab.errors import UserError
from mtr_lab.results.metrics.miou import mean_iou
from mtr_lab.tasks.segmentation.evaluation import confusion_matrix
from mtr_lab.tasks.segmentation.model import SegmentationHead, Segmenter, classify_pixels, join_windows
from mtr_lab.tasks.segmentation.training import SegmentationTraining, class_weights


def backbone(name: str = "vim_nano", **changes) -> Backbone:
    torch.manual_seed(0)
    return create_model(name, **{"img_size": (64, 96), "depth": 8, "embed_dim": 16, **changes})


@pytest.mark.parametrize("name", ["vim_nano", "videomamba_ti"])
@pytest.mark.parametrize("restoration", ["nearest", "skip", "interpolate"])
def test_a_reduced_backbone_gives_logits_of_every_pixel(name: str, restoration: str) -> None:
    model = Segmenter(backbone(name, patch_size=8, stride=8), 5, width=16, restoration=restoration).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        unreduced = model(images)
        patch(model.backbone, "mtr", ratio=0.3)
        reduced = model(images)
        patch(model.backbone, "mtr", ratio=0.0)
        nothing_removed = model(images)
        unpatch(model.backbone)
    assert reduced.shape == unreduced.shape == (2, 5, 64, 96)
    assert not torch.allclose(reduced, unreduced)
    assert torch.equal(nothing_removed, unreduced)


def test_overlapping_patches() -> None:
    model = Segmenter(backbone(patch_size=16, stride=8), 5, width=16).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_the_head_takes_maps_of_any_stride(stride: int) -> None:
    head = SegmentationHead([16] * 4, [stride] * 4, 5, 16).eval()
    logits = head([torch.randn(1, 16, 192 // stride, 256 // stride) for _ in range(4)])
    assert logits.shape == (1, 5, 48, 64)


def test_the_depth_of_a_map_matters() -> None:
    head = SegmentationHead([16] * 4, [8] * 4, 5, 16).eval()
    maps = [torch.randn(1, 16, 8, 12) for _ in range(4)]
    assert not torch.allclose(head(maps), head(maps[::-1]))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SegmentationHead([16] * 4, [12] * 4, 5, 16), "patches are 12 pixels apart"),
        (lambda: Segmenter(backbone(depth=3), 5), "4 feature maps need at least 4 blocks"),
        (lambda: Segmenter(backbone(), 5, restoration="zero"), "unknown restoration 'zero'"),
        (lambda: Segmenter(backbone(), 5, width=0), r"task\.width"),
    ],
)
def test_impossible_settings(make, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make()


def test_flops_of_the_head_grow_with_the_image() -> None:
    head = SegmentationHead([16] * 4, [8] * 4, 5, 16)
    assert head.flops(128, 192) == pytest.approx(4 * head.flops(64, 96), rel=0.01)  # except for the pooled maps
    assert head.training


def test_every_parameter_that_is_trained_has_a_gradient_and_the_loss_falls() -> None:
    model = Segmenter(backbone(depth=4), 5, width=16)
    task = SegmentationTraining(model, lr=1e-3, weight_decay=0, warmup_epochs=0)
    task.log_dict = lambda *_, **__: None
    labels = torch.randint(4, (2, 8, 12)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :, 90:] = IGNORE
    batch = {"image": torch.randn(2, 3, 64, 96), "label": labels, "id": ["a", "b"], "skipped": []}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(16):
        loss = task.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert without == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_rare_classes_weigh_more_and_absent_ones_nothing() -> None:
    assert class_weights(torch.tensor([400, 100, 25, 0, 100])).tolist() == [0.5, 1, 2, 0, 1]


def test_a_pixel_has_the_mean_of_its_windows() -> None:
    windows = torch.randn(3, 2, 4, 6)
    places = [(0, 0), (0, 3), (2, 3)]
    joined = join_windows(windows, places, (6, 8))
    for row in range(6):
        for column in range(8):
            there = [
                window[:, row - top, column - left]
                for window, (top, left) in zip(windows, places, strict=True)
                if 0 <= row - top < 4 and 0 <= column - left < 6
            ]
            if there:
                torch.testing.assert_close(joined[:, row, column], torch.stack(there).mean(0))


def test_pixels_are_classified_in_the_size_of_their_labels() -> None:
    logits = torch.zeros(3, 2, 8, 8)
    logits[:, 0] = 0.5
    logits[0, 1, :, 4:] = 1  # the right half
    logits[1:, 1, :4] = 1  # the upper half, of both windows of the second image
    batch = {
        "windows": [[(0, 0)], [(0, 0), (0, 4)]],
        "size": [(8, 6), (8, 12)],  # of the first image two columns are padding
        "label": [torch.zeros(16, 12), torch.zeros(4, 6)],
    }
    first, second = classify_pixels(logits, batch)
    assert first.shape == (16, 12)
    assert first[:, :8].sum() == 0
    assert bool(first[:, 8:].all())
    assert second.tolist() == [[1] * 6] * 2 + [[0] * 6] * 2


def test_the_metric_is_the_jaccard_index() -> None:
    torch.manual_seed(0)
    labels, found = torch.randint(4, (2, 20, 30)), torch.randint(4, (2, 20, 30))
    labels[:, :3] = IGNORE
    counts = sum(confusion_matrix(*each, 4) for each in zip(found, labels, strict=True))
    assert counts.sum() == 2 * 17 * 30
    expected = MulticlassJaccardIndex(4, ignore_index=IGNORE)(found, labels)
    assert mean_iou(counts.numpy()) == pytest.approx(float(expected))
