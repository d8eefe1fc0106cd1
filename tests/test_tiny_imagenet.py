"""The committed weights of the Tiny ImageNet classifiers give the answers that were recorded on a GPU."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import mtr_lab

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "experiments" / "tiny_imagenet"
IMAGES = sorted((ROOT / "tests" / "golden" / "tiny_imagenet_val").rglob("*.JPEG"))
RIGHT = {
    ("vim_ti_64", "none"): "11001110001110101011",
    ("vim_ti_64", "fovea"): "11001100000110100011",
    ("vim_ti_64_half", "none"): "11011110000110101110",
    ("videomamba_64", "none"): "10001100100100101110",
    ("videomamba_64", "fovea"): "10001110000100101110",
}
"""By model and policy at 40 %: which of the images the evaluation on a GPU had right, in their order."""


@cache
def model(name: str) -> Any:
    return mtr_lab.create_model(name, checkpoint=TRAINED / name / "model.safetensors").eval()


@pytest.mark.parametrize("name", ["vim_ti_64", "vim_ti_64_half", "videomamba_64"])
def test_the_weights_are_those_of_the_records(name: str) -> None:
    digest = hashlib.sha256((TRAINED / name / "model.safetensors").read_bytes()).hexdigest()
    assert digest == json.loads((TRAINED / name / "training_3.json").read_text())["sha256"]
    lines = ROOT / "experiments/results/lines" / f"{name}.json"
    if lines.exists():  # a smaller model stands in the lines of its larger one
        assert digest == json.loads(lines.read_text())["weights"]["sha256"]


@pytest.mark.parametrize(("name", "policy"), RIGHT)
def test_the_answers_are_the_recorded_ones(name: str, policy: str) -> None:
    net = model(name)
    transform: Any = create_transform(**resolve_data_config(net.pretrained_cfg))
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in IMAGES])
    if policy != "none":
        mtr_lab.patch(net, policy, ratio=0.4)
    with torch.inference_mode():
        answers = [net.pretrained_cfg["label_names"][index] for index in net(images).argmax(-1)]
    mtr_lab.unpatch(net)
    right = "".join(str(int(answer == path.parent.name)) for answer, path in zip(answers, IMAGES, strict=True))
    assert right == RIGHT[name, policy]
