"""``python -m mtr_lab.train`` on a few images: the files it writes, resuming and repeating it."""

import hashlib
import json
import re
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mtr_lab
from mtr_lab.__main__ import main as evaluate_main
from mtr_lab.tasks.classification.training import ClassifierTraining
from mtr_lab.train import main
from mtr_lab.training import WeightEMA

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
    evaluation = run_program(
        evaluate_main,
        *[override for override in SMALL if not override.startswith("training")],
        f"backbone.checkpoint={kept}",
        "backbone.num_classes=3",
        "dataset=imagefolder",
        f"dataset.root={root}",
        "mtr.ratio=0",
        "timing.batch_size=0",
    )
    assert evaluation.code == 0, evaluation.err
    (point,) = json.loads((evaluation.folder / "result.json").read_text())["points"]
    assert point["images"] == 6


def test_the_seed_fixes_the_weights(run_program, root: Path) -> None:
    digests = []
    for seed in (1, 1, 2):
        run = run_program(main, *SMALL, f"dataset.root={root}", "training.epochs=1", f"seed={seed}")
        digests.append(json.loads((run.folder / "training.json").read_text())["sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_a_run_is_resumed_where_it_stopped(
    run_program, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs in one run or in two runs result in the same weights, bit for bit."""
    options = [  # without augmentation, whose random numbers are not part of the state
        *SMALL,
        f"dataset.root={root}",
        "dataset.train_transform.scale=[1,1]",
        "+dataset.train_transform.ratio=[1,1]",
        "dataset.train_transform.hflip=0",
        "dataset.train_transform.color_jitter=0",
        "training.mixup=0",
        "training.cutmix=0",
        "training.ema_decay=0",  # the weights themselves: their average has barely moved
        "training.epochs=2",
    ]
    straight = run_program(main, *options)
    assert straight.code == 0, straight.err
    expected = load_file(straight.folder / "model.safetensors")

    def stop(module: ClassifierTraining) -> None:
        if module.current_epoch == 1:
            raise ConnectionError("interrupted")

    shutil.rmtree(straight.folder)
    with monkeypatch.context() as patched:
        patched.setattr(ClassifierTraining, "on_train_epoch_start", stop)
        with pytest.raises(ConnectionError):
            run_program(main, *options)
    assert not (straight.folder / "model.safetensors").exists()
    last = shutil.copy(straight.folder / "last.ckpt", tmp_path / "last.ckpt")
    resumed = run_program(main, *options, f"training.resume={last}")
    assert resumed.code == 0, resumed.err
    record = json.loads((resumed.folder / "training.json").read_text())
    assert (record["epochs"], record["steps"]) == (2, 8)
    found = load_file(resumed.folder / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    halfway = torch.load(last, weights_only=False)["state_dict"]
    assert not torch.equal(halfway["model.head.weight"].half(), expected["head.weight"])


def test_images_that_cannot_be_read_are_left_out_and_named(run_program, root: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(root, tmp_path / "images"))
    broken = [sorted((damaged / "train").rglob("*.JPEG"))[i] for i in (0, 7)]
    for file in broken:
        file.write_bytes(b"damaged")
    options = [*SMALL, f"dataset.root={damaged}", "dataset.batch_size=6", "training.epochs=2"]
    assert run_program(main, *options).code == 2
    run = run_program(main, *options, "dataset.on_error=skip")
    assert run.code == 0, run.err
    record = json.loads((run.folder / "training.json").read_text())
    assert record["skipped"] == [f"{file.parent.name}/{file.name}" for file in broken]
    assert record["steps"] == 6


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
        (["trainer.devices=2"], r"trainer\.devices=2 starts 2 processes"),
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
    assert re.search(r"last\.ckpt is of another model: 17 parameters differ, model\.layers\.3", run.err), run.err


def test_the_average_of_the_weights_is_exponential_and_reads_nothing_from_the_device() -> None:
    torch.manual_seed(0)
    model = torch.nn.BatchNorm1d(3)
    module = ClassifierTraining(  # of anything
        mtr_lab.create_model("vim_nano", depth=1, embed_dim=16), lr=1e-3, weight_decay=0, warmup_epochs=0,
        label_smoothing=0, mixup=0, cutmix=0,
    )  # fmt: skip
    module.model.extra = model
    ema = WeightEMA(0.9, torch.device("cpu"))
    ema.setup(None, module, "fit")  # type: ignore[arg-type]
    average = ema._average_model
    assert average is not None
    expected, bias = model.bias.detach().clone(), average.module.model.extra.bias
    for step in range(3):
        with torch.no_grad():
            model.bias += 1
        model.num_batches_tracked += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", lambda tensor: pytest.fail("a wait"))
            average.update_parameters(module)
        expected = 0.9 * expected + 0.1 * model.bias
        torch.testing.assert_close(bias, expected)
        assert average.module.model.extra.num_batches_tracked == step + 1


def test_the_bundled_model_is_what_its_record_says() -> None:
    model = mtr_lab.create_model("vim_nano", pretrained=True)
    record = json.loads((Path(__file__).parent.parent / "experiments" / "vim_nano" / "training.json").read_text())
    assert model.weights["sha256"] == record["sha256"]
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
