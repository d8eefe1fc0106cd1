"""The content of batches: pixels, labels, ids, hashes; images that cannot be decoded."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from mtr_lab.data import ImageDataModule
from mtr_lab.errors import UserError

Folders = Callable[..., Path]
Module = Callable[..., ImageDataModule]

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"<html>not found</html>",
    "header": lambda data: data[:30],
    "half": lambda data: data[: len(data) // 2],
    "last bytes": lambda data: data[:-20],
}


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGE[how](path.read_bytes()))


def test_batch_has_pixels_labels_ids_and_hashes(folders: Folders, module: Module) -> None:
    root = folders(a=2, b=1)
    (batch,) = module(root=str(root)).test_dataloader()
    assert list(batch["id"]) == ["a/0.jpg", "a/1.jpg", "b/0.jpg"]
    assert batch["image"].shape == (3, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [0, 0, 1]
    assert batch["skipped"] == []
    files = [(root / id).read_bytes() for id in batch["id"]]
    assert list(batch["hash"]) == [hashlib.blake2b(data, digest_size=16).hexdigest() for data in files]


def test_evaluation_preprocessing_is_resize_crop_normalise(
    folders: Folders, module: Module, data_config: dict[str, Any]
) -> None:
    root = folders(a=1)
    data = module(root=str(root))
    (batch,) = data.test_dataloader()
    # 16 / 0.9 = 17 pixels for the shorter side of 24×20, then the central 16×16.
    resized = Image.open(root / "a/0.jpg").resize((int(17 * 24 / 20), 17), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 16) / 2), round((resized.height - 16) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 16, top + 16))) / 255
    expected = (pixels - data_config["mean"]) / data_config["std"]
    normalised = data.normalise(batch["image"])
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    timm = create_transform(**data_config, is_training=False)  # to the last digit
    assert torch.equal(normalised[0], timm(Image.open(root / "a/0.jpg").convert("RGB")))


def test_grey_and_transparent_images_become_rgb(tmp_path: Path, module: Module) -> None:
    (tmp_path / "a").mkdir()
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (20, 20)).save(tmp_path / "a" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    (batch,) = module(root=str(tmp_path)).test_dataloader()
    assert batch["image"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("how", DAMAGE)
def test_undecodable_image_fails_with_its_name_and_the_way_out(folders: Folders, module: Module, how: str) -> None:
    root = folders(a=3)
    damage(root / "a/1.jpg", how)
    with pytest.raises(UserError, match=r"a/1\.jpg.*dataset\.on_error=skip"):
        list(module(root=str(root)).test_dataloader())


def test_undecodable_images_are_skipped_and_listed(folders: Folders, module: Module) -> None:
    root = folders(a=5, b=5)
    for index, how in enumerate(DAMAGE):
        damage(root / f"a/{index}.jpg", how)
    data = module(root=str(root), on_error="skip")
    batches = list(data.test_dataloader())
    # a/0 … a/3 are the first batch, which has an image tensor although no image could be decoded.
    assert [batch["image"].shape for batch in batches] == [(0, 3, 16, 16), (3, 3, 16, 16), (2, 3, 16, 16)]
    assert batches[0]["label"].shape == (0,)
    assert [batch["skipped"] for batch in batches] == [[f"a/{i}.jpg" for i in range(4)], ["a/4.jpg"], []]
    assert [id for batch in batches for id in batch["id"]] == [f"b/{i}.jpg" for i in range(5)]
    assert data.num_images == 10


def test_workers_give_the_same_batches_and_clean_errors(
    folders: Folders, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    root = folders(a=5, b=5)
    damage(root / "b/2.jpg", "half")
    serial, parallel = (list(module(root=str(root), on_error="skip", num_workers=n).test_dataloader()) for n in (0, 2))
    for one, other in zip(serial, parallel, strict=True):
        assert torch.equal(one.pop("image"), other.pop("image"))
        assert torch.equal(one.pop("label"), other.pop("label"))
        assert all(list(one[name]) == list(other[name]) for name in ("id", "hash", "skipped"))
    messages = []
    for num_workers in (0, 2):
        with pytest.raises(UserError) as raised:
            list(module(root=str(root), num_workers=num_workers).test_dataloader())
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert "Traceback" not in messages[0]


class Means(LightningModule):
    """Collects the batches that a Trainer passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tested: list[str] = []

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any]) -> None:
        pass

    def test_step(self, batch: dict[str, Any]) -> None:
        self.tested += list(batch["id"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_trainer_takes_the_batches_and_passes_the_error_on(folders: Folders, module: Module) -> None:
    folders("train", a=20, b=20)
    root = folders("val", a=3, b=3)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Means()
    data = module(root=str(root), holdout=0.2, num_workers=1)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2 * len(data.train_dataloader())
    trainer.test(model, datamodule=data, verbose=False)
    assert model.tested == [f"{name}/{i}.jpg" for name in "ab" for i in range(3)]
    damage(root / "val/a/1.jpg", "half")
    with pytest.raises(UserError, match=r"^cannot decode image a/1\.jpg"):
        trainer.test(model, datamodule=module(root=str(root), num_workers=1), verbose=False)
