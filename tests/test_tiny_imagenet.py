"""The committed weights of vim_ti_64 give the answers that were recorded on a GPU."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

import mtr_lab

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "experiments" / "tiny_imagenet" / "vim_ti_64"
IMAGES = sorted((ROOT / "tests" / "golden" / "tiny_imagenet_val").rglob("*.JPEG"))
RIGHT = {
    "none": "11001110001110101011",
    "fovea": "11001100000110100011",
}
"""By policy at 40 %: which of the images the evaluation on a GPU had right, in their order."""


@pytest.fixture(scope="module")
def model() -> Any:
    return mtr_lab.create_model("vim_ti_64", checkpoint=TRAINED / "model.safetensors").eval()


@pytest.fixture(scope="module")
def images(model: Any) -> Tensor:
    transform: Any = create_transform(**resolve_data_config(model.pretrained_cfg))
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in IMAGES])


def test_the_weights_are_those_of_the_records() -> None:
    digest = hashlib.sha256((TRAINED / "model.safetensors").read_bytes()).hexdigest()
    lines = json.loads((ROOT / "experiments/results/lines/vim_ti_64.json").read_text())
    assert digest == json.loads((TRAINED / "training_3.json").read_text())["sha256"]
    assert digest == lines["weights"]["sha256"]


@pytest.mark.parametrize("policy", RIGHT)
def test_the_answers_are_the_recorded_ones(policy: str, model: Any, images: Tensor) -> None:
    names = model.pretrained_cfg["label_names"]
    if policy != "none":
        mtr_lab.patch(model, policy, ratio=0.4)
    with torch.inference_mode():
        answers = [names[index] for index in model(images).argmax(-1)]
    mtr_lab.unpatch(model)
    right = "".join(str(int(answer == path.parent.name)) for answer, path in zip(answers, IMAGES, strict=True))
    assert right == RIGHT[policy]
