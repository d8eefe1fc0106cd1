"""``python -m mtr_lab``: what it writes, and what it says when something is wrong."""

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import SMALL

from mtr_lab import create_model
from mtr_lab.__main__ import main
from mtr_lab.report.predictions import load_predictions
from mtr_lab.report.result import read_result

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))


def test_a_run_writes_every_point_of_the_contract(run_program) -> None:
    run = run_program(main, *SMALL, "mtr.ratio=[0.2,0.3]")
    assert run.code == 0, run.err
    result = read_result(run.folder)
    assert [(p["policy"], p["ratio"]) for p in result["points"]] == [("none", 0.0), ("mtr", 0.2), ("mtr", 0.3)]
    unreduced, *reduced = result["points"]
    assert unreduced["agreement"] == 1
    assert unreduced["kl"] == 0
    for point in reduced:
        assert point["ratio"] <= point["reduction"] < point["ratio"] + 0.02
        assert point["reduction"] == pytest.approx(1 - point["flops_true"] / unreduced["flops_true"])
        assert point["flops_reduction"] > 0
        assert point["images"] == 8
        assert point["top1_ci"][0] <= point["top1"] <= point["top1_ci"][1]
    predictions = load_predictions(run.folder)
    assert predictions.log_probs.shape == (3, 8, 10)
    assert np.allclose(np.exp(predictions.log_probs).sum(-1), 1, atol=1e-5)
    assert str(run.folder / "result.json") in run.out
    assert (run.folder / ".hydra" / "config.yaml").exists()


def test_two_runs_are_the_same_to_the_last_digit(run_program) -> None:
    first = load_predictions(run_program(main, *SMALL).folder)
    second = load_predictions(run_program(main, *SMALL, "resume=false").folder)
    assert np.array_equal(first.log_probs, second.log_probs)


def test_timing_is_reported_for_every_point(run_program) -> None:
    run = run_program(main, *SMALL, "timing.batch_size=3", "timing.seconds=0.1", "mtr.ratio=0.2")
    for point in read_result(run.folder)["points"]:
        assert point["img_per_s"] > 0
        assert point["latency_ms"]["p50"] <= point["latency_ms"]["p95"]
        assert point["peak_mib"] > 0


def image_folder(root: Path, wnids: list[str], images: int) -> Path:
    """Class folders with a few of the bundled images each."""
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for image in sorted((SAMPLE / wnid).iterdir())[:images]:
            shutil.copy(image, root / wnid)
    return root


def test_imagenet_models_are_scored_by_class_name(run_program, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", ["n01440764", "n03888257"], 4)
    data = ("dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0")
    run = run_program(main, *SMALL, "backbone=vim_ti", "backbone.img_size=64", *data, "mtr.ratio=0")
    assert run.code == 0, run.err
    assert read_result(run.folder)["dataset"] == "imagefolder"
    predictions = load_predictions(run.folder)
    assert predictions.labels.tolist() == [0] * 4 + [701] * 4  # tench and parachute among the 1000
    assert predictions.log_probs.shape[-1] == 1000


def test_explicit_counts_instead_of_a_ratio(run_program) -> None:
    run = run_program(main, *SMALL, "mtr.schedule=[10,20,0,0,0,0]", "mtr.ratio=null")
    assert run.code == 0, run.err
    point = read_result(run.folder)["points"][1]
    assert point["ratio"] is None
    assert point["tokens"] == [197, 187, 167, 167, 167, 167]


def test_skipped_images_are_counted_and_named(run_program, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", sorted(p.name for p in SAMPLE.iterdir() if p.is_dir()), 2)
    broken = sorted(root.rglob("*.JPEG"))[1]
    broken.write_bytes(broken.read_bytes()[:200])
    data = ("dataset=imagefolder", f"dataset.root={root}", "trainer.limit_test_batches=1.0", "dataset.num_workers=0")

    refused = run_program(main, *SMALL, *data)
    assert refused.code == 2
    assert broken.name in refused.err
    assert "dataset.on_error=skip" in refused.err
    assert "Traceback" not in refused.err

    run = run_program(main, *SMALL, *data, "dataset.on_error=skip", "mtr.ratio=0")
    (point,) = read_result(run.folder)["points"]
    assert point["images"] == 19
    assert [Path(file).name for file in point["skipped"]] == [broken.name]
    assert broken.name in run.out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["backbone=vim_xs"], ["unknown backbone 'vim_xs'", "vim_s"]),
        (["reduction=mtrr"], ["unknown reduction 'mtrr'", "'mtr'"]),
        (["dataset=imagnet"], ["unknown dataset 'imagnet'", "'imagenet'"]),
        (["mtr.ratoi=0.3"], ["unknown key 'mtr.ratoi'", "'mtr.ratio'"]),
        (["backbon=vim_s"], ["unknown key 'backbon'", "'backbone'"]),
        (["mtr.policy=hsa"], ["mtr.policy=hsa only names the result: choose with reduction=, now mtr"]),
        (["mtr.score=dleta"], ["unknown mtr.score 'dleta'", "'delta'"]),
        (["mtr.ratio=1.2"], ["mtr.ratio must be a share", "[0, 1)", "got 1.2"]),
        (["mtr.ratio=-0.1"], ["mtr.ratio must be a share", "got -0.1"]),
        (["mtr.ratio=many"], ["mtr.ratio must be a share", "got 'many'"]),
        (["mtr.ratio=false"], ["mtr.ratio must be a share", "got False"]),
        (["mtr.ratio=0.97"], ["out of reach", "at most 0."]),
        (["mtr.ratio="], ["mtr.ratio must be a share", "got ''"]),
        (["mtr.ratio=[0.2"], ["cannot parse the override 'mtr.ratio=[0.2'"]),
        (["+mtr.unknown=1"], ["unknown key 'mtr.unknown'"]),
        (["+foo=1"], ["unknown key 'foo'"]),
        (["~mtr.score"], ["the key mtr.score is missing"]),
        (["experiment=vim_nan"], ["unknown experiment 'vim_nan'", "'vim_nano'"]),
        (["dataset=null"], ["Config group override must be a string"]),
        (["mtr.schedule=[0,3,0]"], ["set mtr.ratio=null"]),
        (["mtr.interval=two"], ["mtr.interval must be", "'two'"]),
        (["dataset=imagefolder", "dataset.root=/nowhere"], ["/nowhere", "<class>", "dataset=imagenette_sample"]),
        (["backbone=vim_s"], ["imagenet", "dataset.root", "dataset=imagenette_sample"]),
        (["dataset.on_error=ignore"], ["unknown dataset.on_error 'ignore'"]),
        (["dataset.on_error=null"], ["unknown dataset.on_error 'None'"]),
        (["dataset.batch_size=0"], ["dataset.batch_size=0: expected an integer of at least 1"]),
        (["dataset.batch_size=many"], ["dataset.batch_size=many: expected an integer"]),
        (["dataset.holdout=abc"], ["dataset.holdout=abc: expected a number from 0 to 0.99"]),
        (["dataset.root=5", "dataset=imagefolder"], ["5 is not a directory"]),
        (["dataset.train_transform=3"], ["dataset.train_transform=3: expected a mapping"]),
        (["+dataset.num_classes=10"], ["dataset.num_classes cannot be set"]),
        (["ops.backend=cuda"], ["unknown ops.backend 'cuda'", "mamba_ssm"]),
        (["backbone.checkpoint=nowhere.pth"], ["nowhere.pth does not exist"]),
        (["backbone.checkpoint=hf://a..b/--c/f"], ["cannot download f from a..b/--c"]),
        (["backbone.name=null"], ["unknown backbone 'None'"]),
        (["backbone.embed_dim=0"], ["embed_dim of vim_nano=0: expected an integer of at least 1"]),
        (["backbone.img_size=115"], ["image height 115 does not fit", "112 or 120"]),
        (["backbone.img_size=big"], ["img_size of vim_nano=big: expected an integer"]),
        (["backbone.num_classes=7"], ["the dataset has 10 classes", "the model 7 outputs"]),
        (["backbone.num_classes=0"], ["backbone.num_classes=0: expected an integer of at least 1"]),
        (["trainer.accelerator=abacus"], ["trainer: You selected an invalid accelerator name", "abacus"]),
        (["trainer.devices=0"], ["trainer: ", "devices=0"]),
        (["trainer.accelerator=cpu", "trainer.devices=2"], ["trainer.devices=2 starts 2 processes"]),
        (["trainer.precision=3"], ["trainer: Precision 3 is invalid"]),
        (["trainer.limit_test_batches=0"], ["trainer.limit_test_batches=0 leaves nothing to do"]),
        (["trainer.limit_test_batches=0.0001"], ["limit_test_batches=0.008"]),
        (["dataset.root=${nothing}"], ["Interpolation key 'nothing' not found"]),
        (["timing.batch_size=-1"], ["timing.batch_size=-1: expected an integer of at least 0"]),
        (["timing.seconds=many"], ["timing.seconds=many: expected a number"]),
        (["seed=-1"], ["seed=-1: expected an integer from 0"]),
        (["hydra.run.dir=/dev/null/x"], ["cannot write the run folder", "/dev/null/x"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message_and_code_2(run_program, overrides: list[str], expected: list[str]) -> None:
    run = run_program(main, *SMALL, *overrides)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    for text in expected:
        assert text in run.err
    assert not (run.folder / "result.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_an_absent_device_is_refused(run_program) -> None:
    run = run_program(main, *SMALL, "trainer.accelerator=gpu")
    assert run.code == 2
    assert "no CUDA device is present" in run.err
    assert "trainer.accelerator=cpu" in run.err


def test_mistakes_are_found_before_weights_are_loaded(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mtr_lab.backbones.weights.load_weights", load)
    small = [override for override in SMALL if "pretrained" not in override]
    for mistake in ("mtr.ratio=0.97", "mtr.score=nothing"):
        assert run_program(main, *small, mistake).code == 2
    assert run_program(main, *small, "dataset=imagefolder", "dataset.root=/nowhere").code == 2


def test_outputs_that_are_not_numbers_are_no_predictions(run_program, tmp_path: Path) -> None:
    model = create_model("vim_nano", depth=6, embed_dim=16)
    torch.nn.init.constant_(model.head.weight, torch.inf)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    run = run_program(main, *SMALL, f"backbone.checkpoint={tmp_path / 'w.pth'}", "mtr.ratio=0")
    assert run.code == 2
    assert "outputs at none@0 are infinite or not a number for 8 of 8 images" in run.err
    assert not (run.folder / "result.json").exists()


def test_csv_and_tensorboard_and_offline_wandb(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for logger, files in (("csv", "*.csv"), ("tensorboard", "events*"), ("wandb", "*.wandb")):
        run = run_program(main, *SMALL, f"logger={logger}", "mtr.ratio=0")
        assert run.code == 0, run.err
        assert list(run.folder.rglob(files)), f"{logger} wrote nothing"
    assert json.loads((run.folder / "result.json").read_text())["config"]["logger"]["wandb"]["project"] == "mtr_lab"
