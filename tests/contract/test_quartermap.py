"""QuarterMap: the scan of one of each 2 x 2 tokens, against loops; where it acts, and what does not go with it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import FOUR, TOYS, Toy

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.measure.flops import counted_flops
from mtr_lab.reduction import trace
from mtr_lab.tokens import Layout, TokenState
from mtr_lab.tokens.grid import sample, spread


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return Toy(**{**TOYS["grid_stages"], "size": (32, 24), **changes}).eval()


@pytest.mark.parametrize("layout", [Layout(4, 6), Layout(3, 5), Layout(1, 4), Layout(2, 3, frames=2)])
def test_one_token_stands_for_its_square(layout: Layout) -> None:
    values = torch.arange(layout.tokens).float()[None, :, None].repeat(2, 1, 3).requires_grad_()
    chosen = sample(values, layout)
    assert chosen.shape == (2, layout.sampled.tokens, 3)
    restored = spread(chosen, layout)
    for token, value in enumerate(restored[1, :, 2].tolist()):
        frame, place = divmod(token, layout.rows * layout.columns)
        row, column = divmod(place, layout.columns)
        square = row // 2 * 2, column // 2 * 2
        assert value == frame * layout.rows * layout.columns + square[0] * layout.columns + square[1]
    assert torch.autograd.gradcheck(lambda x: spread(sample(x, layout), layout), values.double())


@torch.no_grad()
def test_a_mixer_scans_a_quarter_and_the_rest_is_whole() -> None:
    """The first block, step by step: whole convolution and projections, the scan on the even rows and columns."""
    model = make()
    images = torch.randn(2, 3, 32, 24)
    mtr_lab.patch(model, "quartermap", ratio=0.01)
    actual = trace(model, images)[0]
    mtr_lab.unpatch(model)
    block, mixer, state = model.blocks[0], model.blocks[0].mixer, model.embed(images)
    normed, residual = block.norm(state.hidden, None, None)
    maps = mixer.in_proj(normed).transpose(1, 2).unflatten(2, (8, 6))
    u = F.silu(mixer.conv(maps))[:, :, ::2, ::2].flatten(2).transpose(1, 2)
    delta, b, c = mixer.x_proj(u).split([mixer.inner, 4, 4], dim=-1)
    grid, total = torch.arange(12).view(4, 3), 0
    for order in (grid.flatten(), grid.flatten().flip(0), grid.T.flatten(), grid.T.flatten().flip(0)):
        inputs = (t[None, :, order] for t in (u, delta, b, c))
        u_, delta_, b_, c_ = inputs
        y, _ = ops.selective_scan(u_, delta_, -mixer.A_log.exp()[None], b_, c_, mixer.D[None])
        total = total + torch.zeros_like(y).index_copy(1, order, y)
    wide = F.interpolate(total.transpose(1, 2).unflatten(2, (4, 3)), scale_factor=2, mode="nearest")
    hidden = mixer.out_proj(wide.flatten(2).transpose(1, 2))
    normed, residual = block.mlp_norm(hidden, residual, None)
    torch.testing.assert_close(actual.residual, residual)
    torch.testing.assert_close(actual.hidden, block.mlp(normed))


@torch.no_grad()
def test_the_last_stage_scans_all_and_the_saving_is_counted() -> None:
    model = make()
    images = torch.randn(2, 3, 32, 24)
    before = model(images)
    reduction = mtr_lab.patch(model, "quartermap", ratio=0.01)
    schedule = reduction.schedule
    states = [model.embed(images)] * 6
    sampled = [block.reduction.positions(state).sampled for block, state in zip(model.blocks, states, strict=True)]
    assert sampled == 3 * [True] + 3 * [False]
    mixer = model.blocks[0].mixer
    per_token = 2 * mixer.x_proj.weight.numel() + 4 * mixer.inner * (9 * 4 + 2)
    assert schedule.flops_unreduced - schedule.flops == 3 * 36 * per_token  # 12 of 48 tokens in 3 blocks
    assert counted_flops(model, images) == (schedule.flops, 0)
    model(images).square().sum()
    with torch.enable_grad():
        model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    reduction.use(reduction.solve(0.0))
    assert torch.equal(model(images), before)
    with pytest.raises(UserError, match=r"out of reach: at most 0\.\d+ of the FLOPs .* mtr\.schedule=none"):
        reduction.solve(0.9)


@torch.no_grad()
def test_tokens_are_removed_where_the_grid_may_go() -> None:
    """MTR in the last stage alone; STORM, which leaves a full grid, in every stage."""
    model = make()
    images = torch.randn(2, 3, 32, 24)
    quarter = mtr_lab.patch(model, "quartermap", ratio=0.01).schedule.reduction
    wanted = {
        "mtr": {"ratio": quarter + 0.05, "first_block": 0, "interval": 1},
        "storm": {"schedule": [8, 0, 5, 0, 0, 0]},
        "storm_evit": {"schedule": [13, 0, 0, 4, 0, 0]},
    }
    for policy, counts in wanted.items():
        schedule = mtr_lab.patch(model, policy, paths="quarter", **counts).schedule
        assert (sum(schedule.remove[:3]) > 0) == (policy != "mtr")
        assert sum(schedule.remove) > 0
        assert counted_flops(model, images) == (schedule.flops, schedule.flops_overhead)
        assert model(images).isfinite().all()


def test_what_does_not_go_with_it_is_refused() -> None:
    vim = mtr_lab.create_model("vim_ti", img_size=32, depth=2, embed_dim=16)
    with pytest.raises(
        UserError, match=r"mtr\.paths=quarter scans .* along four paths, and Vim has none there: choose"
    ):
        mtr_lab.patch(vim, "quartermap", ratio=0.01)
    with pytest.raises(UserError, match="and Toy has none there"):  # one stage, which is the last
        mtr_lab.patch(Toy(paths=FOUR, grid=True), "quartermap", ratio=0.01)
    with pytest.raises(
        UserError, match=r"removes tokens after block 1, and mtr\.paths=quarter scans one of each 2 x 2"
    ):
        mtr_lab.patch(make(), "random", paths="quarter", schedule=[0, 3, 0, 0, 0, 0])
    state = TokenState.start(torch.zeros(1, 4, 2), ())
    with pytest.raises(ValueError, match="only of a full grid"):
        mtr_lab.tokens.positions.Positions(state, sampled=True).sample(torch.zeros(1, 4, 2))
