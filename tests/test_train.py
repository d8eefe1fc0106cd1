"""``python -m mtr_lab.train`` on a few images: the files it writes, resuming and repeating it."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from safetensors.torch import load_file

import mtr_lab
from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.tasks.classification.training import ClassifierTraining
from mtr_lab.train import main
from mtr_lab.training.averaging import WeightEMA

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
SMALL = [
    "dataset.batch_size=4",
    "dataset.num_workers=0",
    "backbone.depth=3",
    "backbone.embed_dim=16",
    "backbone.img_size=48",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "training.warmup_epochs=0",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with six training and two evaluation images."""
    root = tmp_path_factory.mktemp("images")
    for wnid in sorted(p.name for p in SAMPLE.iterdir() if p.is_dir())[:3]:
        images = sorted((SAMPLE / wnid).iterdir())
        for split, chosen in (("train", images[:6]), ("val", images[6:8])):
            (root / split / wnid).mkdir(parents=True)
            for image in chosen:
                shutil.copy(image, root / split / wnid)
    return root


def test_training_writes_weights_that_evaluation_takes(run_program, root: Path, tmp_path: Path) -> None:
    run = run_program(main, *SMALL, f"dataset.root={root}", "training.epochs=2", "dataset.holdout=0.2")
    assert run.code == 0, run.err
    weights = run.folder / "model.safetensors"
    record = json.loads((run.folder / "training.json").read_text())
    assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["epochs"] == 2
    assert {"train_loss", "val_loss", "val_top1"} <= record["final"].keys()
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    assert (run.folder / "metrics.csv").read_text().count("\n") > 1

    kept = shutil.copy(weights, tmp_path / "kept.safetensors")
    last = shutil.copy(run.folder / "last.ckpt", tmp_path / "last.ckpt")
    for checkpoint, part in ((kept, None), (last, "state_dict: model.*")):
        evaluation = run_program(
            evaluate_main,
            *[override for override in SMALL if not override.startswith("training")],
            f"backbone.checkpoint={checkpoint}",
            "backbone.num_classes=3",
            "dataset=imagefolder",
            f"dataset.root={root}",
            "mtr.ratio=0",
            "timing.batch_size=0",
        )
        assert evaluation.code == 0, evaluation.err
        result = json.loads((evaluation.folder / "result.json").read_text())
        assert result["points"][0]["images"] == 6
        assert result["weights"]["part"] == part


def test_the_seed_fixes_the_weights(run_program, root: Path) -> None:
    digests = []
    for seed in (1, 1, 2):
        run = run_program(main, *SMALL, f"dataset.root={root}", "training.epochs=1", f"seed={seed}")
        digests.append(json.loads((run.folder / "training.json").read_text())["sha256"])
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("stops_at", "train_cache"), [("start", "null"), ("middle", "null"), ("middle", "device"), ("end", "null")]
)
def test_a_run_is_resumed_where_it_stopped(
    run_program, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: str, train_cache: str
) -> None:
    """Augmentation, mixup, stochastic depth and the average are those of an uninterrupted run, bit for bit."""
    options = [
        *SMALL,
        f"dataset.root={root}",
        "dataset.holdout=0.2",
        "backbone.drop_path_rate=0.3",
        "training.ema_decay=0.5",
        "training.epochs=2",
        f"dataset.train_cache={train_cache}",
    ]
    straight = run_program(main, *options)
    assert straight.code == 0, straight.err
    expected = load_file(straight.folder / "model.safetensors")

    def course(folder: Path) -> list[dict[str, str]]:
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        return [{name: value for name, value in row.items() if name != "img_per_s"} for row in rows]

    rows = course(straight.folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(float(row["lr"]) > 0 for row in rows)
    final = json.loads((straight.folder / "training.json").read_text())["final"]

    def stop(module: ClassifierTraining, *_: object) -> None:
        if module.current_epoch == 1 and (stops_at == "start" or module.global_step == 4):
            raise ConnectionError("interrupted")

    if stops_at != "end":  # else the run is resumed when there is nothing left to do
        shutil.rmtree(straight.folder)
        hook = "on_train_epoch_start" if stops_at == "start" else "on_train_batch_end"
        with monkeypatch.context() as patched:
            patched.setattr(ClassifierTraining, hook, stop)
            with pytest.raises(ConnectionError):
                run_program(main, *options)
        assert not (straight.folder / "model.safetensors").exists()
    last = shutil.copy(straight.folder / "last.ckpt", tmp_path / "last.ckpt")
    resumed = run_program(main, *options, f"training.resume={last}")
    assert resumed.code == 0, resumed.err
    assert ("has all epochs" if stops_at == "end" else "resuming after 1 of 2 epochs") in resumed.out
    record = json.loads((resumed.folder / "training.json").read_text())
    assert (record["epochs"], record["steps"]) == (2, 6)
    found = load_file(resumed.folder / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert {**record["final"], "img_per_s": 0} == {**final, "img_per_s": 0}
    assert course(resumed.folder) == rows


@pytest.mark.parametrize("train_cache", ["null", "device"])
def test_images_that_cannot_be_read_are_left_out_and_named(
    run_program, root: Path, tmp_path: Path, train_cache: str
) -> None:
    damaged = Path(shutil.copytree(root, tmp_path / "images"))
    broken = [sorted((damaged / "train").rglob("*.JPEG"))[i] for i in (0, 7)]
    for file in broken:
        file.write_bytes(b"damaged")
    options = [*SMALL, f"dataset.root={damaged}", "dataset.batch_size=6", "training.epochs=2"]
    options += [f"dataset.train_cache={train_cache}"]
    assert run_program(main, *options).code == 2
    run = run_program(main, *options, "dataset.on_error=skip")
    assert run.code == 0, run.err
    record = json.loads((run.folder / "training.json").read_text())
    assert record["skipped"] == [f"{file.parent.name}/{file.name}" for file in broken]
    assert record["steps"] == (6 if train_cache == "null" else 4)  # full batches of what could be read


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dataset.root=null"], r"imagefolder.*dataset\.root"),
        (["dataset.root=/nowhere"], "/nowhere"),
        (["training.resume=nowhere.ckpt"], r"training\.resume=nowhere\.ckpt does not exist"),
        (["training.epochs=0"], r"training\.epochs=0: expected an integer of at least 1"),
        (["training.lr=fast"], r"training\.lr=fast: expected a number from 0 to 10"),
        (["training.ema_decay=1.5"], r"training\.ema_decay=1\.5: expected a number from 0 to 1"),
        (["training.resume=JUNK"], r"training\.resume=.*junk\.ckpt is not the last\.ckpt of an earlier run"),
        (["+trainer.max_epochs=3"], r"trainer\.max_epochs cannot be set"),
        (["dataset.batch_size=5"], r"dataset\.batch_size=5: mixup and cutmix mix the images of a batch in pairs"),
        (["backbone.drop_path_rate=2"], r"drop_path_rate of vim_nano=2: expected a number from 0 to 0\.99"),
        (["dataset.train_cache=gpu"], "unknown dataset.train_cache 'gpu'.*device"),
        (["dataset.train_cache=device", "dataset.train_transform.re_prob=0.2"], r"does without .*\.re_prob=0\.2"),
        (["task=segmentation", "dataset.train_cache=device"], r"dataset\.train_cache: the chosen dataset has no such"),
        (["trainer.devices=2"], r"trainer\.devices=2 starts 2 processes.*Choose trainer=ddp"),
        (["trainer=ddp", "trainer.devices=3"], r"batch_size=4 is divided equally among 3 devices.*multiple of 3"),
        (["trainer=ddp", "trainer.devices=4"], r"mixup and cutmix mix the images.*a multiple of 8"),
        (["mtr.ratio=[0.2,0.3]"], r"mtr\.ratio=\[0\.2, 0\.3\]: training takes one ratio"),
        (["mtr.ratio=0.99"], r"mtr\.ratio=0\.99 is out of reach"),
        (["reduction=write"], r"reduction=write: give the share of the FLOPs to remove"),
        (["mtr.ratio=0.2", "mtr.schedule=auto"], r"mtr\.schedule=auto is measured on trained weights"),
        (["mtr.ratio=null", "mtr.schedule=[0,1,0]", "training.ratio_warmup_epochs=2"], "needs an mtr.ratio to rise to"),
        (["trainer.limit_train_batches=0"], r"trainer\.limit_train_batches=0 leaves nothing to do"),
        (["training.epoch=3"], "unknown key 'training.epoch'.*'training.epochs'"),
    ],
)
def test_mistakes_are_found_before_training(
    run_program, root: Path, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    junk = tmp_path / "junk.ckpt"
    junk.write_bytes(b"junk")
    overrides = [override.replace("JUNK", str(junk)) for override in overrides]
    run = run_program(main, *SMALL, f"dataset.root={root}", *overrides)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    assert re.search(expected, run.err, re.DOTALL), run.err


def test_a_checkpoint_of_another_model_is_not_resumed(run_program, root: Path, tmp_path: Path) -> None:
    options = [*SMALL, f"dataset.root={root}", "training.epochs=1"]
    last = shutil.copy(run_program(main, *options).folder / "last.ckpt", tmp_path / "last.ckpt")
    run = run_program(main, *options, f"training.resume={last}", "backbone.depth=4")
    assert run.code == 2
    assert re.search(r"last\.ckpt belongs to another model: 17 parameters differ, such as model\.layers\.3", run.err), (
        run.err
    )


def test_a_run_of_other_settings_is_not_resumed(run_program, root: Path, tmp_path: Path) -> None:
    options = [*SMALL, f"dataset.root={root}"]
    last = shutil.copy(run_program(main, *options, "training.epochs=1").folder / "last.ckpt", tmp_path / "last.ckpt")
    run = run_program(main, *options, f"training.resume={last}", "training.epochs=2", "mtr.ratio=0.1")
    assert run.code == 2
    assert "belongs to a run with other settings" in run.err
    assert "training.epochs=2 (there 1)" in run.err
    assert "mtr.ratio=0.1 (there None)" in run.err


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(run_program, root: Path, tmp_path: Path) -> None:
    torch.save({"current_model_state": {}, "settings": Payload(tmp_path / "ran")}, tmp_path / "last.ckpt")
    run = run_program(main, *SMALL, f"dataset.root={root}", f"training.resume={tmp_path / 'last.ckpt'}")
    assert run.code == 2
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_a_flipped_bit_is_not_resumed(run_program, root: Path, tmp_path: Path) -> None:
    """PyTorch reads it: a weight differs. The checksum in the file does, too."""
    options = [*SMALL, f"dataset.root={root}", "training.epochs=1"]
    last = run_program(main, *options).folder / "last.ckpt"
    weights = max(torch.load(last, weights_only=True)["current_model_state"].values(), key=torch.numel)
    content = bytearray(last.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 10] ^= 1
    (damaged := tmp_path / "last.ckpt").write_bytes(content)
    assert torch.load(damaged, weights_only=True)["epoch"] == 0
    run = run_program(main, *options, f"training.resume={damaged}")
    assert run.code == 2
    assert "does not have its checksums" in run.err
    assert len(run.err.splitlines()) == 1


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    run_program, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def full(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        if len([size for size in sizes if size > 10_000]) == 2:  # the second checkpoint
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = run_program(main, *SMALL, f"dataset.root={root}", "training.epochs=2")
    assert run.code == 1
    last = run.folder / "last.ckpt"
    line = f"mtr_lab: cannot write {last}: No space left on device. {last} has the finished epochs; continue with"
    assert run.err.startswith(line), run.err
    assert run.err.count("\n") == 1
    assert torch.load(run.folder / "last.ckpt", weights_only=True)["epoch"] == 0
    assert sorted(path.name for path in run.folder.iterdir() if path.name.startswith(".")) == [".hydra", ".lock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_its_code(
    run_program, root: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def end(module: ClassifierTraining) -> None:
        if module.current_epoch == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ClassifierTraining, "on_train_epoch_end", end)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have the signal ignored
    try:
        run = run_program(main, *SMALL, f"dataset.root={root}", "training.epochs=2")
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert run.code == 128 + number
    last = run.folder / "last.ckpt"
    line = f"mtr_lab: ended by {number.name}. {last} has the finished epochs; continue with training.resume={last}"
    assert line in run.err
    assert not (run.folder / "model.safetensors").exists()


def test_a_reduced_model_is_trained_and_its_weights_are_plain(
    run_program, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def noted(module: ClassifierTraining, batch: dict, index: int) -> None:
        used.append((module.training, module.model.reduction.schedule.reduction))

    monkeypatch.setattr(ClassifierTraining, "on_train_batch_start", noted)
    monkeypatch.setattr(ClassifierTraining, "on_validation_batch_start", noted)
    overrides = ["reduction=write", "mtr.ratio=0.3", "training.ratio_warmup_epochs=1", "training.epochs=2"]
    run = run_program(main, *SMALL, f"dataset.root={root}", "dataset.holdout=0.2", "backbone.depth=6", *overrides)
    assert run.code == 0, run.err
    assert "reduced by write at mtr.ratio=0.3" in run.out
    record = json.loads((run.folder / "training.json").read_text())["reduction"]
    assert (record["policy"], record["ratio"]) == ("write", 0.3)
    assert 0.3 <= record["reduction"] < 0.4
    assert 0.15 <= record["warmup"][0] < record["reduction"]
    (halfway,) = record["warmup"]
    assert [share for training, share in used if training] == [*[halfway] * 3, *[record["reduction"]] * 3]
    assert {share for training, share in used if not training} == {record["reduction"]}
    plain = mtr_lab.create_model("vim_nano", depth=6, embed_dim=16, img_size=48, num_classes=3)
    assert load_file(run.folder / "model.safetensors").keys() == plain.state_dict().keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_follow_the_ratio_of_the_epoch(run_program, root: Path) -> None:
    """With graphs and without, the same losses but for the precision; gradients are clipped, the optimizer is fused."""
    options = [*SMALL, f"dataset.root={root}", "trainer.accelerator=gpu", "dataset.train_cache=device"]
    options += ["backbone.depth=6", "training.mixup=0", "training.cutmix=0", "training.epochs=3", "dataset.holdout=0.2"]
    options += ["mtr.ratio=0.3", "training.ratio_warmup_epochs=1", "trainer.gradient_clip_val=1.0"]
    options += ["trainer.precision=bf16-mixed"]
    losses = []
    for graph in ("false", "true"):
        run = run_program(main, *options, f"trainer.cuda_graph={graph}")
        assert run.code == 0, run.err
        rows = csv.DictReader((run.folder / "metrics.csv").open())
        losses.append([float(row["train_loss"]) for row in rows])
        shutil.rmtree(run.folder)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class Counting(LightningModule):
    """A module with weights and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)


def test_the_average_of_the_weights_is_exponential_and_reads_nothing_from_the_device() -> None:
    module, ema, trainer = Counting(), WeightEMA(0.9), SimpleNamespace(global_step=0)
    ema.on_fit_start(trainer, module)
    expected = module.norm.bias.detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            module.norm.bias += 1
        module.norm.num_batches_tracked += 1
        trainer.global_step = step
        with pytest.MonkeyPatch.context() as patch:
            for read in ("__bool__", "item", "tolist"):
                patch.setattr(torch.Tensor, read, lambda tensor: pytest.fail("a wait"))
            ema.on_train_batch_end(trainer, module)
            ema.on_train_batch_end(trainer, module)  # gradients accumulate: no step
        expected = 0.9 * expected + 0.1 * module.norm.bias
    weights = module.norm.bias.detach().clone()
    ema.on_validation_epoch_start(trainer, module)
    torch.testing.assert_close(module.norm.bias, expected)
    assert module.norm.num_batches_tracked == 3
    ema.on_validation_epoch_end(trainer, module)
    assert torch.equal(module.norm.bias, weights)
    ema.on_fit_end(trainer, module)
    torch.testing.assert_close(module.norm.bias, expected)


def test_the_bundled_model_is_what_its_record_says() -> None:
    model = mtr_lab.create_model("vim_nano", pretrained=True)
    record = json.loads((Path(__file__).parent.parent / "experiments" / "vim_nano" / "training.json").read_text())
    assert model.weights["sha256"] == record["sha256"]
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
