"""``python -m mtr_lab task=detection`` and its training, end to end on a few of the bundled images."""

import dataclasses
import json
import re
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import mtr_lab
from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.cli import run_program as run_hydra_program
from mtr_lab.errors import UserError
from mtr_lab.report.comparison import Sample, compare
from mtr_lab.report.detections import Detections, score_detections
from mtr_lab.report.predictions import load_predictions
from mtr_lab.report.result import read_result
from mtr_lab.report.store import joined
from mtr_lab.tasks import task
from mtr_lab.train import train

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "bccd_sample"))
HEAD = ["task.width=16", "task.hidden=32", "task.anchors=[[8],[16],[24],[32]]", "task.ratios=[1.0]"]
SMALL = [
    "task=detection",
    *HEAD,
    "backbone.depth=4",
    "backbone.embed_dim=16",
    "backbone.img_size=[64,96]",
    "backbone.pretrained=false",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
]
EVALUATION = [*SMALL, "trainer.limit_test_batches=2", "timing.batch_size=0", "mtr.ratio=[0.2]"]


def train_main() -> None:
    run_hydra_program("train", train)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight of the bundled images to train on, and four others to evaluate on."""
    root = tmp_path / "bccd"
    shutil.copytree(SAMPLE, root)
    ids = (SAMPLE / "ImageSets/Main/val.txt").read_text().split()
    for split, chosen in (("train", ids[:8]), ("val", ids[8:12])):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(chosen))
    return root


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
    assert score_detections(predictions, 1)["ap50"] == reduced["ap50"]
    (picture,) = (run.folder / "pictures").iterdir()
    assert picture.name == "000_BloodImage_00000.png"
    assert Image.open(picture).width > 4 * 96


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
        together = joined(first, second)
        assert np.array_equal(getattr(together, field.name), getattr(predictions, field.name)), field.name
    found = compare(predictions, 0, predictions, 1)
    difference = predictions.figures[1] - predictions.figures[0]
    assert [found["map"]["difference"], found["ap50"]["difference"]] == difference.tolist()
    assert compare(predictions, 1, predictions, 1)["map"]["ci"] == [0, 0]
    with pytest.raises(UserError, match="no means over images"):
        Sample.of(predictions)


def test_training_writes_weights_that_evaluation_takes(run_program, root: Path, tmp_path: Path, monkeypatch) -> None:
    data = ["dataset=bccd", f"dataset.root={root}", "dataset.num_workers=0"]
    options = [*SMALL, *data, "dataset.batch_size=2", "dataset.holdout=0.4", "training.epochs=1"]
    run = run_program(train_main, *options, "training.warmup_epochs=0", "training.lr=0.01")
    assert run.code == 0, run.err
    record = json.loads((run.folder / "training.json").read_text())
    assert {"train_loss", "train_loss_box_reg", "val_map", "val_ap50"} <= record["final"].keys()
    weights = load_file(run.folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"backbone", "head"}
    kept = shutil.copy(run.folder / "model.safetensors", tmp_path / "vim_nano_bccd.safetensors")

    given = run_program(evaluate_main, *EVALUATION, *data, f"backbone.checkpoint={kept}")
    assert given.code == 0, given.err
    result = read_result(given.folder)
    assert result["weights"]["sha256"] == record["sha256"]
    trained = load_predictions(given.folder)
    random = load_predictions(run_program(evaluate_main, *EVALUATION, *data).folder)
    assert not np.array_equal(trained.score[:5], random.score[:5])

    # The same file among the bundled ones is what a backbone with pretrained weights gets.
    monkeypatch.setattr(task, "ASSETS", tmp_path)
    bundled = run_program(evaluate_main, *EVALUATION, *data, "backbone.pretrained=true")
    assert bundled.code == 0, bundled.err
    assert np.array_equal(load_predictions(bundled.folder).score, trained.score)


def test_a_head_is_trained_alone_on_a_frozen_backbone(run_program, root: Path, tmp_path: Path) -> None:
    data = ["dataset=bccd", f"dataset.root={root}", "dataset.num_workers=0", "dataset.batch_size=2"]
    classifier = mtr_lab.create_model("vim_nano", img_size=(64, 96), depth=4, embed_dim=16)
    save_file(classifier.half().state_dict(), tmp_path / "classifier.safetensors")
    options = [*SMALL, *data, "training.epochs=1", "training.warmup_epochs=0", "training.lr=0.01"]
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
    """Three images in COCO's layout, each with a triangle."""
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
    run = run_program(train_main, *SMALL, *data, "dataset.batch_size=3", "training.epochs=1")
    assert run.code == 0, run.err
    assert "train_loss_mask" in json.loads((run.folder / "training.json").read_text())["final"]
    evaluation = run_program(evaluate_main, *EVALUATION, *data)
    assert evaluation.code == 0, evaluation.err
    assert read_result(evaluation.folder)["points"][1]["images"] == 3


def test_images_that_cannot_be_read_are_named_in_the_result(run_program, root: Path) -> None:
    (root / "JPEGImages" / f"{(root / 'ImageSets/Main/val.txt').read_text().split()[1]}.jpg").write_bytes(b"")
    data = ["dataset=bccd", f"dataset.root={root}", "dataset.num_workers=0"]
    assert run_program(evaluate_main, *EVALUATION, *data).code == 2
    run = run_program(evaluate_main, *EVALUATION, *data, "dataset.on_error=skip")
    assert run.code == 0, run.err
    assert all(len(point["skipped"]) == 1 and point["images"] == 3 for point in read_result(run.folder)["points"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["backbone=vim_ti", "backbone.pretrained=true"], "no weights for detection with vim_ti are bundled"),
        (["backbone.checkpoint=nowhere.safetensors"], r"nowhere\.safetensors does not exist"),
        (["backbone.checkpoint=CLASSIFIER"], "the dataset has 3 classes, the model 10"),
        (["task.anchors=[[8],[16]]"], "2 lists of anchors"),
        (["+task.depth=3"], r"unknown setting task\. 'depth'"),
        (["task.name=detecting"], r"unknown task\.name 'detecting'. Did you mean 'detection'"),
        (["task.masks=true"], r"dataset\.source=voc has boxes alone"),
        (["trainer.precision=bf16-true"], r"boxes need 32 bits\. Use trainer\.precision=bf16-mixed"),
        (["objective=top1"], "unknown objective 'top1'.*ap50, map"),
        (["dataset=imagenette_sample"], "dataset=imagenette_sample is not for task=detection"),
        (["dataset=bccd"], r"dataset 'bccd' needs a directory.*dataset\.root=DIR"),
        (["backbone.img_size=[60,96]"], "does not fit patches of 8"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(run_program, overrides: list[str], expected: str) -> None:
    classifier = str(resources.files("mtr_lab") / "assets" / "vim_nano.safetensors")
    run = run_program(evaluate_main, *EVALUATION, *(each.replace("CLASSIFIER", classifier) for each in overrides))
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    assert re.search(expected, run.err, re.DOTALL), run.err


def test_the_bundled_images_are_the_ones_their_rule_names() -> None:
    ids = (SAMPLE / "ImageSets/Main/val.txt").read_text().split()
    assert len(ids) == 20 == len(list((SAMPLE / "JPEGImages").glob("*.jpg")))
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*.*")) < 1_000_000
