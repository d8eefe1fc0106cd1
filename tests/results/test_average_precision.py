"""COCO's average precision from matches, against torchmetrics' on faster-coco-eval."""

from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_masks

from mtr_lab.results.average_precision import RECALLS, average_precision, match_images, resampled_precision
from mtr_lab.tasks.detection.evaluation import average_precisions, mean_average_precision

SIDE = 130


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.integers(0, 80, (count, 2))
    return np.concatenate([corner, corner + rng.integers(5, 40, (count, 2))], axis=1).astype(np.float32)


def random_images(rng: np.random.Generator, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Detections and objects of three classes: boxes a little off, some false, some to ignore; no equal scores."""
    found, truths = [], []
    for _ in range(count):
        boxes = random_boxes(rng, rng.integers(0, 8))
        labels, crowd = rng.integers(0, 3, len(boxes)), rng.random(len(boxes)) < 0.2
        off = np.clip(boxes + rng.integers(-4, 5, boxes.shape), 0, SIDE)
        off[:, 2:] = np.maximum(off[:, 2:], off[:, :2] + 1)
        guesses = np.concatenate([off, random_boxes(rng, 5)]).astype(np.float32)
        scores = rng.permutation(10_000)[: len(guesses)] / np.float32(10_000)
        found.append({"boxes": guesses, "labels": np.append(labels, rng.integers(0, 3, 5)), "scores": scores})
        truths.append({"boxes": boxes, "labels": labels, "iscrowd": crowd})
    return found, truths


def masks(boxes: np.ndarray) -> np.ndarray:
    """The lower left triangle of each box."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    left, top, right, bottom = (edge[:, None, None] for edge in boxes.T)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return inside & ((rows - top) * (right - left) >= (columns - left) * (bottom - top))


def with_shapes(images: list[dict[str, Any]], outlines: bool) -> list[dict[str, Any]]:
    """As ``match_images`` takes them."""
    if outlines:
        encoded = [[coco_masks.encode(np.asfortranarray(mask, np.uint8)) for mask in masks(i["boxes"])] for i in images]
        return [{**image, "shapes": shapes} for image, shapes in zip(images, encoded, strict=True)]
    boxes = [image["boxes"].astype(float) for image in images]
    return [
        {**image, "shapes": np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1)}
        for image, box in zip(images, boxes, strict=True)
    ]


def tensors(image: dict[str, Any], outlines: bool) -> dict[str, torch.Tensor]:
    """As torchmetrics takes them."""
    values = {name: torch.from_numpy(np.asarray(value)) for name, value in image.items()}
    return {**values, "masks": torch.from_numpy(masks(image["boxes"]))} if outlines else values


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outlines", [False, True])
def test_it_equals_torchmetrics(seed: int, outlines: bool) -> None:
    found, truths = random_images(np.random.default_rng(seed), 12)
    metric = mean_average_precision(outlines)
    metric.update([tensors(each, outlines) for each in found], [tensors(each, outlines) for each in truths])
    expected = average_precisions(metric)
    matches = match_images(with_shapes(found, outlines), with_shapes(truths, outlines), 3)
    precision = average_precision(matches)
    assert 0.01 < expected["map"] < 0.9
    assert precision.mean() == pytest.approx(expected["map"], abs=1e-6)
    assert precision[0] == pytest.approx(expected["ap50"], abs=1e-6)


def test_an_image_taken_twice_counts_twice() -> None:
    found, truths = (with_shapes(images, False) for images in random_images(np.random.default_rng(5), 6))
    counts = np.array([0, 2, 1, 3, 0, 1])
    chosen = np.repeat(np.arange(6), counts)
    repeated = match_images([found[i] for i in chosen], [truths[i] for i in chosen], 3)
    weighted = average_precision(match_images(found, truths, 3), counts)
    # Repeated detections share a score, which changes the precision only where the recall steps.
    assert weighted == pytest.approx(average_precision(repeated), abs=0.02)


def test_only_the_best_hundred_of_a_class_in_an_image_count() -> None:
    boxes = random_boxes(np.random.default_rng(0), 101)
    scores = np.linspace(1, 0.1, 101, dtype=np.float32)
    labels = np.zeros(101, np.int64)
    found = with_shapes([{"boxes": boxes, "labels": labels, "scores": scores}], False)
    last = with_shapes([{"boxes": boxes[-1:], "labels": labels[:1], "iscrowd": np.zeros(1, bool)}], False)
    matches = match_images(found, last, 1)
    assert len(matches.score) == 100
    assert scores[-1] not in matches.score


def test_without_objects_there_is_no_precision_and_without_detections_it_is_0() -> None:
    nothing = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "scores": np.zeros(0)}
    box = {"boxes": random_boxes(np.random.default_rng(0), 1), "labels": np.zeros(1, np.int64)}
    crowd = {**box, "iscrowd": np.ones(1, bool)}
    single = {**box, "iscrowd": np.zeros(1, bool)}
    found = with_shapes([nothing], False)
    assert np.isnan(average_precision(match_images(found, with_shapes([crowd], False), 2))).all()
    assert (average_precision(match_images(found, with_shapes([single], False), 2)) == 0).all()


def test_resampled_precision_spreads_around_the_figure() -> None:
    found, truths = (with_shapes(images, False) for images in random_images(np.random.default_rng(3), 40))
    matches = match_images(found, truths, 3)
    resampled = resampled_precision(matches, 200)
    figure = average_precision(matches)
    assert resampled.shape == (200, 2)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    assert (low < [figure.mean(), figure[0]]).all()
    assert (high > [figure.mean(), figure[0]]).all()
    assert np.array_equal(resampled, resampled_precision(matches, 200))


def test_the_recalls_are_torchmetrics_to_the_last_digit() -> None:
    assert np.array_equal(RECALLS, torch.linspace(0, 1, 101).double().numpy())
