"""Every family in geometries that no published model has: odd depths and grids, padded windows, few states."""

import copy
from typing import Any

import plain_models
import pytest
import torch
from fitting_counts import counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mtr_lab
from mtr_lab import ops
from mtr_lab.measure.flops import counted_flops, model_flops
from mtr_lab.reduction.schedule import OutOfReach

FAMILIES = {
    "mambareg_s": plain_models.registers,
    "plainmamba_l1": plain_models.snakes,
    "vmamba_t": plain_models.pyramid,
    "mambavision_t": plain_models.windows,
}
PROPERTIES = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@st.composite
def geometries(draw: Any, family: str) -> dict[str, Any]:
    """The arguments of a tiny model."""

    def number(low: int, high: int) -> int:
        return int(draw(st.integers(low, high)))

    if family == "vmamba_t":
        return {
            "img_size": (4 * number(2, 11), 4 * number(1, 15)),
            "dims": 2 * number(2, 5),
            "depths": (number(2, 3), *(number(1, 3) for _ in range(number(0, 3)))),
            "ssm_d_state": draw(st.sampled_from([1, 2, 3, 16])),
            "ssm_ratio": draw(st.sampled_from([1.0, 1.5, 2.0])),
        }
    if family == "mambavision_t":
        return {
            "img_size": (number(33, 90), number(33, 120)),
            "dim": 4,
            "in_dim": 4,
            "depths": (number(1, 2), number(1, 2), number(1, 5), number(1, 4)),
            "window_size": (1, 1, number(2, 5), number(1, 4)),
            "num_heads": (1, 1, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 8]))),
            "d_state": draw(st.sampled_from([1, 2, 8])),
            "layer_scale": draw(st.sampled_from([None, 0.5])),
        }
    patch = 4
    rows, columns = number(2, 6), number(2, 7)
    shared = {
        "img_size": (patch * rows, patch * columns),
        "patch_size": patch,
        "depth": number(2, 5),
        "d_state": draw(st.sampled_from([1, 2, 5, 16])),
    }
    if family == "mambareg_s":
        reduce = draw(st.sampled_from([2, 4]))
        registers = number(1, rows * columns - 1)
        return {**shared, "stride": patch, "embed_dim": 12, "num_cls_tokens": registers, "cls_reduce": reduce}
    convolved = draw(st.sets(st.integers(0, shared["depth"] - 1)))
    width = 2 * number(1, 3) + 1
    return {**shared, "embed_dim": 10, "layers_with_dwconv": sorted(convolved), "conv_size": width}


def make(family: str, geometry: dict[str, Any]) -> Any:
    """A model in float64, whose parameters and statistics are all random."""
    torch.manual_seed(0)
    model = mtr_lab.create_model(family, **geometry, num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def images(model: Any, count: int = 2) -> Tensor:
    return torch.randn(count, *model.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check_whole(family: str, geometry: dict[str, Any]) -> None:
    model = make(family, geometry)
    batch = images(model)
    expected = FAMILIES[family](model, batch)
    torch.testing.assert_close(model(batch), expected)
    assert counted_flops(model, batch) == (model_flops(model), 0)
    single = copy.deepcopy(model).float()
    for backend in ("cpu", "portable"):
        with ops.use_backend(backend):
            actual = single(batch.float()).double()
        assert (actual - expected).norm() < 1e-4 * (1 + expected.norm())


def check_reduced(family: str, geometry: dict[str, Any], policy: str, number: int) -> None:
    """Costs are those of the schedule, gradients are finite, and unpatching restores the outputs bit for bit."""
    model = make(family, geometry)
    batch = images(model)
    before = model(batch)
    reduction = mtr_lab.patch(model, policy, schedule=counts(model, number, policy))
    with torch.no_grad():
        reduced = model(batch)
        assert reduced.isfinite().all()
        schedule = reduction.schedule
        assert counted_flops(model, batch) == (schedule.flops, schedule.flops_overhead)
        with ops.use_backend("portable"):
            torch.testing.assert_close(model(batch), reduced)
    model(batch).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    mtr_lab.unpatch(model)
    for p in model.parameters():
        p.grad = None
    assert torch.equal(model(batch), before)


def check_reach(family: str, geometry: dict[str, Any]) -> None:
    """A ratio out of reach names the largest that fits, and that one is reached."""
    model = make(family, geometry)
    with pytest.raises(OutOfReach) as refused:
        mtr_lab.patch(model, "mtr", ratio=0.999, first_block=0)
    words = str(refused.value).replace(",", " ").split()
    largest = float(words[words.index("most") + 1])
    if largest > 0:
        reduction = mtr_lab.patch(model, "mtr", ratio=0.99 * largest, first_block=0)
        assert reduction.schedule.reduction >= 0.99 * largest


POLICIES = ("mtr", "write", "fovea", "random", "hsa", "utr", "tome", "storm", "storm_evit", "directions")
OTHERS = {"mambareg_s": ("evit", "pumer"), "vmamba_t": ("mlp",), "mambavision_t": ("mlp",), "plainmamba_l1": ()}


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_equal_loops_over_their_tokens(family: str) -> None:
    @settings(max_examples=4, **PROPERTIES)
    @given(geometry=geometries(family))
    def check(geometry: dict[str, Any]) -> None:
        check_whole(family, geometry)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_reduced_models_keep_their_promises(family: str) -> None:
    @settings(max_examples=5, **PROPERTIES)
    @given(geometry=geometries(family), policy=st.sampled_from((*POLICIES, *OTHERS[family])), number=st.integers(1, 6))
    def check(geometry: dict[str, Any], policy: str, number: int) -> None:
        check_reduced(family, geometry, policy, number)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ratio_out_of_reach_names_the_largest(family: str) -> None:
    @settings(max_examples=3, **PROPERTIES)
    @given(geometry=geometries(family))
    def check(geometry: dict[str, Any]) -> None:
        check_reach(family, geometry)

    check()
