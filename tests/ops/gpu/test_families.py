"""Every family on the kernels: odd grids and depths, padded windows, one to sixteen states, four paths."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fitting_counts import counts
from torch import Tensor, nn

import mtr_lab
from mtr_lab import ops

SLOW, GPU = pytest.mark.slow, pytest.mark.gpu
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ISOTROPIC = {"img_size": (24, 40), "patch_size": 8, "stride": 8, "depth": 3, "embed_dim": 20}
PLAIN = {"img_size": (32, 40), "patch_size": 8, "depth": 3, "embed_dim": 20, "num_convs_patch_embed": 1}
"""An even number of rows: on an odd grid Δ of a token and of its reflection are equal, and rounding decides."""
LARGER = torch.cuda.is_available()  # than what the interpreter takes seconds for
PYRAMID = {"img_size": (72, 104) if LARGER else (24, 40), "dims": 8, "depths": (1, 1, 1, 2)}
WINDOWS = {"img_size": (72, 104), "dim": 8, "in_dim": 8, "depths": (1, 1, 3, 2), "num_heads": (1, 1, 2, 2)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vim": ("vim_ti", ISOTROPIC),
    "videomamba": ("videomamba_ti", {**ISOTROPIC, "d_state": 5}),
    "registers": ("mambareg_s", {**ISOTROPIC, "num_cls_tokens": 5}),
    "snakes": ("plainmamba_l1", {**PLAIN, "d_state": 2}),
    "snakes_16": ("plainmamba_l2", {**PLAIN, "d_state": 16}),
    "pyramid": ("vmamba_t", PYRAMID),
    "pyramid_2": ("vmamba_s", {**PYRAMID, "ssm_d_state": 2}),
    "windows": ("mambavision_t", {**WINDOWS, "window_size": (1, 1, 14, 7) if LARGER else (1, 1, 7, 4)}),
    "padded_windows": ("mambavision_b", {**WINDOWS, "window_size": (1, 1, 3, 3)}),
}
"""By a short name: the model of the library, and its geometry."""
POLICIES = (None, "mtr", "fovea", "write", "storm", "quartermap", "mlp")
FAST = ("snakes", "mtr"), ("pyramid_2", None)
"""What Triton's interpreter runs in the fast lane."""
HAS_MLP = ("pyramid", "pyramid_2", "windows", "padded_windows")
HAS_GRID = ("pyramid", "pyramid_2", "snakes", "snakes_16", "windows")


def model(which: str, policy: str | None = None) -> Any:
    """A small model with random weights that removes some tokens in each stage."""
    torch.manual_seed(0)
    name, geometry = MODELS[which]
    made = mtr_lab.create_model(name, **geometry, num_classes=5).eval()
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for parameter in made.parameters():  # biases and skips too
        parameter.data += 0.02 * torch.randn_like(parameter)
    if policy == "quartermap":
        mtr_lab.patch(made, policy, ratio=0.01)
    elif policy:
        mtr_lab.patch(made, policy, schedule=counts(made, 2, policy))
    return made


def images(which: str, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *MODELS[which][1]["img_size"])


def fits(which: str, policy: str | None) -> bool:
    """Whether the policy is one for this family."""
    needed = {"mlp": HAS_MLP, "quartermap": ("pyramid", "pyramid_2"), "storm": HAS_GRID}
    return which in needed.get(policy or "", MODELS)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.fixture(autouse=True)
def _float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's convolutions round to ten bits on a GPU, if they may: more than kernels err."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


CASES = [
    pytest.param(which, policy, marks=() if (which, policy) in FAST or LARGER else SLOW)
    for which in MODELS
    for policy in POLICIES
    if fits(which, policy)
]


COMPILED = [
    pytest.param(*case.values, marks=SLOW) if case.values == ("pyramid_2", None) and not LARGER else case
    for case in CASES
    if case.values[1] in (None, "mtr", "fovea")
]
"""VMamba in the fast lane: tests/backbones/test_vmamba.py."""


@pytest.mark.parametrize(("which", "policy"), CASES)
@torch.no_grad()
def test_the_kernels_equal_the_reference_in_float64(which: str, policy: str | None) -> None:
    made, batch = model(which, policy), images(which)
    with ops.use_backend("reference"):
        expected = copy.deepcopy(made).double()(batch.double())
    with ops.use_backend("triton"):
        assert relative(made(batch), expected) < 1e-5
    with ops.use_backend("portable"):
        assert relative(made(batch), expected) < 1e-5


@GPU
@NEEDS_GPU
@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_errs_as_the_reference_does(which: str, dtype: torch.dtype) -> None:
    made, batch = model(which), images(which, 4)
    with ops.use_backend("reference"):
        expected = copy.deepcopy(made).double()(batch.double())
    made, batch = made.to(dtype), batch.to(dtype)
    with ops.use_backend("reference"):
        of_the_reference = relative(made(batch), expected)
    with ops.use_backend("triton"):
        assert relative(made(batch), expected) < 2 * of_the_reference + 1e-3


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Without it, the order in which merged tokens are added changes from call to call."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@GPU
@NEEDS_GPU
@pytest.mark.parametrize(("which", "policy"), [case.values for case in CASES])
@torch.no_grad()
def test_a_cuda_graph_replays_the_model(deterministic: None, which: str, policy: str | None) -> None:
    made = model(which, policy)
    fast = mtr_lab.compile(made)
    for count in (2, 5, 2):
        batch = images(which, count)
        torch.testing.assert_close(fast(batch), made(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("which", "policy"), COMPILED)
@torch.no_grad()
def test_torch_compile_makes_one_graph(
    device: torch.device, deterministic: None, which: str, policy: str | None
) -> None:
    """No default device: PyTorch 2.11 traces less with one.

    On a CPU in float64: its fused kernels are not in graphs, and their rounding may change a decision.
    """
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    made, batch = model(which, policy).to(device, dtype), images(which).to(device, dtype)
    torch.compiler.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), made(batch), rtol=1e-4, atol=1e-5)


@GPU
@NEEDS_GPU
@pytest.mark.parametrize("which", MODELS)
def test_training_gradients(which: str) -> None:
    made, batch = model(which, "mtr"), images(which)
    exact = copy.deepcopy(made).double()
    with ops.use_backend("reference"):
        exact(batch.double()).square().sum().backward()
    with ops.use_backend("triton"):
        made(batch).square().sum().backward()
    for (name, actual), expected in zip(made.named_parameters(), exact.parameters(), strict=True):
        assert relative(actual.grad, expected.grad) < 1e-4, name
