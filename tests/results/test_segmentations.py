"""Mean intersection over union of images, its interval, and its paired difference."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from mtr_lab.errors import UserError
from mtr_lab.results.comparison import compare
from mtr_lab.results.metrics import score
from mtr_lab.results.metrics.miou import mean_iou, resampled_iou
from mtr_lab.results.predictions_file import load_predictions, save_predictions
from mtr_lab.results.segmentations import Segmentations


def segmentations(points: int = 2, images: int = 12, classes: int = 3) -> Segmentations:
    confusion = np.random.default_rng(0).integers(0, 50, (points, images, classes, classes)).astype(np.int32)
    confusion[1:] += 40 * np.eye(classes, dtype=np.int32)
    names = np.array([str(i) for i in range(images)])
    points_names = np.array(["none@0", *(f"mtr@{i}" for i in range(1, points))])
    return Segmentations(names, names, confusion[0].sum(-1).astype(np.int64), points_names, confusion)


def test_by_hand() -> None:
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # the third class neither occurs nor is found
    assert mean_iou(confusion) == pytest.approx((6 / 9 + 3 / 6) / 2)
    confusion[0, 2] = 1  # now it is found, and wrongly
    assert mean_iou(confusion) == pytest.approx((6 / 10 + 3 / 6 + 0) / 3)
    assert math.isnan(mean_iou(np.zeros((3, 3), int)))


def test_resampling_is_of_images() -> None:
    confusion = segmentations().confusion[0]
    rng = np.random.default_rng(5)
    expected = [mean_iou(confusion[rng.integers(12, size=12)].sum(0)) for _ in range(20)]
    assert resampled_iou(confusion, 20, seed=5).tolist() == pytest.approx(expected)


def test_the_difference_is_paired() -> None:
    run = segmentations()
    unreduced, reduced = score(run, 0), score(run, 1)
    assert unreduced["miou_difference"] == 0
    assert unreduced["miou_difference_ci"] == [0, 0]
    assert reduced["miou_difference"] == pytest.approx(reduced["miou"] - unreduced["miou"])
    low, high = reduced["miou_difference_ci"]
    assert low < reduced["miou_difference"] < high
    assert reduced["miou_ci"][0] < reduced["miou"] < reduced["miou_ci"][1]
    found = compare(run, 0, run, 1)["miou"]
    assert found["difference"] == reduced["miou_difference"]
    assert found["ci"] == reduced["miou_difference_ci"]
    assert found["significant"]


def test_a_comparison_draws_as_it_is_told() -> None:
    run = segmentations()
    confusion = [run.confusion[i] for i in range(2)]
    resampled = resampled_iou(confusion[1], 50, seed=3) - resampled_iou(confusion[0], 50, seed=3)
    expected = np.quantile(resampled, [0.025, 0.975]).tolist()
    assert compare(run, 0, run, 1, resamples=50, seed=3)["miou"]["ci"] == pytest.approx(expected)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    run = segmentations()
    save_predictions(run, tmp_path)
    loaded = load_predictions(tmp_path)
    together = run.select(slice(1)).concat(run.select(slice(1, None)))
    for field in dataclasses.fields(Segmentations):
        assert np.array_equal(getattr(loaded, field.name), getattr(run, field.name)), field.name
        assert np.array_equal(getattr(together, field.name), getattr(run, field.name)), field.name


def test_what_cannot_be_compared() -> None:
    run = segmentations()
    other = dataclasses.replace(run, hashes=run.hashes[::-1])
    with pytest.raises(UserError, match="cannot be paired"):
        compare(run, 0, other, 1)
    with pytest.raises(ValueError, match="expected confusion of shape"):
        dataclasses.replace(run, points=run.points[:1])
