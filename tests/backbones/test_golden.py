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
    ("mambareg_s", "mambareg_official"),
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
        actual = {"logits": model.forward_head(tokens), "features": model.forward_head(tokens, pre_logits=True)}
    for i, state in enumerate(outputs):
        actual |= {f"hidden.{i}": state.hidden, f"residual.{i}": state.residual}
    compared = actual.keys() & golden.keys()
    assert "logits" in compared
    assert {key: error for key in compared if (error := relative_error(actual[key], golden[key])) >= 1e-5} == {}


@pytest.mark.parametrize(("name", "file"), GOLDEN_FILES)
def test_directions_are_averaged_or_summed(name: str, file: str) -> None:
    """The golden files tell an average from a sum; otherwise parity would prove nothing about this."""
    arguments, golden = load(file)
    model = create_model(name, **arguments).eval()
    model.load_state_dict(parameters(golden))
    for block in model.blocks:
        block.mixer.average_directions = not block.mixer.average_directions
    with torch.no_grad():
        assert relative_error(model(golden["input"]), golden["logits"]) > 1e-2


@torch.no_grad()
def test_registers_are_where_the_authors_put_them() -> None:
    arguments, golden = load("mambareg_official")
    model = create_model("mambareg_s", **arguments)
    state = model.embed(golden["input"])
    assert state.special.tolist() == [golden["cls_positions"].tolist()] * 2
    order = golden["token_idx"]
    patches = model.patch_embed(golden["input"]) + model.pos_embed
    registers = (model.cls_token + model.pos_embed_cls).expand(2, -1, -1)
    torch.testing.assert_close(state.hidden, torch.cat([patches, registers], dim=1)[:, order])


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
