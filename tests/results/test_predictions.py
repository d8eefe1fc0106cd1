import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mtr_lab.errors import UserError
from mtr_lab.results.classifications import Classifications, top_classes
from mtr_lab.results.metrics import score
from mtr_lab.results.predictions import point_name
from mtr_lab.results.predictions_file import load_predictions, save_predictions


def predictions(images: int = 37, classes: int = 11, points: int = 3) -> Classifications:
    """Random logits, each point further from the first."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(points, images, classes, generator=generator).cumsum(dim=0)
    log_probs = logits.log_softmax(dim=-1)
    return Classifications(
        ids=np.array([f"class/ïmage {i}.png" for i in range(images)]),
        hashes=np.array([f"{i:064x}" for i in range(images)]),
        labels=torch.randint(classes, (images,), generator=generator).numpy(),
        points=np.array([point_name("none", 0), point_name("mtr", 0.2), point_name("mtr", 0.4)][:points]),
        top5=top_classes(log_probs).numpy(),
        log_probs=log_probs.numpy(),
    )


def test_predictions_return_from_their_file_and_their_folder(tmp_path: Path) -> None:
    written = predictions()
    path = save_predictions(written, tmp_path)
    assert path.name == "predictions.npz"
    for read in (load_predictions(path), load_predictions(tmp_path)):
        for field in dataclasses.fields(Classifications):
            np.testing.assert_array_equal(getattr(read, field.name), getattr(written, field.name))
    assert read.top5.dtype == np.int32
    assert read.log_probs.dtype == np.float32


def test_names_given_as_objects_are_stored_without_pickle(tmp_path: Path) -> None:
    written = predictions()
    save_predictions(dataclasses.replace(written, ids=written.ids.astype(object)), tmp_path)
    np.testing.assert_array_equal(load_predictions(tmp_path).ids, written.ids)


def test_files_that_hold_something_else_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"predictions\.npz.*No such file"):
        load_predictions(tmp_path)
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps([1]))
    np.savez(tmp_path / "others.npz", ids=np.arange(3))
    path = save_predictions(predictions(), tmp_path)
    (tmp_path / "half.npz").write_bytes(path.read_bytes()[:-500])
    (tmp_path / "empty.npz").touch()
    for name in ("text.npz", "pickled.npz", "half.npz", "empty.npz"):
        with pytest.raises(UserError, match=name):
            load_predictions(tmp_path / name)
    with pytest.raises(UserError, match=r"others\.npz .* neither a task nor one of the arrays log_probs, figures"):
        load_predictions(tmp_path / "others.npz")


def test_the_file_names_its_task(tmp_path: Path) -> None:
    path = save_predictions(predictions(), tmp_path)
    with np.load(path) as stored:
        arrays = dict(stored)
    assert arrays.pop("task") == "classification"
    np.savez(path, **arrays)  # of an earlier version
    np.testing.assert_array_equal(load_predictions(path).log_probs, predictions().log_probs)
    np.savez(path, **arrays, task="classification", figures=np.zeros(1))  # an array of another task's name
    np.testing.assert_array_equal(load_predictions(path).log_probs, predictions().log_probs)
    np.savez(path, **arrays, task="depth")
    with pytest.raises(UserError, match="its task is 'depth', not one of classification, detection, segmentation"):
        load_predictions(path)


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels of shape \(37,\), got \(36,\)"):
        dataclasses.replace(predictions(), labels=np.zeros(36, dtype=np.int64))


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_of_equally_probable_classes_the_lower_comes_first(levels: int) -> None:
    log_probs = -np.random.default_rng(levels).integers(0, levels, (2, 30, 12)).astype(np.float32)
    ranked = [[sorted(range(12), key=lambda i, row=row: (-row[i], i))[:5] for row in point] for point in log_probs]
    assert top_classes(torch.from_numpy(log_probs)).tolist() == ranked


@pytest.mark.parametrize("classes", [1, 3, 5, 11])
def test_top_classes_are_those_of_topk_and_minus_one_beyond_the_last(classes: int) -> None:
    log_probs = torch.randn(2, 7, classes)
    top = min(5, classes)
    found = top_classes(log_probs)
    assert found.shape == (2, 7, 5)
    assert torch.equal(found[..., :top].long(), log_probs.topk(top).indices)
    assert (found[..., top:] == -1).all()
    assert top_classes(log_probs[:, :0]).shape == (2, 0, 5)


@pytest.mark.parametrize("classes", [2, 4, 11])
@pytest.mark.parametrize("point", [1, 2])
def test_scores_match_torch_image_by_image(classes: int, point: int) -> None:
    made = predictions(images=2100, classes=classes)  # more than are handled at once
    log_probs, labels = torch.tensor(made.log_probs, dtype=torch.float64), torch.tensor(made.labels)
    scores = score(made, point)

    kl = F.kl_div(log_probs[point], log_probs[0], log_target=True, reduction="none").sum(dim=1)
    ranked = log_probs[point].argsort(dim=1, descending=True)
    top1 = (ranked[:, 0] == labels).double().mean().item()
    assert scores["images"] == 2100
    assert scores["top1"] == pytest.approx(top1)
    assert scores["top5"] == pytest.approx((ranked[:, :5] == labels[:, None]).any(dim=1).double().mean().item())
    assert scores["agreement"] == pytest.approx((ranked[:, 0] == log_probs[0].argmax(dim=1)).double().mean().item())
    assert scores["kl"] == pytest.approx(kl.mean().item(), abs=1e-6)
    half = 1.96 * kl.std().item() / math.sqrt(2100)
    assert scores["kl_ci"] == pytest.approx([scores["kl"] - half, scores["kl"] + half], abs=0.25 * half)  # skewed
    half = 1.96 * math.sqrt(top1 * (1 - top1) / 2100)
    assert scores["top1_ci"] == pytest.approx([top1 - half, top1 + half], abs=0.1 * half)


def test_the_unreduced_model_agrees_with_itself_without_uncertainty() -> None:
    scores = score(predictions(), 0)
    assert (scores["agreement"], scores["agreement_ci"]) == (1.0, [1.0, 1.0])
    assert (scores["kl"], scores["kl_ci"]) == (0.0, [0.0, 0.0])
    assert scores["top1_ci"][0] < scores["top1"] < scores["top1_ci"][1]


def test_a_hardly_changed_model_has_no_negative_divergence() -> None:
    made = predictions(images=500, classes=1000, points=1)
    nudged = np.nextafter(made.log_probs, np.float32(0))
    both = dataclasses.replace(
        made,
        points=np.array(["none@0", "mtr@0.2"]),
        top5=made.top5.repeat(2, axis=0),
        log_probs=np.concatenate([made.log_probs, nudged]),
    )
    assert 0 <= score(both, 1)["kl_ci"][0] < 1e-9


def test_an_unknown_label_is_not_the_padding_of_few_classes() -> None:
    made = predictions(classes=3)
    scores = score(dataclasses.replace(made, labels=np.full(37, -1)), 1)
    assert (scores["top1"], scores["top5"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("policy", "ratio", "name"), [("none", 0.0, "none@0"), ("mtr", 0.4, "mtr@0.4"), ("mtr", None, "mtr")]
)
def test_points_are_named_by_policy_and_ratio(policy: str, ratio: float | None, name: str) -> None:
    assert point_name(policy, ratio) == name
