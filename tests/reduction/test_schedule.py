"""The schedule solver: never less than asked, less than one token more."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtr_lab import UserError, create_model
from mtr_lab.measure.flops import model_flops
from mtr_lab.reduction import make_policy, make_schedule, policy_config

MTR = make_policy(policy_config("mtr"))


def meta_model(name: str = "vim_ti", **geometry):
    with torch.device("meta"):
        return create_model(name, **geometry)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    name=st.sampled_from(["vim_ti", "vim_b", "vim_nano", "videomamba_m"]),
    depth=st.integers(3, 12),
    side=st.sampled_from([4, 7, 14]),
    ratio=st.floats(0.001, 0.99),
    first_block=st.integers(0, 6),
    interval=st.integers(1, 5),
)
def test_never_less_than_asked_and_under_one_token_more(
    name: str, depth: int, side: int, ratio: float, first_block: int, interval: int
) -> None:
    patch = 8 if name == "vim_nano" else 16
    model = meta_model(name, depth=depth, img_size=side * patch)
    where = {"first_block": min(first_block, depth - 2), "interval": interval}
    try:
        schedule = make_schedule(model, MTR, ratio=ratio, **where)
    except UserError as error:
        maximum = float(re.search(r"at most (\d\.\d+)", str(error))[1])
        assert maximum < ratio + 1e-4
        assert make_schedule(model, MTR, ratio=maximum, **where).reduction >= maximum
        return
    assert schedule.reduction >= ratio
    fewer = list(schedule.remove)
    fewer[max(block for block, count in enumerate(fewer) if count)] -= 1
    assert make_schedule(model, MTR, schedule=fewer).reduction < ratio

    allowed = range(where["first_block"], depth - 1, interval)
    assert all(count == 0 or block in allowed for block, count in enumerate(schedule.remove))
    assert schedule.tokens == tuple(side * side + 1 - sum(schedule.remove[:block]) for block in range(depth))
    assert side * side - sum(schedule.remove) >= 1  # one ordinary token is left


@pytest.mark.parametrize("name", ["vim_ti", "vim_s", "vim_b", "vim_s_plus", "vim_nano", "videomamba_s", "videomamba_b"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.3, 0.4, 0.5])
def test_overshoot_of_the_published_settings(name: str, ratio: float) -> None:
    model = meta_model(name)
    schedule = make_schedule(model, MTR, ratio=ratio)
    last = max(block for block, count in enumerate(schedule.remove) if count)
    one_token = sum(block.costs(1, 1, model.layouts()[0]).flops for block in model.blocks[last + 1 :])
    assert 0 <= (schedule.reduction - ratio) * schedule.flops_unreduced < one_token


def test_the_same_number_at_each_reduction_up_to_rounding() -> None:
    counts = [count for count in make_schedule(meta_model("vim_s"), MTR, ratio=0.3).remove if count]
    assert len(counts) == 11
    assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize(("shape", "shares"), [("linear", [7, 6, 5, 4, 3, 2, 1]), ("front", [64, 32, 16, 8, 4, 2, 1])])
def test_numbers_that_fall_from_reduction_to_reduction(shape: str, shares: list[int]) -> None:
    counts = [count for count in make_schedule(meta_model("vim_nano"), MTR, ratio=0.3, schedule=shape).remove if count]
    assert counts == pytest.approx([share / sum(shares) * sum(counts) for share in shares], abs=2)


def test_numbers_in_proportion_to_weights() -> None:
    counts = make_schedule(meta_model("vim_s"), MTR, ratio=0.3, schedule={8: 0.5, 2: 2, 5: 1}).remove
    assert [block for block, count in enumerate(counts) if count] == [2, 5, 8]
    assert counts[2] == pytest.approx(2 * counts[5], abs=3)
    assert counts[5] == pytest.approx(2 * counts[8], abs=3)


def test_by_default_every_second_block_from_the_second_on() -> None:
    schedule = make_schedule(meta_model("vim_s"), MTR, ratio=0.3)
    assert [block for block, count in enumerate(schedule.remove) if count] == list(range(1, 23, 2))


def test_the_reductions_own_cost_is_charged() -> None:
    model = meta_model("vim_s")
    schedule = make_schedule(model, MTR, ratio=0.3)
    left = model_flops(model, schedule.remove)
    assert schedule.flops == left
    assert schedule.reduction == 1 - (left + schedule.flops_overhead) / model_flops(model)
    similarity_and_merge = [
        2 * r * max(1, round(0.5 * (n - 1 - r))) * 384 + 2 * 2 * r * 384
        for n, r in zip(schedule.tokens, schedule.remove, strict=True)
        if r
    ]
    assert schedule.flops_overhead == sum(similarity_and_merge)


def test_zero_removes_nothing() -> None:
    schedule = make_schedule(meta_model(), MTR, ratio=0)
    assert (schedule.reduction, sum(schedule.remove), schedule.flops_overhead) == (0, 0, 0)


def test_given_counts_are_taken_as_they_are() -> None:
    counts = [0, 10, 0, 20, *[0] * 20]
    schedule = make_schedule(meta_model(), MTR, schedule=counts)
    assert schedule.remove == tuple(counts)
    assert schedule.tokens[:5] == (197, 197, 187, 187, 167)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, "0.3", None, True, float("nan")])
def test_a_ratio_outside_0_and_1_is_refused(ratio: object) -> None:
    with pytest.raises(UserError, match=r"mtr.ratio must be a share of the FLOPs in \[0, 1\), got"):
        make_schedule(meta_model(), MTR, ratio=ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.99}, r"mtr.ratio=0.99 is out of reach: at most 0\.\d+ of the FLOPs"),
        ({"ratio": 0.3, "schedule": [0] * 24}, "add mtr.ratio=null"),
        ({"schedule": [1] * 23}, "must hold 24 counts"),
        ({"schedule": [-1] * 24}, "counts ≥ 0"),
        ({"schedule": [9] * 24}, "removes 9 tokens after block 21: of the 8 there, mtr can remove at most 6"),
        ({"ratio": 0.3, "schedule": "cosntant"}, "must be one of constant, .* or a list of 24 counts, got 'cosntant'"),
        ({"ratio": 0.3, "schedule": {}}, "a weight above 0 for each block that reduces, of 0 to 22, got {}"),
        ({"ratio": 0.3, "schedule": {23: 1}}, "a weight above 0 for each block"),
        ({"ratio": 0.3, "schedule": {1: 0.0}}, "a weight above 0 for each block"),
        ({"ratio": 0.3, "schedule": {1: "a"}}, "a weight above 0 for each block"),
        ({"ratio": 0.3, "interval": 0}, "mtr.interval must be at least 1"),
        ({"ratio": 0.3, "first_block": 23}, r"mtr.first_block must be in \[0, 22\] for 24 blocks, got 23"),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_schedule(meta_model(), MTR, **arguments)
