"""Learning from a teacher: its targets, its share of the loss, and what is refused."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from mtr_lab.errors import UserError
from mtr_lab.tasks.classification.distillation import Teacher, check_teacher, distillation_loss, load_teacher
from mtr_lab.tasks.classification.task import Classification
from mtr_lab.train import main

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
SMALL = ["dataset.num_workers=0", "backbone.depth=2", "backbone.embed_dim=16", "backbone.img_size=32"]
SMALL += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "training.warmup_epochs=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of ten classes, stored as timm stores models."""
    torch.manual_seed(0)
    network: Any = timm.create_model("test_resnet", num_classes=10)
    network.pretrained_cfg = {
        **network.pretrained_cfg,
        "input_size": (3, 48, 48),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    folder = tmp_path_factory.mktemp("teacher")
    save_for_hf(network, str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled images as a training split."""
    root = tmp_path_factory.mktemp("images")
    (root / "train").symlink_to(SAMPLE)
    return root


def test_loss_is_the_divergence_from_the_softened_teacher() -> None:
    student, teacher = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.tensor([[2.0, 2.0], [4.0, 0.0]])
    target, own = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (target * (target / own).log()).sum(1).mean()
    assert torch.allclose(distillation_loss(student, teacher, 2.0), expected)
    assert distillation_loss(teacher, teacher, 3.0) == 0


def test_teacher_sees_the_image_in_its_own_size_and_normalisation(folder: Path) -> None:
    network = load_teacher(f"local-dir:{folder}", 10).eval()
    student = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    pixels = torch.rand(2, 3, 48, 48)
    normalised = (pixels - torch.tensor(student["mean"]).view(3, 1, 1)) / torch.tensor(student["std"]).view(3, 1, 1)
    logits = Teacher(network, student)(normalised)
    assert not logits.requires_grad
    assert torch.allclose(logits, network((pixels - 0.5) / 0.5), atol=1e-4)

    flat = torch.full((2, 3, 32, 32), 0.5)  # an even image stays one in any size
    assert torch.allclose(Teacher(network, student)(flat), Teacher(network, student)(torch.full((2, 3, 48, 48), 0.5)))


def test_a_student_learns_from_it_alone(
    run_program: Any, root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels_loss: list[float] = []
    cross_entropy = nn.functional.cross_entropy

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        loss = cross_entropy(*arguments, **options)
        labels_loss.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(nn.functional, "cross_entropy", recorded)
    options = [*SMALL, f"dataset.root={root}", "dataset.test_split=train", "dataset.batch_size=8", "training.epochs=1"]
    options += ["trainer.limit_train_batches=2", f"training.teacher=local-dir:{folder}", "training.distillation=1"]
    run = run_program(main, *options)
    assert run.code == 0, run.err
    assert {"model.safetensors", "last.ckpt"} <= {path.name for path in run.folder.iterdir()}
    checkpoint = torch.load(run.folder / "last.ckpt", weights_only=True)
    assert all(name.startswith("model.") for name in checkpoint["state_dict"])  # none of the teacher's
    loss = float((run.folder / "metrics.csv").read_text().splitlines()[1].split(",")[-1])
    assert abs(loss - sum(labels_loss) / len(labels_loss)) > 1e-3

    changed = [f"training.resume={run.folder / 'last.ckpt'}", "training.teacher=null"]
    refused = run_program(main, *options[:-1], *changed)
    assert refused.code == 2
    assert "training.teacher=None (there local-dir:" in refused.err
    assert "training.distillation=None (there 1)" in refused.err  # without a teacher it decides nothing


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.teacher=nowhere"], r"training\.teacher=nowhere: .*hf-hub:OWNER/NAME, or local-dir:FOLDER"),
        (["training.teacher=local-dir:/nowhere"], r"training\.teacher=local-dir:/nowhere: .*config\.json"),
        (["training.teacher=resnet18.nope"], r"training\.teacher=resnet18\.nope: Invalid pretrained tag"),
        (["training.teacher=local-dir:FOLDER", "dataset.root=TWO"], "has 10 classes and the student 2"),
        (
            ["experiment=tiny_imagenet", "trainer.cuda_graph=false"],
            r"teacher=local-dir:TEACHER: .*TEACHER/config\.json",
        ),
        (["training.distillation=2"], r"training\.distillation=2: expected a number from 0 to 1"),
        (["training.temperature=0"], r"training\.temperature=0: expected a number from 0\.1 to 100"),
        (["task=segmentation", "training.teacher=resnet18"], "only a classifier of images learns from a teacher"),
    ],
)
def test_what_cannot_teach_is_refused(
    run_program: Any, root: Path, folder: Path, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    for wnid in sorted(path.name for path in SAMPLE.iterdir() if path.is_dir())[:2]:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / "a.jpg").symlink_to(next((SAMPLE / wnid).iterdir()))
    overrides = [override.replace("FOLDER", str(folder)).replace("TWO", str(tmp_path)) for override in overrides]
    options = [] if "task=segmentation" in overrides else [*SMALL, f"dataset.root={root}", "dataset.test_split=train"]
    run = run_program(main, *options, "dataset.batch_size=2", *overrides)
    assert run.code == 2, run.err
    assert re.search(expected, run.err, re.DOTALL), run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("name", ["nowhere", "local-dir:/nowhere", "local-dir:GREY"])
def test_a_mistyped_teacher_is_found_before_the_student_is_built(
    run_program: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    network: Any = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (1, 48, 48), "mean": (0.5,), "std": (0.5,)}
    save_for_hf(network, str(tmp_path), safe_serialization=True)
    built: list[Any] = []
    monkeypatch.setattr(Classification, "training", lambda self, model, config: built.append(model))
    options = [*SMALL, f"dataset.root={root}", "dataset.test_split=train", "dataset.batch_size=2"]
    run = run_program(main, *options, f"training.teacher={name.replace('GREY', str(tmp_path))}")
    assert run.code == 2, run.err
    assert ("takes images of 1 channel, and the student's have 3" in run.err) == name.endswith("GREY")
    assert "training.teacher=" in run.err
    assert not built


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "tf_efficientnetv2_s_in21k", "hf-hub:a/b"])
def test_names_that_timm_knows_pass(name: str) -> None:
    check_teacher(name)  # the third is one that timm maps to another


def test_channels_are_those_of_the_loaded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    grey: Any = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    grey.pretrained_cfg = {**grey.pretrained_cfg, "input_size": (1, 48, 48)}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: grey)
    with pytest.raises(UserError, match=r"training\.teacher=hf-hub:a/b takes images of 1 channel"):
        load_teacher("hf-hub:a/b", 10)


def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"training\.teacher=local-dir:.*model\.safetensors"):
        load_teacher(f"local-dir:{tmp_path}", 10)
