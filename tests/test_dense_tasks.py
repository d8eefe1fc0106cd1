"""Every dense task: trained weights are evaluated, and a mistake ends with one message."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_dense import DATA, QUICK, SMALL

import mtr_lab
from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.tasks import task
from mtr_lab.train import main as train_main


@pytest.mark.slow
@pytest.mark.parametrize(("name", "metric", "least"), [("segmentation", "miou", 0.5), ("detection", "ap50", 0.7)])
def test_the_bundled_weights_are_those_of_the_task(run_program, name: str, metric: str, least: float) -> None:
    """A few bundled images, without a download; the figures of the whole sets are in assets/README.md."""
    quick = ["trainer.limit_test_batches=1", "mtr.ratio=0.3", "reduction=write", "timing.batch_size=0"]
    run = run_program(evaluate_main, f"task={name}", *quick)
    assert run.code == 0, run.err
    unreduced, reduced = read_result(run.folder)["points"]
    assert unreduced[metric] > least
    assert reduced[metric] > least - 0.1


@pytest.mark.parametrize(
    ("name", "bundled", "found", "figures"),
    [
        ("detection", "bccd", "score", {"train_loss", "train_loss_box_reg", "val_map", "val_ap50"}),
        ("segmentation", "camvid", "confusion", {"train_loss", "train_entropy", "train_dice", "val_miou"}),
    ],
)
def test_training_writes_weights_that_evaluation_takes(
    run_program, tmp_path: Path, monkeypatch, name: str, bundled: str, found: str, figures: set[str]
) -> None:
    options = [*SMALL[name], *DATA[name](tmp_path / "data")]
    training = ["dataset.batch_size=2", "dataset.holdout=0.4", "training.epochs=1", "training.warmup_epochs=0"]
    run = run_program(train_main, *options, *training, "training.lr=0.01")
    assert run.code == 0, run.err
    record = json.loads((run.folder / "training.json").read_text())
    assert figures <= record["final"].keys()
    weights = load_file(run.folder / "model.safetensors")
    assert {key.split(".")[0] for key in weights} == {"backbone", "head"}
    kept = shutil.copy(run.folder / "model.safetensors", tmp_path / f"vim_nano_{bundled}.safetensors")

    def evaluated(*overrides: str) -> np.ndarray:
        run = run_program(evaluate_main, *options, *QUICK, *overrides)
        assert run.code == 0, run.err
        return getattr(load_predictions(run.folder), found)

    trained = evaluated(f"backbone.checkpoint={kept}")
    assert read_result(run.folder)["weights"]["sha256"] == record["sha256"]
    assert not np.array_equal(trained[:5], evaluated("seed=1")[:5])
    last = shutil.copy(run.folder / "last.ckpt", tmp_path / "last.ckpt")
    evaluated(f"backbone.checkpoint={last}", "backbone.checkpoint_key=current_model_state")
    assert read_result(run.folder)["weights"]["part"] == "current_model_state: model.*"
    # The same file among the bundled ones is what a backbone with pretrained weights gets.
    monkeypatch.setattr(task, "ASSETS", tmp_path)
    assert np.array_equal(evaluated("backbone.pretrained=true"), trained)


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_a_head_is_trained_on_a_classifier_as_its_authors_store_it(run_program, tmp_path: Path, name: str) -> None:
    options = [*SMALL[name], *DATA[name](tmp_path / "data")]
    authors = mtr_lab.create_model("vim_nano", img_size=64, depth=4, embed_dim=16).state_dict()
    torch.save({"model": authors}, tmp_path / "authors.pth")
    training = ["dataset.batch_size=2", "training.epochs=1", "training.warmup_epochs=0", "training.lr=1e-9"]
    run = run_program(train_main, *options, *training, f"backbone.checkpoint={tmp_path / 'authors.pth'}")
    assert run.code == 0, run.err
    trained = load_file(run.folder / "model.safetensors")
    kept = {key: value for key, value in authors.items() if key != "pos_embed" and not key.startswith("head")}
    for key, value in kept.items():
        torch.testing.assert_close(trained[f"backbone.{key}"].float(), value, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "images"), [("detection", "JPEGImages"), ("segmentation", "val/images")])
def test_images_that_cannot_be_read_are_named_in_the_result(
    run_program, tmp_path: Path, name: str, images: str
) -> None:
    options = [*SMALL[name], *QUICK, *DATA[name](tmp_path / "data")]
    evaluated = load_predictions(run_program(evaluate_main, *options).folder).ids
    (tmp_path / "data" / images / f"{evaluated[1]}.jpg").write_bytes(b"")
    assert run_program(evaluate_main, *options).code == 2
    run = run_program(evaluate_main, *options, "dataset.on_error=skip")
    assert run.code == 0, run.err
    for point in read_result(run.folder)["points"]:
        assert (point["skipped"], point["images"]) == ([evaluated[1]], 3)


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        ("detection", "objective=top1", "unknown objective 'top1'.*ap50, map"),
        ("detection", "task.anchors=[[8],[16]]", "2 lists of anchors"),
        ("segmentation", "objective=top1", "unknown objective 'top1'.*miou"),
        ("segmentation", "dataset.classes=[sky,building]", r"has the label \d+: expected 0 to 1, or 11 to ignore"),
    ],
)
def test_mistakes_end_with_one_message(run_program, name: str, override: str, expected: str) -> None:
    run = run_program(evaluate_main, *SMALL[name], *QUICK, override)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    assert re.search(expected, run.err, re.DOTALL), run.err
