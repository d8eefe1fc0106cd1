"""``python -m mtr_lab task=detection`` and its ways of training, end to end on a few bundled images."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from small_dense import BCCD, DETECTION, QUICK, bccd

import mtr_lab
from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.results.comparison import Sample, compare
from mtr_lab.results.detections import Detections
from mtr_lab.results.metrics import score
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.train import main as train_main

EVALUATION = [*DETECTION, *QUICK]


def test_a_run_on_the_bundled_images(run_program) -> None:
    run = run_program(evaluate_main, *EVALUATION, "pictures=1", "timing.batch_size=2", "timing.seconds=0.1")
    assert run.code == 0, run.err
    result = read_result(run.folder)
    assert (result["task"], result["dataset"]) == ("detection", "bccd_sample")
    unreduced, reduced = result["points"]
    assert reduced["reduction"] >= 0.2
    assert reduced["reduction"] == pytest.approx(1 - reduced["flops_true"] / unreduced["flops_true"])
    assert reduced["flops_head"] == unreduced["flops_head"] > 0
    for point in result["points"]:
        assert point["images"] == 8
        assert 0 <= point["map"] <= point["ap50"] <= 1
        assert point["img_per_s"] > 0
    predictions = load_predictions(run.folder)
    assert isinstance(predictions, Detections)
    assert predictions.points.tolist() == ["none@0", "mtr@0.2"]
    assert predictions.labels.sum(axis=0)[0] > 50  # red blood cells
    assert score(predictions, 1)["ap50"] == reduced["ap50"]
    picture, vectors = sorted((run.folder / "pictures").iterdir())
    assert (picture.name, vectors.name) == ("000_BloodImage_00000.png", "000_BloodImage_00000.svg")
    assert Image.open(picture).width > 4 * 600
    words = vectors.read_text()
    assert all(f">{word}<" in words for word in ("truth", "unreduced", "mtr, 20 % fewer FLOPs", "RBC", "lost object"))
    assert "@" not in words


def test_a_finished_run_is_not_computed_again_and_the_unreduced_model_once_a_sweep(run_program, tmp_path: Path) -> None:
    assert run_program(evaluate_main, *EVALUATION).code == 0
    assert "finished before" in run_program(evaluate_main, *EVALUATION).out
    sweep = run_program(
        evaluate_main,
        "hydra.mode=MULTIRUN",
        *EVALUATION[:-1],
        "mtr.ratio=0.1,0.2",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    assert sweep.code == 0, sweep.err
    results = [read_result(file) for file in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert sorted(result["unreduced"]["reused"] for result in results) == [False, True]
    alone = read_result(run_program(evaluate_main, *EVALUATION, "resume=false").folder)
    assert alone["points"][1]["map"] == results[1]["points"][1]["map"]
    assert alone["points"][0]["map"] == results[1]["points"][0]["map"]


def test_points_are_compared_in_pairs(run_program) -> None:
    predictions = load_predictions(run_program(evaluate_main, *EVALUATION).folder)
    assert isinstance(predictions, Detections)
    first, second = predictions.select(slice(1)), predictions.select(slice(1, None))
    for field in dataclasses.fields(Detections):  # one run's points after another's
        together = first.concat(second)
        assert np.array_equal(getattr(together, field.name), getattr(predictions, field.name)), field.name
    found = compare(predictions, 0, predictions, 1)
    difference = predictions.figures[1] - predictions.figures[0]
    assert [found["map"]["difference"], found["ap50"]["difference"]] == difference.tolist()
    assert compare(predictions, 1, predictions, 1)["map"]["ci"] == [0, 0]
    assert set(Sample.of(predictions).pooled[1]) == {"map", "ap50"}


def test_a_head_is_trained_alone_on_a_frozen_backbone(run_program, tmp_path: Path) -> None:
    classifier = mtr_lab.create_model("vim_nano", img_size=(64, 96), depth=4, embed_dim=16)
    save_file(classifier.half().state_dict(), tmp_path / "classifier.safetensors")
    options = [*DETECTION, *bccd(tmp_path / "bccd"), "dataset.batch_size=2"]
    options += ["training.epochs=1", "training.warmup_epochs=0", "training.lr=0.01"]
    options += [f"backbone.checkpoint={tmp_path / 'classifier.safetensors'}"]
    backbones = []
    for frozen in (True, False):
        run = run_program(train_main, *options, f"training.freeze_backbone={frozen}")
        assert run.code == 0, run.err
        backbones.append(load_file(run.folder / "model.safetensors"))
    for name, value in classifier.state_dict().items():
        if not name.startswith("head."):
            assert value.equal(backbones[0][f"backbone.{name}"]), name
    assert not classifier.patch_embed.proj.weight.equal(backbones[1]["backbone.patch_embed.proj.weight"])


def outlined(root: Path) -> Path:
    """Three images with a triangle, in COCO's layout."""
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 120, (60, 100, 3), dtype=np.uint8)
            pixels[20:50, 30:70] += 100
            Image.fromarray(pixels).save(root / split / f"{number}.png")
        annotations = [
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "bbox": [30, 20, 40, 30],
                "segmentation": [[30, 20, 70, 50, 30, 50]],
            }
            for i in range(3)
        ]
        images = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
        content = {"images": images, "categories": [{"id": 1, "name": "thing"}], "annotations": annotations}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_instance_segmentation_on_coco(run_program, tmp_path: Path) -> None:
    data = ["task.masks=true", "dataset=coco", f"dataset.root={outlined(tmp_path / 'coco')}", "dataset.num_workers=0"]
    run = run_program(train_main, *DETECTION, *data, "dataset.batch_size=3", "training.epochs=1")
    assert run.code == 0, run.err
    assert "train_loss_mask" in json.loads((run.folder / "training.json").read_text())["final"]
    evaluation = run_program(evaluate_main, *EVALUATION, *data)
    assert evaluation.code == 0, evaluation.err
    assert read_result(evaluation.folder)["points"][1]["images"] == 3


def test_the_bundled_images_are_the_ones_their_rule_names() -> None:
    ids = (BCCD / "ImageSets/Main/val.txt").read_text().split()
    assert len(ids) == 20 == len(list((BCCD / "JPEGImages").glob("*.jpg")))
    assert sum(file.stat().st_size for file in BCCD.rglob("*.*")) < 1_000_000
