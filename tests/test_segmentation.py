"""``python -m mtr_lab task=segmentation`` and its training, end to end on a few of the bundled images."""

import json
import re
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.cli import run_program as run_hydra_program
from mtr_lab.report.predictions import load_predictions
from mtr_lab.report.result import read_result
from mtr_lab.report.segmentations import Segmentations, score_segmentations
from mtr_lab.tasks import task
from mtr_lab.train import train

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "camvid_sample"))
SMALL = [
    "task=segmentation",
    "task.width=16",
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
    names = sorted(path.stem for path in (SAMPLE / "val/images").iterdir())
    for split, chosen in (("train", names[:8]), ("val", names[8:12])):
        for kind, suffix in (("images", "jpg"), ("labels", "png")):
            folder = tmp_path / "camvid" / split / kind
            folder.mkdir(parents=True)
            for name in chosen:
                shutil.copy(SAMPLE / "val" / kind / f"{name}.{suffix}", folder)
    return tmp_path / "camvid"


def test_a_run_on_the_bundled_images(run_program) -> None:
    run = run_program(evaluate_main, *EVALUATION, "pictures=1", "timing.batch_size=2", "timing.seconds=0.1")
    assert run.code == 0, run.err
    result = read_result(run.folder)
    assert (result["task"], result["dataset"]) == ("segmentation", "camvid_sample")
    unreduced, reduced = result["points"]
    assert reduced["reduction"] >= 0.2
    assert reduced["flops_head"] == unreduced["flops_head"] > 0
    for point in result["points"]:
        assert point["images"] == 8
        assert 0 <= point["miou"] <= 1
        assert point["img_per_s"] > 0
    assert unreduced["miou_difference"] == 0
    predictions = load_predictions(run.folder)
    assert isinstance(predictions, Segmentations)
    assert predictions.points.tolist() == ["none@0", "mtr@0.2"]
    # Every pixel that has a class is in the matrices of both points.
    first = np.array(Image.open(SAMPLE / "val/labels" / f"{predictions.ids[0]}.png"))
    counts = np.bincount(first.flatten(), minlength=12)[:11]
    assert predictions.labels[0].tolist() == counts.tolist()
    assert (predictions.confusion.sum(-1) == predictions.labels).all()
    assert score_segmentations(predictions, 1)["miou"] == reduced["miou"]
    (picture,) = (run.folder / "pictures").iterdir()
    assert picture.name == f"000_{predictions.ids[0]}.png"
    assert Image.open(picture).width > 4 * 96


def test_sliding_windows_and_a_sweep(run_program, tmp_path: Path) -> None:
    square = [*EVALUATION[:-1], "backbone.img_size=[64,64]", "dataset.inference=slide", "trainer.limit_test_batches=1"]
    sweep = run_program(
        evaluate_main, "hydra.mode=MULTIRUN", *square, "mtr.ratio=0.1,0.2", f"hydra.sweep.dir={tmp_path / 'sweep'}"
    )
    assert sweep.code == 0, sweep.err
    results = [read_result(file) for file in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert sorted(result["unreduced"]["reused"] for result in results) == [False, True]
    run = run_program(evaluate_main, *square, "mtr.ratio=0.2", "pictures=2")
    alone, ids = read_result(run.folder), load_predictions(run.folder).ids
    pictures = sorted((run.folder / "pictures").iterdir())
    assert [picture.stem for picture in pictures] == [f"000_{ids[0]}", f"001_{ids[1]}"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    assert [point["miou"] for point in alone["points"]] == [point["miou"] for point in results[1]["points"]]


def test_training_writes_weights_that_evaluation_takes(run_program, root: Path, tmp_path: Path, monkeypatch) -> None:
    data = ["dataset=camvid", f"dataset.root={root}", "dataset.num_workers=0"]
    options = [*SMALL, *data, "dataset.batch_size=2", "dataset.holdout=0.4", "training.epochs=1"]
    run = run_program(train_main, *options, "training.warmup_epochs=0", "training.lr=0.01")
    assert run.code == 0, run.err
    record = json.loads((run.folder / "training.json").read_text())
    assert {"train_loss", "train_entropy", "train_dice", "val_miou"} <= record["final"].keys()
    weights = load_file(run.folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"backbone", "head"}
    kept = shutil.copy(run.folder / "model.safetensors", tmp_path / "vim_nano_camvid.safetensors")

    given = run_program(evaluate_main, *EVALUATION, *data, f"backbone.checkpoint={kept}")
    assert given.code == 0, given.err
    assert read_result(given.folder)["weights"]["sha256"] == record["sha256"]
    trained = load_predictions(given.folder)
    random = load_predictions(run_program(evaluate_main, *EVALUATION, *data).folder)
    assert not np.array_equal(trained.confusion, random.confusion)

    # The same file among the bundled ones is what a backbone with pretrained weights gets.
    monkeypatch.setattr(task, "ASSETS", tmp_path)
    bundled = run_program(evaluate_main, *EVALUATION, *data, "backbone.pretrained=true")
    assert bundled.code == 0, bundled.err
    assert np.array_equal(load_predictions(bundled.folder).confusion, trained.confusion)


def test_images_that_cannot_be_read_are_named_in_the_result(run_program, root: Path) -> None:
    damaged = sorted((root / "val/images").iterdir())[1]
    damaged.write_bytes(b"")
    data = ["dataset=camvid", f"dataset.root={root}", "dataset.num_workers=0"]
    assert run_program(evaluate_main, *EVALUATION, *data).code == 2
    run = run_program(evaluate_main, *EVALUATION, *data, "dataset.on_error=skip")
    assert run.code == 0, run.err
    assert all(point["skipped"] == [damaged.stem] for point in read_result(run.folder)["points"])
    assert all(point["images"] == 3 for point in read_result(run.folder)["points"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["backbone=vim_ti", "backbone.pretrained=true"], "no weights for segmentation with vim_ti are bundled"),
        (["backbone.checkpoint=nowhere.safetensors"], r"nowhere\.safetensors does not exist"),
        (["backbone.checkpoint=CLASSIFIER"], "the dataset has 11 classes, the model 10"),
        (["+task.widht=3"], r"unknown setting task\. 'widht'. Did you mean 'width'"),
        (["dataset=imagenette_sample"], "dataset=imagenette_sample is not for task=segmentation"),
        (["task.restoration=zero"], "unknown restoration 'zero'"),
        (["trainer.cuda_graph=true"], r"trainer\.cuda_graph=true"),
        (["objective=top1"], "unknown objective 'top1'.*miou"),
        (["dataset=camvid"], r"dataset 'camvid' needs a directory.*dataset\.root=DIR"),
        (["dataset.classes=[sky,building]"], r"has the label \d+: expected 0 to 1, or 11 to ignore"),
        (["backbone.img_size=[60,96]"], "does not fit patches of 8"),
    ],
)
def test_mistakes_end_with_one_message(run_program, overrides: list[str], expected: str) -> None:
    classifier = str(resources.files("mtr_lab") / "assets" / "vim_nano.safetensors")
    run = run_program(evaluate_main, *EVALUATION, *(each.replace("CLASSIFIER", classifier) for each in overrides))
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    assert re.search(expected, run.err, re.DOTALL), run.err
