"""``mtr.last_block=read``: the same output, by a last block that computes the class token alone."""

from typing import Any

import pytest
import torch

import mtr_lab
from mtr_lab.measure.flops import counted_flops, model_flops
from mtr_lab.reduction import make_schedule
from mtr_lab.tasks.features import FeatureMaps

COUNTS = [5, 3, 4, 0]
WIDTH, INNER, RANK, STATES = 16, 32, 1, 16
POLICIES: dict[str, dict[str, Any]] = {
    "mtr": {},
    "write": {"convolution": "unmerged"},
    "utr": {"stretch": "exact"},
    "hsa": {},
    "evit": {},
    "tome": {"features": "residual", "merge_at": "scan"},
}


def model(name: str = "vim_ti", **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"img_size": (16, 32), "patch_size": 4, "stride": 4, "depth": 4, "embed_dim": WIDTH, "num_classes": 3}
    return mtr_lab.create_model(name, **size, **options).eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_equals_the_whole_block(name: str, policy: str) -> None:
    made, parts = model(name), POLICIES[policy]
    whole = mtr_lab.patch(made, policy, schedule=COUNTS, **parts).schedule
    expected, pooled = made(images()), made.pooled(images())
    rows: list[int] = []
    made.blocks[-1].mixer.out_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    read = mtr_lab.patch(made, policy, schedule=COUNTS, last_block="read", **parts).schedule
    torch.testing.assert_close(made(images()), expected)
    torch.testing.assert_close(made.pooled(images()), pooled)
    assert rows == [1, 1]
    assert counted_flops(made, images()) == (read.flops, read.flops_overhead)
    assert read.flops_overhead == whole.flops_overhead
    assert read.flops_literature < whole.flops_literature


def test_flops() -> None:
    made, tokens = model(), 33 - sum(COUNTS)
    schedules = [mtr_lab.patch(made, "mtr", schedule=COUNTS, last_block=how).schedule for how in ("whole", "read")]
    direction = 2 * INNER * (4 + RANK + 2 * STATES + RANK)
    whole = tokens * (6 * WIDTH * INNER + 2 * (direction + 9 * INNER * STATES + 2 * INNER))
    projections = 2 * WIDTH * INNER * (tokens + 1) + 2 * INNER * WIDTH
    read = projections + (tokens + 1) * (direction + 7 * INNER * STATES) + 2 * (2 * INNER * STATES + 2 * INNER)
    assert schedules[0].flops - schedules[1].flops == whole - read
    exponentials = [schedule.exponentials for schedule in schedules]
    assert exponentials[0] - exponentials[1] == (tokens - 1) * INNER * STATES


@torch.no_grad()
def test_one_direction_alone_is_scanned_whole() -> None:
    made, outputs, flops = model(), [], []
    for how in ("whole", "read"):
        reduction = mtr_lab.patch(made, "mtr", schedule=COUNTS, paths="last", last_block=how)
        skipped = ((), (), (), ("backward",))
        reduction.use(make_schedule(made, reduction.policy, schedule=COUNTS, skipped=skipped))
        outputs.append(made(images()))
        flops.append(counted_flops(made, images())[0])
        assert flops[-1] == reduction.schedule.flops
    torch.testing.assert_close(*outputs)
    assert flops[0] - flops[1] == 2 * WIDTH * INNER * 2 * (33 - sum(COUNTS) - 1)  # of gate and out_proj


@torch.no_grad()
def test_the_last_block_alone_reaches_a_small_ratio() -> None:
    made = model()
    expected = made(images())
    reduction = mtr_lab.patch(made, "mtr", ratio=0.05, last_block="read")
    assert reduction.schedule.remove == (0, 0, 0, 0)
    torch.testing.assert_close(made(images()), expected)
    reduction.use(reduction.solve(0.0))
    assert counted_flops(made, images()) == (model_flops(made), 0)
    assert torch.equal(made(images()), expected)


@pytest.mark.parametrize("pooling", ["avg", ""])
@torch.no_grad()
def test_heads_that_read_all_tokens(pooling: str) -> None:
    made = model(global_pool=pooling)
    whole = mtr_lab.patch(made, "mtr", schedule=COUNTS).schedule
    expected = made(images())
    read = mtr_lab.patch(made, "mtr", schedule=COUNTS, last_block="read").schedule
    assert read.flops == whole.flops
    assert torch.equal(made(images()), expected)


@torch.no_grad()
def test_all_tokens_where_they_are_asked_for() -> None:
    made = model()
    mtr_lab.patch(made, "mtr", schedule=COUNTS)
    features, states = made.forward_features(images()), mtr_lab.trace(made, images())
    maps = FeatureMaps(made)(images())
    mtr_lab.patch(made, "mtr", schedule=COUNTS, last_block="read")
    assert torch.equal(made.forward_features(images()), features)
    assert torch.equal(mtr_lab.trace(made, images())[-1].hidden, states[-1].hidden)
    assert all(map(torch.equal, FeatureMaps(made)(images()), maps))


@torch.no_grad()
def test_a_last_block_that_removes_tokens_is_whole() -> None:
    made, counts = model(), [5, 3, 4, 2]
    whole = mtr_lab.patch(made, "mtr", schedule=counts).schedule
    expected = made(images())
    assert mtr_lab.patch(made, "mtr", schedule=counts, last_block="read").schedule.flops == whole.flops
    assert torch.equal(made(images()), expected)


@torch.no_grad()
def test_modules_with_hooks_are_called() -> None:
    made, called = model(), []
    mtr_lab.patch(made, "hsa", schedule=COUNTS, last_block="read")
    expected, mixer = made(images()), made.blocks[-1].mixer
    for module in (mixer.in_proj, mixer.conv1d, mixer.dt_proj_b, mixer.out_proj):
        module.register_forward_hook(lambda module, args, output: called.append(module))
    torch.testing.assert_close(made(images()), expected)
    assert set(called) == {mixer.in_proj, mixer.conv1d, mixer.dt_proj_b, mixer.out_proj}


@pytest.mark.parametrize("parts", [{"last_block": "read"}, {"input": "variance"}])
def test_a_policy_acts_without_removing_tokens_in_blocks(parts: dict[str, str]) -> None:
    reduction = mtr_lab.patch(model(), "mtr", schedule=[0, 0, 0, 0], **parts)
    assert reduction.schedule.acts
    assert reduction.schedule.reduction > 0
    assert not reduction.solve(0.0).acts
