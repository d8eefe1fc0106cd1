"""Skipped scan directions: against models whose mixers lack them, the ranking, the ratio, the parts that combine."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import FOUR, Toy

import mtr_lab
from mtr_lab import UserError
from mtr_lab.backbones import blocks_of
from mtr_lab.measure.flops import counted_flops, model_flops
from mtr_lab.reduction import make_schedule

SMALL = {"img_size": (24, 32), "patch_size": 4, "stride": 4, "depth": 6, "embed_dim": 32, "num_classes": 5}
MODELS = {
    "vim": lambda: mtr_lab.create_model("vim_ti", **SMALL),
    "four_paths": lambda: Toy(size=(24, 32), paths=FOUR, grid=True),
    "two_stages": lambda: Toy(size=(32, 32), widths=(16, 32), depths=(3, 3), mlp=True),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def images_for(model: Any) -> torch.Tensor:
    return torch.randn(4, *model.input_shape, generator=torch.Generator().manual_seed(1))


def without(model: Any, number: int, names: tuple[str, ...]) -> None:
    """Take directions away from a mixer."""
    mixer = blocks_of(model)[number].mixer
    mixer.paths = tuple(path for path in mixer.paths if path.name not in names)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_computes_and_costs_what_a_model_without_these_directions_does(name: str) -> None:
    model, other = make(name), make(name)
    images = images_for(model)
    before, whole = model(images), model_flops(model)
    reduction = mtr_lab.patch(model, "directions", ratio=0.09, images=images)
    schedule = reduction.schedule
    assert schedule.reduction >= 0.09
    for number, names in enumerate(schedule.skipped):
        without(other, number, names)
    torch.testing.assert_close(model(images), other(images))
    assert schedule.flops == model_flops(other) == counted_flops(model, images)[0]
    assert (schedule.flops_overhead, schedule.flops_unreduced, sum(schedule.remove)) == (0, whole, 0)
    reduction.use(reduction.solve(0.0))
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_directions_that_matter_least_go_first(name: str) -> None:
    """KL divergence over saved FLOPs, each direction alone; a block keeps one; no more go than the ratio needs."""
    model = make(name)
    images = images_for(model)
    target, whole, prices = model(images).double().log_softmax(-1), model_flops(model), []
    for number, block in enumerate(blocks_of(model)):
        for path in block.mixer.paths:
            other = make(name)
            without(other, number, (path.name,))
            reduced = other(images).double().log_softmax(-1)
            kl = F.kl_div(reduced, target, reduction="batchmean", log_target=True).item()
            prices.append((kl / (whole - model_flops(other)), number, path.name))
    left = [len(block.mixer.paths) for block in blocks_of(model)]
    order = []
    for _, number, path in sorted(prices):
        if left[number] > 1:
            left[number] -= 1
            order.append((number, path))

    reduction = mtr_lab.patch(model, "directions", ratio=0.05, images=images)
    for ratio in (0.03, 0.06, 0.09):
        schedule = reduction.solve(ratio)
        pairs = {(number, path) for number, names in enumerate(schedule.skipped) for path in names}
        assert pairs == set(order[: len(pairs)])
        fewer = make(name)
        for number, path in order[: len(pairs) - 1]:
            without(fewer, number, (path,))
        assert 1 - model_flops(fewer) / whole < ratio <= schedule.reduction


@pytest.mark.parametrize("policy", ["mtr", "storm", "write"])
@torch.no_grad()
def test_tokens_save_the_rest(policy: str) -> None:
    model = make("vim")
    images = images_for(model)
    reduction = mtr_lab.patch(model, policy, ratio=0.3, images=images, paths="least", paths_share=0.4)
    schedule = reduction.schedule
    assert schedule.reduction >= 0.3
    assert any(schedule.remove)
    alone = make_schedule(model, reduction.policy, schedule=[0] * 6, skipped=schedule.skipped).reduction
    assert 0.12 <= alone < 0.2
    assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead)
    by_auto = mtr_lab.patch(model, policy, ratio=0.3, images=images, paths="least", paths_share=0.4, schedule="auto")
    assert by_auto.schedule.skipped == schedule.skipped
    assert by_auto.schedule.reduction >= 0.3


@torch.no_grad()
def test_without_images_the_last_blocks_come_first() -> None:
    model = make("four_paths")
    schedule = mtr_lab.patch(model, "directions", ratio=0.1, paths="last").schedule
    skipped = [names for names in schedule.skipped if names]
    assert schedule.skipped[-len(skipped) :] == tuple(skipped)
    assert skipped[-1] == ("columns_backward", "columns", "backward")[: len(skipped[-1])]


def test_what_does_not_fit_is_refused() -> None:
    model = make("vim")
    images = images_for(model)
    with pytest.raises(UserError, match=r"mtr\.paths=least measures on images .* or take mtr\.paths=last"):
        mtr_lab.patch(model, "directions", ratio=0.1)
    with pytest.raises(UserError, match=r"to save 0\.5 of the FLOPs, .*with one direction a block they save 0\.3"):
        mtr_lab.patch(model, "directions", ratio=0.5, images=images)
    with pytest.raises(UserError, match=r"mtr\.directions=forward with mtr\.paths=last, which may skip that direction"):
        mtr_lab.patch(model, "mtr", ratio=0.1, paths="last", directions="forward")
    with pytest.raises(UserError, match=r"out of reach.*they save 0\.0"):
        mtr_lab.patch(Toy(paths=("forward",)), "directions", ratio=0.1, images=torch.randn(2, 3, 24, 16))
