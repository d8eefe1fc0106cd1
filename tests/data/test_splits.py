"""All data modules: hold-out, order, calibration images, unreadable images, invalid options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtr_lab.data import DetectionDataModule, ImageDataModule, SegmentationDataModule
from mtr_lab.errors import UserError

TRAINING, EVALUATION = [f"t{i:02}" for i in range(12)], ["v0", "v1", "v2"]
Module = Callable[..., Any]


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, path.stem)))
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def class_folders(root: Path) -> dict[str, Any]:
    for split, names in (("train", TRAINING), ("val", EVALUATION)):
        for name in names:
            write_image(root / split / "thing" / f"{name}.jpg")
    return {"kind": ImageDataModule}


def voc(root: Path) -> dict[str, Any]:
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for split, names in (("train", TRAINING), ("val", EVALUATION)):
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
        for name in names:
            write_image(root / "JPEGImages" / f"{name}.jpg")
            (root / "Annotations" / f"{name}.xml").write_text("<annotation/>")
    augmentation = {"scale": [1, 1], "turns": False, "color_jitter": 0}
    return {"kind": DetectionDataModule, "source": "voc", "classes": ["thing"], "train_transform": augmentation}


def camvid(root: Path) -> dict[str, Any]:
    for split, names in (("train", TRAINING), ("val", EVALUATION)):
        (root / split / "labels").mkdir(parents=True)
        for name in names:
            write_image(root / split / "images" / f"{name}.jpg")
            Image.fromarray(np.zeros((20, 24), np.uint8)).save(root / split / "labels" / f"{name}.png")
    augmentation = {"scale": [1, 1], "color_jitter": 0}
    return {"kind": SegmentationDataModule, "layout": "camvid", "classes": 2, "train_transform": augmentation}


@pytest.fixture(params=[class_folders, voc, camvid], ids=["classification", "detection", "segmentation"])
def module(request: pytest.FixtureRequest, tmp_path: Path, data_config: dict[str, Any]) -> Module:
    """Builds data modules of twelve training and three evaluation images, by default in batches of two."""
    settings = request.param(tmp_path)
    kind = settings.pop("kind")

    def build(**options: Any) -> Any:
        fixed = {"name": "test", "data_config": data_config, "root": str(tmp_path), "batch_size": 2}
        return kind(**{**fixed, **settings, **options})

    return build


def names(loader: Any) -> list[str]:
    return [Path(id).stem for batch in loader for id in batch["id"]]


def damage(root: Path, *names: str) -> None:
    """Empty the files of these images."""
    for name in names:
        (path,) = root.rglob(f"{name}.jpg")
        path.write_bytes(b"")


def test_held_out_images_are_not_trained_on(module: Module) -> None:
    data = module(holdout=0.4, batch_size=1)
    data.setup("fit")
    trained, held_out = names(data.train_dataloader()), names(data.val_dataloader())
    assert trained
    assert held_out
    assert sorted(trained + held_out) == TRAINING
    assert held_out == sorted(held_out)


def test_nothing_held_out_is_no_validation(module: Module) -> None:
    assert module().val_dataloader() == []


def test_the_order_of_training_images_follows_from_seed_and_epoch(module: Module) -> None:
    first, again, other, later = (module(seed=seed, batch_size=5).train_dataloader() for seed in (0, 0, 1, 0))
    later.sampler.set_epoch(1)
    orders = [names(loader) for loader in (first, again, other, later)]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 3
    assert all(len(set(order)) == 10 for order in orders)  # full batches only


def test_evaluation_is_in_the_same_order_every_time(module: Module) -> None:
    data = module(seed=3)
    assert names(data.test_dataloader()) == names(data.test_dataloader()) == EVALUATION
    assert data.num_images == 3


def test_an_image_that_cannot_be_read_stops_or_is_named(module: Module, tmp_path: Path) -> None:
    identity = module().fingerprint()
    damage(tmp_path, "v1")
    with pytest.raises(UserError, match=r"cannot decode image .*v1.* of .*dataset\.on_error=skip"):
        list(module().test_dataloader())
    first, second = module(on_error="skip").test_dataloader()
    assert (names([first]), names([second])) == (["v0"], ["v2"])
    assert [Path(id).stem for id in first["skipped"]] == ["v1"]
    assert module().fingerprint() != identity


def test_a_batch_without_any_image(module: Module, tmp_path: Path) -> None:
    damage(tmp_path, *EVALUATION)
    first, second = module(on_error="skip").test_dataloader()
    assert first["image"].shape == second["image"].shape == (0, 3, 16, 16)
    assert [Path(id).stem for id in first["skipped"] + second["skipped"]] == EVALUATION


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_calibration_images_are_spread_and_prepared_as_for_evaluation(module: Module, batch_size: int) -> None:
    evaluated = module(train_split="val", test_split="train", batch_size=12)
    (batch,) = evaluated.test_dataloader()
    images = evaluated.normalise(batch["image"]) if hasattr(evaluated, "normalise") else batch["image"]
    assert torch.equal(module(batch_size=batch_size).calibration_images(5), images[[0, 2, 4, 7, 9]])
    assert torch.equal(module(batch_size=batch_size).calibration_images(50), images)


def test_calibration_images_that_cannot_be_had(module: Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_split and dataset\.test_split are both val"):
        module(train_split="val").calibration_images(2)
    damage(tmp_path, *TRAINING)
    with pytest.raises(UserError, match=r"cannot decode image .*t00"):
        module().calibration_images(3)
    with pytest.raises(UserError, match="none of 3 training images of test could be read"):
        module(on_error="skip").calibration_images(3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"on_error": "ignore"}, r"unknown dataset\.on_error 'ignore'.*fail, skip"),
        ({"holdout": 1.0}, r"dataset\.holdout=1\.0: expected a number from 0 to 0\.99"),
        ({"batch_size": 0}, r"dataset\.batch_size=0: expected an integer from 1 to 1048576"),
        ({"num_workers": -1}, r"dataset\.num_workers=-1"),
    ],
)
def test_options_that_cannot_be(module: Module, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        module(**options)


def test_too_few_training_images_for_a_batch_or_a_holdout(module: Module) -> None:
    with pytest.raises(UserError, match=r"dataset\.batch_size=13 is more than the 12 training images"):
        module(batch_size=13).train_dataloader()
    with pytest.raises(UserError, match=r"dataset\.holdout=1e-06 holds out no training image"):
        module(holdout=1e-6).val_dataloader()
