"""Evaluation images as the trainer gives them to the model, outside its loops."""

from importlib import resources

import lightning
import pytest
import torch

from mtr_lab.data import ImageDataModule
from mtr_lab.evaluation.job import describe_machine
from mtr_lab.evaluation.placement import as_input
from mtr_lab.results.environment import describe_environment

STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


def trainer(precision: str) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False, enable_model_summary=False
    )


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_images_need_no_pass_of_the_trainer_before(precision: str, dtype: torch.dtype) -> None:
    root = str(resources.files("mtr_lab") / "assets" / "imagenette_sample")
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.9, **STATISTICS}
    data = ImageDataModule(name="sample", root=root, data_config=config, batch_size=2, num_workers=0)
    batch = next(iter(data.test_dataloader()))
    encoded = batch["image"].clone()
    images = as_input(batch, data, trainer(precision))
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(images, ((encoded / 255 - mean) / std).to(dtype))


def test_the_keys_hash_the_device_and_then_its_details() -> None:
    machine, environment = describe_machine(trainer("32-true")), describe_environment()
    assert machine.device == "cpu"
    assert machine.parts == ["cpu", environment["cpu"], f"{environment['threads']} threads"]
