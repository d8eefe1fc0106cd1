"""Parity with the authors' models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mtr_lab import create_model, ops

GOLDEN = Path(__file__).parent.parent / "golden"
GOLDEN_FILES = [
    ("vim_ti", "vim_official"),
    ("vim_ti", "vim_official_stride8"),
    ("videomamba_ti", "videomamba_image_official"),
    ("videomamba_ti", "videomamba_video_official"),
]


def load(file: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The arguments of the authors' constructor, and the tensors."""
    with safe_open(GOLDEN / f"{file}.safetensors", framework="pt") as golden:
        arguments = {key: json.loads(value) for key, value in golden.metadata().items()}
        return arguments, {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118


def parameters(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key[6:]: value for key, value in golden.items() if key.startswith("param.")}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("name", "file"), GOLDEN_FILES)
def test_outputs_equal_the_authors(name: str, file: str, backend: str) -> None:
    arguments, golden = load(file)
    model = create_model(name, **arguments).eval()
    model.load_state_dict(parameters(golden), strict=True)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.no_grad(), ops.use_backend(backend):
        tokens = model.forward_features(golden["input"])
        features, logits = (model.forward_head(tokens, pre_logits=pooled) for pooled in (True, False))

    assert relative_error(logits, golden["logits"]) < 1e-5
    assert relative_error(features, golden["features"]) < 1e-5
    for i in (0, len(outputs) - 1):
        assert relative_error(outputs[i].hidden, golden[f"hidden.{i}"]) < 1e-5
        assert relative_error(outputs[i].residual, golden[f"residual.{i}"]) < 1e-5


@pytest.mark.parametrize(("name", "file"), GOLDEN_FILES)
def test_directions_are_averaged_in_vim_alone(name: str, file: str) -> None:
    """The golden files distinguish the two families; otherwise parity would prove nothing about this."""
    arguments, golden = load(file)
    model = create_model(name, **arguments).eval()
    model.load_state_dict(parameters(golden))
    for block in model.blocks:
        block.mixer.average_directions = not block.mixer.average_directions
    with torch.no_grad():
        assert relative_error(model(golden["input"]), golden["logits"]) > 1e-2


@torch.no_grad()
def test_an_undivided_vim_with_its_class_token_first_is_videomamba() -> None:
    arguments, golden = load("videomamba_image_official")
    model = create_model("vim_ti", if_divide_out=False, use_middle_cls_token=False, **arguments).eval()
    model.load_state_dict(parameters(golden), strict=True)
    assert relative_error(model(golden["input"]), golden["logits"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("name", "file"), GOLDEN_FILES[:3:2])
def test_epsilon_is_that_of_every_norm(name: str, file: str) -> None:
    """A stream k times as large has the same norm with k² times the epsilon."""
    k, (arguments, golden) = 30.0, load(file)
    model = create_model(name, norm_epsilon=1e-5 * k**2, **arguments).eval()
    model.load_state_dict(parameters(golden))
    for key, parameter in model.named_parameters():
        if key.startswith("patch_embed") or key in ("pos_embed", "cls_token") or key.endswith("out_proj.weight"):
            parameter.mul_(k)
    assert relative_error(model(golden["input"]), golden["logits"]) < 1e-5
    default = create_model(name, **arguments).eval()
    default.load_state_dict(model.state_dict())
    assert relative_error(default(golden["input"]), golden["logits"]) > 1e-4
