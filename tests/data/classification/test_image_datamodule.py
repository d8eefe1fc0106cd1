"""Image folders: layouts, class mapping, hold-out by ids, messages for wrong configurations."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtr_lab.data import ImageDataModule, imagenet_classes
from mtr_lab.data.batches import ImageLoader
from mtr_lab.errors import UserError

Folders = Callable[..., Path]
Module = Callable[..., ImageDataModule]


def ids(loader: ImageLoader | list[ImageLoader]) -> list[str]:
    return [id for batch in loader for id in batch["id"]]


def test_bundled_sample_needs_nothing_and_meets_imagenet_weights(module: Module) -> None:
    data = module(
        root="pkg://mtr_lab/assets/imagenette_sample", model_classes=imagenet_classes(), num_classes=1000, batch_size=50
    )
    batches = list(data.test_dataloader())
    assert data.num_images == 500
    assert [batch["image"].shape[0] for batch in batches] == [50] * 10
    assert [batch["label"].unique().item() for batch in batches] == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert data.class_names == imagenet_classes()
    assert len({hash for batch in batches for hash in batch["hash"]}) == 500


def test_both_layouts_give_the_same_evaluation_images(folders: Folders, module: Module) -> None:
    root = folders("val", a=3, b=2)
    folders("train", a=1, b=1)
    split, flat = module(root=str(root)), module(root=str(root / "val"))
    assert split.num_images == flat.num_images == 5
    assert ids(split.test_dataloader()) == ids(flat.test_dataloader()) == [
        "a/0.jpg", "a/1.jpg", "a/2.jpg", "b/0.jpg", "b/1.jpg",
    ]  # fmt: skip
    assert split.class_names == ["a", "b"]


def test_other_split_names(folders: Folders, module: Module) -> None:
    folders("training", a=4)
    root = folders("validation", a=1)
    with pytest.raises(UserError, match=r"test_split=val:.*in training, validation"):
        module(root=str(root))
    data = module(root=str(root), train_split="training", test_split="validation")
    assert data.num_images == 1
    assert len(ids(data.train_dataloader())) == 4


def test_classes_called_train_and_val_are_classes(folders: Folders, module: Module) -> None:
    data = module(root=str(folders(train=1, val=1)))
    assert data.class_names == ["train", "val"]


def test_labels_are_the_outputs_of_the_model(folders: Folders, module: Module) -> None:
    folders("train", a=4, c=4)
    root = folders("val", a=1, b=1)
    data = module(root=str(root), model_classes=["c", "b", "a"], num_classes=3, batch_size=8)
    (test,) = data.test_dataloader()
    assert dict(zip(test["id"], test["label"].tolist(), strict=True)) == {"a/0.jpg": 2, "b/0.jpg": 1}
    (train,) = data.train_dataloader()
    assert {id[0]: label for id, label in zip(train["id"], train["label"].tolist(), strict=True)} == {"a": 2, "c": 0}


def test_new_names_for_class_folders(folders: Folders, module: Module) -> None:
    root = str(folders(parachute=1, tench=1))
    imagenet: dict[str, Any] = {"model_classes": imagenet_classes(), "num_classes": 1000}
    with pytest.raises(UserError, match=r"'parachute', 'tench'"):
        module(root=root, **imagenet)
    (batch,) = module(root=root, classes=["n03888257", "n01440764"], **imagenet).test_dataloader()
    assert batch["label"].tolist() == [701, 0]
    with pytest.raises(UserError, match=r"names 1 classes, the dataset has 2"):
        module(root=root, classes=["n03888257"], **imagenet)
    with pytest.raises(UserError, match=r"alphabetically.*Rename the class folders"):
        module(root=root, classes="imagenet-1k", **imagenet)
    with pytest.raises(UserError, match=r"unknown dataset\.classes 'imagenet1k'"):
        module(root=root, classes="imagenet1k", **imagenet)


def test_training_and_evaluation_have_to_number_classes_alike(folders: Folders, module: Module) -> None:
    folders("train", a=4, b=4, c=4)
    root = folders("val", a=1, b=1)
    with pytest.raises(UserError, match=r"differ in the classes c: .* they may be empty"):
        module(root=str(root)).setup("fit")
    folders("val", c=0)
    data = module(root=str(root), num_classes=3)
    data.setup("fit")
    assert data.class_names == ["a", "b", "c"]


@pytest.mark.parametrize("root", [None, "", "missing", "empty", "file"])
def test_root_without_images_is_found_at_construction(tmp_path: Path, module: Module, root: str | None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / root if root else None
    with pytest.raises(UserError) as raised:
        module(name="imagenet", root=None if path is None else str(path))
    message = str(raised.value)
    assert "DIR/val/<class>/<image>" in message
    assert "dataset=imagenette_sample" in message
    assert str(path) in message if path else "IMAGENET_DIR" in message


def test_relative_root_is_reported_in_full(tmp_path: Path, module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        module(root="nowhere")


def test_class_folders_without_images(tmp_path: Path, module: Module) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"no images in the class folders"):
        module(root=str(tmp_path))


def test_training_needs_a_training_split(folders: Folders, module: Module) -> None:
    root = folders("val", a=1)
    data = module(root=str(root))
    with pytest.raises(UserError, match=rf"{root / 'train'}.*DIR/train/<class>/<image>"):
        data.setup("fit")
    with pytest.raises(UserError, match=rf"{root / 'train'} holds no class folders"):
        module(root=str(root)).calibration_images(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "hdfs/imagenet"}, r"unknown dataset\.source 'hdfs/imagenet'"),
        ({"train_transform": {"auto_augmentation": "rand-m9"}}, r"'auto_augmentation'.*Did you mean 'auto_augment'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_option(folders: Folders, module: Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(root=str(folders(a=1)), **options)


def test_holdout_is_disjoint_and_depends_on_ids_alone(folders: Folders, module: Module) -> None:
    folders("train", a=60, b=60)
    root = folders("val", a=1, b=1, c=1)
    folders("train", c=0)
    data = module(root=str(root), holdout=0.25, batch_size=1)
    kept, held_out = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert set(kept).isdisjoint(held_out)
    assert len(kept) + len(held_out) == 120
    assert 15 <= len(held_out) <= 45
    folders("train", a=10, c=30)
    grown = module(root=str(root), holdout=0.25, batch_size=1, seed=7)
    assert [id for id in ids(grown.val_dataloader()) if not id.startswith("c/")] == held_out
    more = ids(module(root=str(root), holdout=0.5, batch_size=1).val_dataloader())
    assert set(held_out) < set(more)


def test_held_out_images_are_preprocessed_as_for_evaluation(folders: Folders, module: Module) -> None:
    root = folders("train", a=30)
    folders("val", a=1)
    data = module(root=str(root), holdout=0.5, train_transform={"re_prob": 1.0})
    evaluated = module(root=str(root), test_split="train").test_dataloader()
    pixels = {id: image for batch in evaluated for id, image in zip(batch["id"], batch["image"], strict=True)}
    for batch in data.val_dataloader():
        assert all(torch.equal(image, pixels[id]) for id, image in zip(batch["id"], batch["image"], strict=True))


def test_evaluation_is_the_same_every_time(folders: Folders, module: Module) -> None:
    root = str(folders(b=5, a=4, c=1))
    data = module(root=root, seed=3)
    runs = [list(data.test_dataloader()), list(data.test_dataloader()), list(module(root=root).test_dataloader())]
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert list(one["id"]) == list(other["id"])
            assert torch.equal(one["image"], other["image"])


def test_the_identity_is_of_the_images_wherever_they_lie(module: Module, folders: Folders, tmp_path: Path) -> None:
    root = folders("val", a=2, b=1)
    first = module(root=str(root)).fingerprint()
    copy = Path(shutil.copytree(root / "val", tmp_path / "copy"))  # keeps modification times
    assert module(root=str(copy)).fingerprint() == first
    os.utime(copy / "a" / "0.jpg", ns=(1, 1))
    changed = module(root=str(copy)).fingerprint()
    (copy / "a" / "1.jpg").rename(copy / "b" / "1.jpg")
    assert len({first, changed, module(root=str(copy)).fingerprint()}) == 3
