"""Predictions of a detection run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mtr_lab.results.average_precision import resampled_precision
from mtr_lab.results.comparison import compare
from mtr_lab.results.detections import Detections
from mtr_lab.results.predictions_file import load_predictions, save_predictions


def detections() -> Detections:
    """Two points, three images, five detections."""
    names = np.array(["a", "b", "c"])
    hits = np.random.default_rng(0).integers(-1, 2, (5, 10)).astype(np.int8)
    point, image, label = np.array([0, 0, 1, 1, 1]), np.array([0, 2, 0, 1, 2]), np.array([1, 0, 1, 0, 0])
    score, box = np.linspace(1, 0.2, 5, dtype=np.float32), np.arange(20, dtype=np.float32).reshape(5, 4)
    figures = np.array([[0.5, 0.8], [0.4, 0.7]])
    objects = np.array([[1, 1], [2, 0], [0, 3]])
    return Detections(
        names, names, objects, np.array(["none@0", "mtr@0.3"]), figures, point, image, label, score, box, hits
    )


def assert_equal(first: object, second: Detections) -> None:
    for field in dataclasses.fields(Detections):
        assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name


def test_points_are_selected_and_joined_with_their_detections(tmp_path: Path) -> None:
    run = detections()
    reduced = run.select(slice(1, None))
    assert (reduced.points.tolist(), reduced.point.tolist(), reduced.image.tolist()) == (
        ["mtr@0.3"],
        [0] * 3,
        [0, 1, 2],
    )
    assert_equal(run.select(slice(1)).concat(reduced), run)


def test_a_comparison_draws_as_it_is_told() -> None:
    run = detections()
    resampled = resampled_precision(run.matches(1), 20, seed=3) - resampled_precision(run.matches(0), 20, seed=3)
    for seed, same in ((3, True), (4, False)):
        compared = compare(run, 0, run, 1, resamples=20, seed=seed)
        for column, metric in enumerate(("map", "ap50")):
            expected = np.nanquantile(resampled[:, column], [0.025, 0.975]).tolist()
            assert (compared[metric]["ci"] == pytest.approx(expected)) == same


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = save_predictions(detections(), tmp_path)
    assert_equal(load_predictions(path), detections())
    with np.load(path) as arrays:
        np.savez(path, **{"found" if name == "hits" else name: array for name, array in arrays.items()})
    assert_equal(load_predictions(path), detections())
