"""``task=video``: evaluation and training of small models, end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.results.classifications import VideoClassifications
from mtr_lab.results.metrics import score
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.tasks.task import ASSETS
from mtr_lab.tasks.video.head import StandardisedHead
from mtr_lab.train import main as train_main

SAMPLE = ASSETS / "motion_sample"
SMALL = ["task=video", "backbone.depth=4", "backbone.embed_dim=16", "backbone.patch_size=16", "backbone.stride=16"]
MODEL = [*SMALL, "backbone.pretrained=false", "trainer.accelerator=cpu", "mtr.ratio=0.1"]
EVALUATION = [*MODEL, "timing.batch_size=0"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two clips of each of the ten classes, in class folders."""
    for file in SAMPLE.rglob("000[01]?.gif"):
        (tmp_path / "data" / "val" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "data" / "val" / file.parent.name)
    return tmp_path / "data"


def test_the_bundled_model_needs_nothing(run_program) -> None:
    run = run_program(evaluate_main, "task=video", "trainer.accelerator=cpu", "timing.batch_size=0", "mtr.ratio=0.2")
    assert run.code == 0, run.err
    unreduced, _ = read_result(run.folder)["points"]
    assert unreduced["images"] == 50
    assert unreduced["top1"] >= 0.96  # 0.98, and one clip for rounding


def test_a_run_on_the_bundled_clips(run_program) -> None:
    run = run_program(
        evaluate_main,
        *(*MODEL, "reduction=fovea", "trainer.limit_test_batches=2"),
        *("pictures=1", "timing.batch_size=2", "timing.seconds=0.1"),
    )
    assert run.code == 0, run.err
    result = read_result(run.folder)
    assert (result["task"], result["dataset"]) == ("video", "motion_sample")
    unreduced, reduced = result["points"]
    assert unreduced["tokens"][0] == 4 * 3 * 3 + 1
    assert reduced["reduction"] >= 0.1
    predictions = load_predictions(run.folder)
    assert isinstance(predictions, VideoClassifications)
    assert sorted(np.bincount(predictions.labels)) == [5] * 4
    for i, point in enumerate(result["points"]):
        assert point["images"] == 20
        assert point["img_per_s"] > 0
        assert point["balanced_accuracy"] == pytest.approx(point["top1"])  # as many clips of each class
        assert score(predictions, i)["kl"] == point["kl"]
    pictures = sorted((run.folder / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["000_00000.gif", "000_00000.png", "000_00000.svg"]
    assert Image.open(pictures[0]).n_frames == 16


def test_views_are_averaged_and_a_cache_changes_nothing(run_program, videos: Path, tmp_path: Path) -> None:
    folders = [
        *EVALUATION,
        "dataset=videos",
        f"dataset.root={videos}",
        "dataset.num_workers=0",
        "backbone.num_frames=4",
    ]
    views = [*folders, "dataset.clips=2", "dataset.crops=2", "backbone.img_size=32"]
    plain = load_predictions(run_program(evaluate_main, *views).folder)
    assert len(plain.ids) == 20
    cached = [*views, f"dataset.cache={tmp_path / 'cache'}", "dataset.batch_size=7"]
    for _ in range(2):
        again = load_predictions(run_program(evaluate_main, *cached, "resume=false").folder)
        np.testing.assert_allclose(again.log_probs, plain.log_probs, atol=1e-5)
    one = load_predictions(run_program(evaluate_main, *views, "dataset.clips=1").folder)
    assert np.abs(one.log_probs - plain.log_probs).max() > 1e-4


def test_unreadable_videos_fail_or_are_skipped(run_program, videos: Path) -> None:
    (videos / "val" / "up" / "broken.mp4").write_text("no video")
    Image.new("RGB", (8, 8)).save(videos / "val" / "up" / "short.gif")
    run = [*EVALUATION, "dataset=videos", f"dataset.root={videos}", "dataset.num_workers=0"]
    failed = run_program(evaluate_main, *run)
    assert failed.code == 2
    assert "cannot read the video up/broken.mp4" in failed.err
    skipping = run_program(evaluate_main, *run, "dataset.on_error=skip")
    assert skipping.code == 0, skipping.err
    assert read_result(skipping.folder)["points"][0]["skipped"] == ["up/broken.mp4", "up/short.gif"]
    (videos / "val" / "up" / "broken.mp4").unlink()
    short = run_program(evaluate_main, *run)
    assert "up/short.gif" in short.err
    assert "it has one frame and a clip takes 16" in short.err


def test_the_standardised_head_is_folded_into_a_linear_layer() -> None:
    head = StandardisedHead(torch.nn.Linear(5, 3))
    features = 0.1 * torch.randn(64, 5) + torch.arange(5)
    trained = head.train()(features)
    assert (trained.std(0) > 3 * head.linear(features).std(0)).all()
    expected = head.eval()(features)
    torch.testing.assert_close(head.folded()(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train_cache", ["null", "device"])
def test_training_writes_weights_that_evaluation_reads(run_program, tmp_path: Path, train_cache: str) -> None:
    generated = ["dataset=motion", "dataset.count=[40,20]", "dataset.num_workers=0", "dataset.batch_size=8"]
    small = [
        *SMALL,
        *generated,
        "backbone.num_frames=8",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
    ]
    training = ["training.epochs=1", "training.warmup_epochs=0", "trainer.limit_train_batches=2", "dataset.holdout=0.2"]
    run = run_program(train_main, *small, *training, f"dataset.train_cache={train_cache}")
    assert run.code == 0, run.err
    weights = shutil.copy(run.folder / "model.safetensors", tmp_path)
    record = json.loads((run.folder / "training.json").read_text())
    assert record["steps"] == 2
    assert 0 <= record["final"]["val_top1"] <= 1
    evaluated = run_program(
        evaluate_main,
        *small,
        f"backbone.checkpoint={weights}",
        "timing.batch_size=0",
        "reduction=frames",
        "mtr.ratio=0.3",
    )
    assert evaluated.code == 0, evaluated.err
    result = read_result(evaluated.folder)
    assert result["weights"]["sha256"] == record["sha256"]
    assert result["points"][1]["resolution"] == [4, 48, 48]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["task=video", "backbone=videomamba_ti", "backbone.pretrained=false"],
            "task=video needs a model that takes videos",
        ),
        (["backbone=videomamba_ti", "backbone.num_frames=4"], "task=classification takes images"),
        ([*EVALUATION, "dataset=videos"], "needs a directory of videos: set dataset.root=DIR"),
        ([*EVALUATION, "dataset=imagenette_sample"], "is for task=classification, not for task=video"),
        ([*EVALUATION, "dataset.clips=0"], "dataset.clips"),
        ([*EVALUATION, "dataset.source=mp4"], "unknown dataset.source 'mp4'"),
    ],
)
def test_mistakes_get_one_sentence(run_program, overrides: list[str], message: str) -> None:
    run = run_program(evaluate_main, *overrides)
    assert run.code == 2
    assert message in " ".join(run.err.split())
    assert "Traceback" not in run.err
