"""``schedule=dtp``: the two blocks against scores that a trace shows, and the ratio."""

from typing import Any

import pytest
import torch

import mtr_lab
from mtr_lab import UserError
from mtr_lab.reduction.blocks import BlockInfo
from mtr_lab.reduction.dtp import two_blocks
from mtr_lab.reduction.policy import make_policy, policy_config
from mtr_lab.tokens import Layout

DEPTH = 12


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    geometry = {"img_size": 24, "patch_size": 4, "stride": 4, "embed_dim": 16, "num_classes": 5}
    return mtr_lab.create_model("vim_ti", depth=DEPTH, **geometry)


@pytest.mark.parametrize("policy", ["mtr", "write", "hsa"])
@torch.no_grad()
def test_blocks_follow_the_spread_of_the_scores(policy: str, model) -> None:
    images, spread = torch.randn(3, 3, 24, 24), []
    model.eval()
    for block in range(DEPTH):
        mtr_lab.patch(model, policy, schedule=[6 * (i == block) for i in range(DEPTH)])
        traced = mtr_lab.reduction.trace_blocks(model, images)[block]
        rows = zip(traced.score, traced.before.special[:, 0], strict=True)
        spread.append(sum(torch.cat([score[:at], score[at + 1 :]]).std() for score, at in rows) / 3)
    early = min(range(3), key=lambda block: spread[block])
    late = 1 + max(range(8, DEPTH), key=lambda block: spread[block] - spread[block - 1])

    mtr_lab.unpatch(model)
    before, model = model(images), model.train()
    reduction = mtr_lab.patch(model, policy, ratio=0.3, schedule="dtp", images=images)
    assert model.training
    assert reduction.schedule.reduction >= 0.3
    assert [block for block, count in enumerate(reduction.schedule.remove) if count] == [early, min(late, DEPTH - 2)]
    reduction.use(reduction.solve(0.0))
    assert torch.equal(model.eval()(images), before)


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [
        ([3, 1, 2, 4, 4, 4, 4, 4, 5, 9, 9, 9], [1, 10]),
        ([1, 1, 2, 9, 9, 9, 9, 9, 9, 9, 9, 12], [0, 10]),  # behind the last block none can reduce
        ([3, 2, 1, 0, 9, 9, 1, 8, 9, 8, 7, 6], [2, 9]),  # jumps before the last 30 % do not count
    ],
)
def test_early_and_late_block(deviation: list[float], expected: list[int]) -> None:
    infos = [BlockInfo(0, 37, Layout(6, 6, (18,)), 16, True, False, block == DEPTH - 1) for block in range(DEPTH)]
    assert two_blocks(deviation, infos, make_policy(policy_config("mtr"))) == expected


def test_what_it_needs_is_named(model) -> None:
    images = torch.randn(2, 3, 24, 24)
    with pytest.raises(UserError, match=r"mtr\.schedule=dtp measures on images how much the scores .*images=images\)"):
        mtr_lab.patch(model, "mtr", ratio=0.2, schedule="dtp")
    with pytest.raises(
        UserError, match=r"mtr\.schedule=dtp needs the scores of tokens, and mtr\.score=none gives none"
    ):
        mtr_lab.patch(model, "tome", ratio=0.2, schedule="dtp", images=images)
    with pytest.raises(UserError, match=r"mtr\.ratio=0\.9 is out of reach: .* when the blocks \[\d+, \d+\] reduce"):
        mtr_lab.patch(model, "mtr", ratio=0.9, schedule="dtp", images=images)
