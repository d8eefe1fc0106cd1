"""``evaluate_model``: a classifier of the user's on images of the user's, from Python."""

import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, TensorDataset

from mtr_lab import create_model, patch, unpatch
from mtr_lab.data import ImageDataModule
from mtr_lab.errors import UserError
from mtr_lab.evaluation import evaluate_model

LABELS = torch.arange(3)
SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))


def classifier() -> Any:
    torch.manual_seed(0)
    return create_model("vim_nano", img_size=32, depth=6, embed_dim=16)


def dataset(images: int = 7) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(images, 3, 32, 32, generator=generator), torch.arange(images) % 3)


def logits(model: Any, ratio: float) -> torch.Tensor:
    """Of the dataset, computed without the library's evaluation."""
    if ratio:
        patch(model, "write", ratio=ratio)
    with torch.no_grad():
        outputs = model.eval()(dataset().tensors[0])
    unpatch(model)
    return outputs


@pytest.mark.parametrize(
    "form", [tuple, list, lambda batch: {"image": batch[0], "label": batch[1]}], ids=["tuple", "list", "dict"]
)
def test_every_form_of_a_batch_is_scored_at_every_ratio(form: Callable) -> None:
    model, data = classifier(), dataset()
    batches = [form(batch) for batch in DataLoader(data, batch_size=3)]
    points = evaluate_model(model, batches, "write", ratio=[0.1, 0.3])
    assert [(point["policy"], point["ratio"]) for point in points] == [("none", 0), ("write", 0.1), ("write", 0.3)]
    unreduced = logits(model, 0)
    for point in points:
        expected = logits(model, point["ratio"])
        assert point["images"] == 7
        assert point["skipped"] == []
        assert point["top1"] == (expected.argmax(1) == data.tensors[1]).double().mean().item()
        assert point["agreement"] == (expected.argmax(1) == unreduced.argmax(1)).double().mean().item()
        kl = (unreduced.softmax(1) * (unreduced.log_softmax(1) - expected.log_softmax(1))).sum(1).mean().item()
        assert point["kl"] == pytest.approx(kl, abs=1e-6)
        assert point["ratio"] <= point["reduction"]
        assert point["reduction"] == pytest.approx(1 - point["flops_true"] / points[0]["flops_true"])
        assert "img_per_s" not in point


def test_counts_instead_of_a_ratio_and_a_part_of_the_policy() -> None:
    points = evaluate_model(classifier(), DataLoader(dataset(2)), schedule=[3, 2, 0, 0, 0, 0], score="b")
    assert points[1]["ratio"] is None
    assert points[1]["tokens"] == [17, 14, 12, 12, 12, 12]


def test_the_default_ratios() -> None:
    points = evaluate_model(classifier(), DataLoader(dataset(2)))
    assert [point["ratio"] for point in points] == [0, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    "ratio",
    [
        (0.125, 0.25),
        iter([0.125, 0.25]),
        np.array([0.125, 0.25], np.float32),
        torch.tensor([0.125, 0.25]),
        [np.float32(0.125), torch.tensor(0.25)],
    ],
    ids=["tuple", "iterator", "array", "tensor", "scalars of both"],
)
def test_ratios_in_any_iterable(ratio: Any) -> None:
    points = evaluate_model(classifier(), DataLoader(dataset(2)), ratio=ratio)
    assert [(type(point["ratio"]), point["ratio"]) for point in points[1:]] == [(float, 0.125), (float, 0.25)]


@pytest.mark.parametrize("ratio", [0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25)])
def test_a_single_ratio(ratio: Any) -> None:
    _, point = evaluate_model(classifier(), DataLoader(dataset(2)), ratio=ratio)
    assert (type(point["ratio"]), point["ratio"]) == (float, 0.25)


def test_a_measured_schedule() -> None:
    _, point = evaluate_model(
        classifier(), DataLoader(dataset(2)), ratio=0.2, schedule="auto", images=dataset(4).tensors[0]
    )
    assert point["reduction"] >= 0.2


def test_points_are_timed_on_request() -> None:
    for point in evaluate_model(classifier(), DataLoader(dataset(2)), ratio=0.2, timing_seconds=1e-9):
        assert point["img_per_s"] > 0
        assert point["peak_mib"] > 0
        assert point["latency_ms"]["p50"] <= point["latency_ms"]["p95"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of each of two classes."""
    for wnid in ("n01440764", "n03888257"):
        (tmp_path / wnid).mkdir()
        for image in sorted((SAMPLE / wnid).iterdir())[:2]:
            shutil.copy(image, tmp_path / wnid)
    return tmp_path


def test_a_folder_is_prepared_as_the_weights_expect(folder: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vim_ti", img_size=64, depth=6, embed_dim=16)  # of ImageNet's 1000 classes
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    files = sorted(folder.rglob("*.JPEG"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([0, 0, 701, 701])  # tench and parachute
    expected = evaluate_model(model, [(images, labels)], ratio=0.2)
    config = resolve_model_data_config(model)
    names = {"model_classes": model.pretrained_cfg["label_names"], "num_classes": 1000}
    for data in (str(folder), folder, ImageDataModule(name="mine", root=str(folder), data_config=config, **names)):
        points = evaluate_model(model, data, ratio=0.2)
        assert [point["top1"] for point in points] == [point["top1"] for point in expected]
        assert points[1]["kl"] == pytest.approx(expected[1]["kl"], rel=1e-3, abs=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model, (images, _) = classifier().train(), dataset().tensors
    with torch.no_grad():
        before = model(images)
        evaluate_model(model, DataLoader(dataset()), ratio=0.2)
        with pytest.raises(UserError):
            evaluate_model(model, DataLoader(dataset()), ratio=0.99)
        assert model.training
        assert torch.equal(model(images), before)


def test_a_part_in_another_mode_stays_in_it() -> None:
    model = classifier().train()
    frozen = model.blocks[1].eval()
    evaluate_model(model, DataLoader(dataset()), ratio=0.2)
    assert [block.training for block in model.blocks] == [True, False, True, True, True, True]
    assert not any(module.training for module in frozen.modules())


def test_the_policy_of_a_patched_model_is_restored() -> None:
    model, (images, _) = classifier(), dataset().tensors
    unreduced = evaluate_model(model, DataLoader(dataset()), "write", ratio=0.2)
    reduction = patch(model, "random", ratio=0.3)
    with torch.no_grad():
        before = model(images)
        assert evaluate_model(model, DataLoader(dataset()), "write", ratio=0.2) == unreduced
        with pytest.raises(UserError):
            evaluate_model(model, DataLoader(dataset()), "mtrr")
        assert torch.equal(model(images), before)
        reduction.use(reduction.solve(0.1))
        assert not torch.equal(model(images), before)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ([(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), LABELS[:2])], {}, "of torch.uint8.*normalised floats"),
        ([(torch.zeros(2, 3, 32, 32), LABELS)], {}, r"labels \(3,\)"),
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(2))], {}, "labels .* of torch.float32: .*integers"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 10]))], {}, "labels from 0 to 10: expected 0 to 9"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([-2, 1]))], {}, "labels from -2 to 1"),
        ([(torch.zeros(2, 3, 32, 32), LABELS[:2] > 0)], {}, "labels .* of torch.bool"),
        ([(torch.zeros(3, 32, 32), LABELS)], {}, r"images \(3, 32, 32\)"),
        ([torch.zeros(2, 3, 32, 32)], {}, "batch of type Tensor"),
        ([{"images": torch.zeros(2, 3, 32, 32)}], {}, "batch of type dict"),
        ([(np.zeros((2, 3, 32, 32)), np.zeros(2))], {}, "expected tensors"),
        ([], {}, "no image could be read"),
        ([(torch.full((1, 3, 32, 32), torch.nan), LABELS[:1])], {}, "not a number for 1 of 1 images"),
        ("/nowhere", {}, "/nowhere is not a directory"),
        ([], {"ratio": 0.99}, "out of reach"),
        ([], {"ratio": "0.2"}, "must be a share .*got '0.2'"),
        ([], {"ratio": ["0.2"]}, "must be a share .*got '0.2'"),
        ([], {"ratio": 0.2, "schedule": [0] * 6}, "in Python: ratio=None"),
        ([], {"policy": "mtrr"}, "unknown .*'mtrr'"),
        ([], {"scroe": "b"}, "unknown .*'scroe'"),
        ([], {"schedule": "auto"}, "images"),
    ],
)
def test_mistakes(data: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_model(classifier(), data, **changes)


def test_another_librarys_model_is_refused() -> None:
    with pytest.raises(UserError, match="got Linear"):
        evaluate_model(torch.nn.Linear(1, 1), [])
