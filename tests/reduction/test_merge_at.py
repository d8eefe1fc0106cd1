"""``mtr.merge_at=scan``: the result of merging after the block, by an output projection of the survivors alone."""

from typing import Any

import pytest
import torch

import mtr_lab
from mtr_lab import UserError
from mtr_lab.measure.flops import counted_flops
from mtr_lab.reduction import make_policy, policy_config
from mtr_lab.reduction.plan import make_plan
from mtr_lab.tasks.features import FeatureMaps
from mtr_lab.tokens import TokenState

DEPTH, WIDTH, INNER = 4, 16, 32
COUNTS = [5, 0, 4, 0]
POLICIES: dict[str, dict[str, Any]] = {
    "mtr": {},
    "write": {"convolution": "unmerged"},
    "tome": {},
    "pumer": {"score": "delta"},
    "utr": {"score": "delta"},
    "hsa": {},
    "storm": {},
    "storm_evit": {},
}


def model(name: str = "vim_ti") -> Any:
    torch.manual_seed(0)
    size = {"img_size": (16, 32), "patch_size": 4, "stride": 4}
    return mtr_lab.create_model(name, **size, depth=DEPTH, embed_dim=WIDTH, num_classes=3).eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 32, generator=torch.Generator().manual_seed(1))


def counts(policy: str) -> list[int]:
    return [4, 0, 7, 0] if policy.startswith("storm") else COUNTS


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_equals_merging_after_the_block(name: str, policy: str) -> None:
    made, parts = model(name), {"features": "residual", **POLICIES[policy]}
    after = mtr_lab.patch(made, policy, schedule=counts(policy), **parts).schedule
    expected, traced = made(images()), mtr_lab.trace(made, images())
    rows: list[int] = []
    for block in made.blocks:
        block.mixer.out_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    before = mtr_lab.patch(made, policy, schedule=counts(policy), merge_at="scan", **parts).schedule
    torch.testing.assert_close(made(images()), expected)
    assert rows == [*before.tokens[1:], before.tokens[-1]]
    for state, other in zip(mtr_lab.trace(made, images()), traced, strict=True):
        assert torch.equal(state.index, other.index)
        torch.testing.assert_close(state.stream, other.stream)

    removed = sum(counts(policy))
    assert after.flops - before.flops == 2 * INNER * WIDTH * removed
    assert before.flops_overhead - after.flops_overhead == 2 * (INNER - WIDTH) * removed
    assert counted_flops(made, images()) == (before.flops, before.flops_overhead)


@torch.no_grad()
def test_a_restored_position_has_its_own_stream_and_the_output_of_the_token_that_absorbed_it() -> None:
    hidden, residual = torch.randn(1, 4, 2), torch.randn(1, 6, 2)
    state = TokenState.start(residual, []).traced().tracking_offset()
    plan = make_plan(
        torch.tensor([[0, 4]]), torch.tensor([[1, -1]]), torch.arange(6.0).double()[None], torch.ones(1, 6)
    )
    after = state.with_streams(hidden, residual).reduced(plan)
    source = after.source[0].tolist()
    assert source == [0, 0, 1, 2, -1, 3]
    torch.testing.assert_close(after.stream[0, 0], hidden[0, 0] + residual[0, :2].mean(0))
    restored = torch.stack([after.stream[0, t] if t >= 0 else torch.zeros(2) for t in source]) + after.offset[0]
    expected = torch.stack([hidden[0, t] if t >= 0 else torch.zeros(2) for t in source]) + residual[0]
    torch.testing.assert_close(restored, expected)


@torch.no_grad()
def test_feature_maps() -> None:
    made = model()
    mtr_lab.patch(made, "write", schedule=COUNTS, features="residual", merge_at="scan")
    maps = FeatureMaps(made, 4, "skip")(images())
    assert [m.shape for m in maps] == [(3, WIDTH, 4, 8)] * 4


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("mtr", {}, r"merge_at=scan with mtr\.features=stream, which reads the output .* or mtr\.features=residual"),
        ("rmeeto", {}, r"mtr\.merge_at=scan with mtr\.features=hidden"),
        ("utr", {"features": "residual"}, r"mtr\.merge_at=scan with mtr\.score=hidden, .* choose another score"),
        ("mtr", {"merge_at": "out_proj"}, r"unknown mtr\.merge_at 'out_proj'.*block, mlp, scan"),
    ],
)
def test_decisions_by_the_output_of_the_block_are_refused(policy: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_policy(policy_config(policy, **{"merge_at": "scan", **changes}))
