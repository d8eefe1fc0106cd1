"""Mistakes in a configuration are found by what is made of it, before weights are loaded."""

from collections.abc import Callable
from importlib import resources

import pytest
from composed import composed
from omegaconf import DictConfig
from small_dense import SMALL as DENSE
from small_run import SMALL

from mtr_lab.compose import (
    check_device,
    make_meta_model,
    make_model,
    make_task,
    make_task_data,
    make_trainer,
)
from mtr_lab.errors import UserError
from mtr_lab.evaluation.points import operating_points, policy_settings
from mtr_lab.reduction import Reduction

CLASSIFIER = resources.files("mtr_lab") / "assets" / "vim_nano.safetensors"
Check = Callable[[DictConfig], object]


def data(config: DictConfig) -> None:
    make_task_data(make_task(config.task), config)


def model(config: DictConfig) -> None:
    make_model(config.backbone)


def points(config: DictConfig) -> None:
    operating_points(Reduction(make_meta_model(config.backbone), policy_settings(config.mtr)), config.mtr)


def trainer(config: DictConfig) -> None:
    check_device(config.trainer)
    make_trainer(config.trainer, distributed=True, logger=False)


@pytest.mark.parametrize(
    ("check", "overrides", "expected"),
    [
        (points, ["mtr.score=dleta"], ["unknown mtr.score 'dleta'", "'delta'"]),
        (points, ["mtr.ratio=1.2"], ["mtr.ratio must be a share", "[0, 1)", "got 1.2"]),
        (points, ["mtr.ratio=-0.1"], ["mtr.ratio must be a share", "got -0.1"]),
        (points, ["mtr.ratio=many"], ["mtr.ratio must be a share", "got 'many'"]),
        (points, ["mtr.ratio=false"], ["mtr.ratio must be a share", "got False"]),
        (points, ["mtr.ratio="], ["mtr.ratio must be a share", "got ''"]),
        (points, ["mtr.ratio=0.97"], ["out of reach", "at most 0."]),
        (points, ["mtr.ratio=null"], ["mtr.ratio must be a share"]),
        (points, ["mtr.schedule=[0,3,0]"], ["add mtr.ratio=null"]),
        (points, ["mtr.schedule=atuo"], ["mtr.schedule must be one of constant", "auto", "got 'atuo'"]),
        (points, ["mtr.interval=two"], ["mtr.interval must be", "'two'"]),
        (data, ["task.name=segmenting"], ["unknown task.name 'segmenting'"]),
        (data, ["dataset=bccd_sample"], ["dataset=bccd_sample is for task=detection, not for task=classification"]),
        (data, ["dataset=imagefolder", "dataset.root=/nowhere"], ["/nowhere", "<class>", "dataset=imagenette_sample"]),
        (data, ["dataset=imagefolder", "dataset.root=5"], ["5 is not a directory"]),
        (data, ["backbone=vim_s"], ["imagenet", "dataset.root", "dataset=imagenette_sample"]),
        (data, ["dataset.on_error=ignore"], ["unknown dataset.on_error 'ignore'"]),
        (data, ["dataset.on_error=null"], ["unknown dataset.on_error 'None'"]),
        (data, ["dataset.batch_size=0"], ["dataset.batch_size=0: expected an integer from 1 to 1048576"]),
        (data, ["dataset.batch_size=many"], ["dataset.batch_size=many: expected an integer"]),
        (data, ["dataset.holdout=abc"], ["dataset.holdout=abc: expected a number from 0 to 0.99"]),
        (data, ["dataset.train_transform=3"], ["dataset.train_transform=3: expected a mapping"]),
        (data, ["+dataset.num_classes=10"], ["dataset.num_classes cannot be set"]),
        (data, ["backbone.num_classes=7"], ["the dataset has 10 classes", "the model 7 outputs"]),
        (data, ["backbone.name=null"], ["unknown backbone 'None'"]),
        (data, ["backbone.embed_dim=0"], ["embed_dim of vim_nano=0: expected an integer from 1 to 65536"]),
        (data, ["backbone.img_size=115"], ["image height 115 does not fit", "112 or 120"]),
        (data, ["backbone.img_size=big"], ["img_size of vim_nano=big: expected an integer"]),
        (model, ["backbone.checkpoint=nowhere.pth"], ["nowhere.pth does not exist"]),
        (model, ["backbone.checkpoint=hf://a..b/--c/f"], ["cannot download f from a..b/--c"]),
        (trainer, ["trainer.accelerator=abacus"], ["trainer: You selected an invalid accelerator name", "abacus"]),
        (trainer, ["trainer.devices=0"], ["trainer: ", "devices=0"]),
        (trainer, ["trainer.accelerator=cpu", "trainer.devices=2"], ["trainer.devices=2 starts 2 processes"]),
        (trainer, ["trainer.cuda_graph=true", "trainer.accelerator=cpu"], ["cuda_graph=true: no CUDA device is"]),
        (trainer, ["trainer.precision=3"], ["trainer: Precision 3 is invalid"]),
        (trainer, ["trainer.limit_test_batches=0"], ["trainer.limit_test_batches=0 leaves nothing to do"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message(check: Check, overrides: list[str], expected: list[str]) -> None:
    config = composed("config", *SMALL, *overrides)
    with pytest.raises(UserError) as error:
        check(config)
    for text in expected:
        assert text in str(error.value)


OF_BOTH = [
    (["backbone=vim_ti", "backbone.pretrained=true"], "no weights for NAME with vim_ti are bundled"),
    (["backbone.checkpoint=nowhere.safetensors"], r"nowhere\.safetensors does not exist"),
    (["dataset=imagenette_sample"], "dataset=imagenette_sample is for task=classification, not for task=NAME"),
    (["backbone.img_size=[60,96]"], "does not fit patches of 8"),
    (["dataset.root=/nowhere"], r"/nowhere is not a directory\.(?! Expected)"),
]
OF_DETECTION = [
    ([f"backbone.checkpoint={CLASSIFIER}"], "the dataset has 3 classes, the model 10"),
    (["task.anchors=[[8],[16]]"], "2 lists of anchors"),
    (["+task.depth=3"], r"unknown setting task\. 'depth'"),
    (["task.name=detecting"], r"unknown task\.name 'detecting'. Did you mean 'detection'"),
    (["task.masks=true"], r"dataset\.source=voc has boxes only"),
    (["trainer.precision=bf16-true"], r"boxes need 32 bits\. Use trainer\.precision=bf16-mixed"),
    (["dataset=bccd"], r"dataset 'bccd' needs a directory.*dataset\.root=DIR"),
]
OF_SEGMENTATION = [
    ([f"backbone.checkpoint={CLASSIFIER}"], "the dataset has 11 classes, the model 10"),
    (["+task.widht=3"], r"unknown setting task\. 'widht'. Did you mean 'width'"),
    (["task.restoration=zero"], "unknown restoration 'zero'"),
    (["trainer.cuda_graph=true"], r"trainer\.cuda_graph=true"),
    (["dataset=camvid"], r"dataset 'camvid' needs a directory.*dataset\.root=DIR"),
]


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        *(("detection", *mistake) for mistake in [*OF_BOTH, *OF_DETECTION]),
        *(("segmentation", *mistake) for mistake in [*OF_BOTH, *OF_SEGMENTATION]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_in_a_dense_task(name: str, overrides: list[str], expected: str) -> None:
    config = composed("config", *DENSE[name], *overrides)
    with pytest.raises(UserError, match=f"(?s){expected.replace('NAME', name)}"):
        data(config)
