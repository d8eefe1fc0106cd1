"""The policy ``fovea``, and blocks before the last that compute the class token alone."""

from itertools import pairwise

import pytest
import torch

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.measure.flops import counted_flops
from mtr_lab.reduction import decision, make_policy, policy_config
from mtr_lab.tokens import Evidence, Layout, TokenState

GEOMETRY = {"img_size": (32, 64), "patch_size": 8, "stride": 8, "embed_dim": 16, "num_classes": 3}


def model(name: str = "vim_ti", depth: int = 6, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return mtr_lab.create_model(name, depth=depth, **GEOMETRY, **options).eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 64, generator=torch.Generator().manual_seed(1))


def reduced_state(layout: Layout) -> TokenState:
    torch.manual_seed(0)
    state = TokenState.start(torch.randn(3, layout.tokens, 8), layout.special, layout)
    plan = make_policy(policy_config("random"))(
        state._replace(raw_residual=state.hidden), Evidence.none(state.hidden), 9
    )
    state = state._replace(raw_residual=torch.randn(3, layout.tokens, 8)).reduced(plan).applied()
    return state._replace(size=torch.randint(1, 5, state.size.shape).float())


@pytest.mark.parametrize("layout", [Layout(5, 6, (15,)), Layout(1, 30), Layout(3, 4, (0, 20), frames=3), Layout(30, 1)])
@pytest.mark.parametrize(
    "changes", [{}, {"selection": "similarity", "merge": "mean"}, {"selection": "score", "score": "random"}]
)
def test_the_fused_decision_equals_its_parts(layout: Layout, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, state = make_policy(policy_config("fovea", **changes)), reduced_state(layout)
    fused = policy(state, Evidence.none(state.hidden), 8)
    monkeypatch.setattr(decision, "_is_among_neighbours", lambda settings: False)
    composed = policy(state, Evidence.none(state.hidden), 8)
    assert fused.metadata is not None
    assert composed.metadata is None
    assert torch.equal(fused.dest, composed.dest)
    assert torch.equal(fused.keep, composed.keep)
    torch.testing.assert_close(fused.weight, composed.weight)


@pytest.mark.parametrize("grouping", ["asymmetric", "halves"])
def test_other_groupings_match_among_neighbours(grouping: str) -> None:
    state = reduced_state(Layout(5, 6, (15,)))
    policy = make_policy(policy_config("mtr", score="random", grouping=grouping, matching="neighbours"))
    plan = policy(state, Evidence.none(state.hidden), 5)
    index = state.index - (state.index > 15).long()
    near = 0
    for b in range(3):
        for token in plan.removed[b].tolist():
            into = int(plan.keep[b, plan.dest[b, token]])
            (row, column), (other_row, other_column) = (divmod(int(index[b, t]), 6) for t in (token, into))
            near += max(abs(row - other_row), abs(column - other_column)) <= 1
    assert near >= 12  # of 15; the others have no neighbour among the targets


@pytest.mark.parametrize(
    ("depth", "ratio", "blocks"),
    [(6, 0.2, {0, 1, 3}), (16, 0.5, {0, 1, 3, 6, 10}), (24, 0.5, {0, 1, 3, 6, 10, 15}), (2, 0.2, {0})],
)
def test_early_blocks_at_widening_intervals(depth: int, ratio: float, blocks: set[int]) -> None:
    schedule = mtr_lab.patch(model(depth=depth), "fovea", ratio=ratio).schedule
    removed = {block: count for block, count in enumerate(schedule.remove) if count}
    assert schedule.reduction >= ratio
    assert set(removed) <= blocks
    counts = list(removed.values())
    assert all(later <= count + 1 for count, later in pairwise(counts))  # one token more where it fits the ratio best
    assert len(counts) < 2 or 0.4 < counts[1] / counts[0] < 1


def test_a_ratio_out_of_reach_states_the_most() -> None:
    with pytest.raises(UserError, match=r"mtr\.ratio=0\.95 is out of reach: at most 0\.\d+"):
        mtr_lab.patch(model(), "fovea", ratio=0.95)
    with pytest.raises(UserError, match=r"mtr\.interval must be at least 1, or widening, got 'wide'"):
        mtr_lab.patch(model(), "fovea", ratio=0.2, interval="wide")


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
@torch.no_grad()
def test_blocks_before_the_last_compute_the_class_token_alone(name: str) -> None:
    """As if the other tokens skipped these blocks."""
    made, parts = model(name), {"schedule": [5, 3, 4, 0, 0, 0], "last_block": "read"}
    exact = mtr_lab.patch(made, "mtr", **parts).schedule
    alone = mtr_lab.patch(made, "mtr", **parts, read_share=0.5).schedule
    actual, rows = made(images()), []
    assert counted_flops(made, images()) == (alone.flops, alone.flops_overhead)
    assert alone.flops < exact.flops

    mtr_lab.patch(made, "mtr", **parts)
    for block in list(made.blocks)[3:5]:
        block.register_forward_hook(skip_all_but_the_class_token)
    torch.testing.assert_close(made(images()), actual)
    made.blocks[3].mixer.out_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    mtr_lab.patch(made, "mtr", **parts, read_share=0.5)
    made(images())
    assert rows == [1]


def skip_all_but_the_class_token(block: torch.nn.Module, args: tuple, after: TokenState) -> TokenState:
    special = torch.zeros_like(after.size).scatter(1, after.special, 1)
    return after._replace(raw_hidden=after.raw_hidden * special[..., None])


def test_tokens_are_not_removed_where_the_class_token_is_alone() -> None:
    parts = {"schedule": "constant", "first_block": 0, "interval": 1}
    schedule = mtr_lab.patch(model(), "fovea", ratio=0.4, read_share=0.5, **parts).schedule
    assert [count > 0 for count in schedule.remove] == [True] * 3 + [False] * 3
    pooled = model(global_pool="avg")  # reads all tokens
    schedule = mtr_lab.patch(pooled, "fovea", ratio=0.4, read_share=0.5, **parts).schedule
    assert [count > 0 for count in schedule.remove] == [True] * 5 + [False]
    with torch.no_grad():
        assert counted_flops(pooled, images()) == (schedule.flops, schedule.flops_overhead)


@torch.no_grad()
def test_one_image_and_a_batch() -> None:
    made = model()
    mtr_lab.patch(made, "fovea", ratio=0.4)
    expected = made(images())
    torch.testing.assert_close(torch.cat([made(image[None]) for image in images()]), expected)
    with ops.use_backend("reference"):
        torch.testing.assert_close(made(images()), expected)


def test_gradients() -> None:
    made, grads = model(), []
    mtr_lab.patch(made, "fovea", ratio=0.4)
    for backend in ("auto", "reference"):
        made.zero_grad()
        with ops.use_backend(backend):
            made(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in made.parameters()])
    assert all(grad.isfinite().all() for grad in grads[0])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
