"""``patch(model, speedup=…)`` and ``patch(model, max_drop=…)``: what is promised, and the mistakes that are named.

Times are those of a fake clock, so that no test depends on the machine.
"""

import math
import shutil
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

import mtr_lab
from mtr_lab import UserError
from mtr_lab.measure.statistics import upper_bound
from mtr_lab.reduction import Reduction, budgets, cost_table, patching, policy_config, policy_names, solver
from mtr_lab.reduction.budgets import DROP_STEP, check_budget, drop_bound, images_needed, is_for_search, solve_max_drop
from mtr_lab.reduction.cost_table import BlockTimes, CostTable, measure_cost_table, rising
from mtr_lab.reduction.schedule import OutOfReach

DEPTH = 6
GEOMETRY = {"img_size": 48, "patch_size": 8, "stride": 8, "depth": DEPTH, "embed_dim": 16, "num_classes": 5}
TOKENS = 37


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mtr_lab.create_model("vim_ti", **GEOMETRY).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_round(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake clock has no noise to average over."""
    if request.function is not test_a_promise_is_kept_on_this_machine:
        monkeypatch.setattr(cost_table, "MIN_ROUNDS", 1)
        monkeypatch.setattr(cost_table, "SECONDS", -1.0)


class Device:
    """A device that takes ``per_token`` ms for a token in a block, ``per_step`` for a step, ``rest`` for a model."""

    def __init__(self, model, per_token: float = 0.1, per_step: float = 0.2, rest: float = 2.0) -> None:
        self.per_token, self.per_step, self.rest, self.ms = per_token, per_step, rest, 0.0
        model.patch_embed.register_forward_pre_hook(partial(self._spend, lambda _: rest))
        for block in model.blocks:
            block.register_forward_pre_hook(
                partial(self._spend, lambda args, block=block: self._block(args[2].shape[1], block))
            )

    def _spend(self, cost, module, args) -> None:
        self.ms += cost(args)

    def _block(self, tokens: int, block) -> float:
        return self.per_token * tokens + self.per_step * (block.reduction is not None and block.reduction.remove > 0)

    def clock(self, call, device: torch.device) -> float:
        """The time of a call, as a clock of ``cost_table`` takes it."""
        before = self.ms
        call()
        return self.ms - before


@pytest.fixture
def device(model, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Device]:
    """Its clock is the one that ``patch`` reads."""
    device = Device(model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(patching, "cost_table", partial(cost_table.cost_table, clock=device.clock))
    monkeypatch.setattr(patching, "measured_speedup", partial(cost_table.measured_speedup, clock=device.clock))
    return device


@pytest.mark.parametrize("policy", ["mtr", "write", "hsa", "random"])
def test_a_speedup_is_promised_and_measured(policy: str, model, images, device: Device) -> None:
    reduction = mtr_lab.patch(model, policy, speedup=1.4, images=images)
    budget = reduction.budget
    assert (budget.key, budget.asked) == ("speedup", 1.4)
    assert 1.4 <= budget.promised < 1.5
    assert budget.measured == pytest.approx(budget.promised, rel=0.03)
    unreduced = device.clock(lambda: model(images), images.device)
    mtr_lab.unpatch(model)
    assert device.clock(lambda: model(images), images.device) / unreduced == pytest.approx(budget.measured)


def test_no_smaller_ratio_is_fast_enough(model, images, device: Device) -> None:
    schedule = mtr_lab.patch(model, "mtr", speedup=1.4, images=images).schedule
    mtr_lab.patch(model, "mtr", ratio=schedule.reduction - 0.03)
    slower = device.clock(lambda: model(images), images.device)
    mtr_lab.unpatch(model)
    assert device.clock(lambda: model(images), images.device) / slower < 1.4


def test_a_dear_decision_asks_for_more_removed_tokens(model, images, device: Device, tmp_path) -> None:
    cheap = mtr_lab.patch(model, "mtr", speedup=1.2, images=images).schedule
    device.per_step = 1.0
    shutil.rmtree(tmp_path / "mtr_lab")
    assert mtr_lab.patch(model, "mtr", speedup=1.2, images=images).schedule.reduction > cheap.reduction + 0.05


def test_a_speedup_out_of_reach_names_the_maximum(model, images, device: Device) -> None:
    with pytest.raises(UserError, match=r"mtr.speedup=9 is out of reach: at most (\d\.\d+) ") as refused:
        mtr_lab.patch(model, "mtr", speedup=9, images=images)
    most = float(str(refused.value).split("at most ")[1].split()[0])
    assert model.reduction is None
    assert mtr_lab.patch(model, "mtr", speedup=most, images=images).budget.promised >= most
    with pytest.raises(UserError, match="out of reach"):
        mtr_lab.patch(model, "mtr", speedup=most + 0.02, images=images)


def test_the_table_is_measured_once_for_a_batch_size(model, images, device: Device) -> None:
    mtr_lab.patch(model, "mtr", speedup=1.4, images=images)
    measured = device.ms
    first = mtr_lab.patch(model, "mtr", speedup=1.3, images=images)
    assert device.ms - measured < measured / 4  # of the promise alone
    device.per_step = 30.0
    assert mtr_lab.patch(model, "mtr", speedup=1.3, images=images).budget.promised == first.budget.promised
    with pytest.raises(UserError, match="out of reach"):
        mtr_lab.patch(model, "mtr", speedup=1.3, images=images[:2])


def test_an_unreadable_table_is_measured_again(model, images, device: Device, tmp_path) -> None:
    promised = mtr_lab.patch(model, "mtr", speedup=1.4, images=images).budget.promised
    (file,) = (tmp_path / "mtr_lab" / "cost_tables").iterdir()
    file.write_text("{")
    assert mtr_lab.patch(model, "mtr", speedup=1.4, images=images).budget.promised == pytest.approx(promised)
    assert file.read_text().startswith('{\n "of"')


def test_blocks_that_compute_the_class_token_alone_are_timed_for_themselves(model, images) -> None:
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2, last_block="read", read_share=2 / DEPTH)
    mixed: list[int] = []
    for block in (model.blocks[0], model.blocks[-2]):
        block.mixer.out_proj.register_forward_hook(lambda _, args, output: mixed.append(output.shape[1]))
    table = measure_cost_table(reduction, images, lambda: model(images), lambda call, device: call() or 1.0)
    assert table.kinds == (0,) * (DEPTH - 2) + (1, 1)
    assert 1 in mixed


def test_the_table_has_the_times_of_blocks_and_steps(model, images) -> None:
    device = Device(model)
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2)
    table = measure_cost_table(reduction, images, lambda: model(images), device.clock)
    (times,) = table.blocks
    assert table.kinds == (0,) * DEPTH
    assert times.tokens[-1] == TOKENS
    assert times.block == pytest.approx([0.1 * tokens for tokens in times.tokens])
    assert times.step == pytest.approx([0.2] * len(times.tokens))
    assert (table.unreduced, table.rest) == pytest.approx((2 + DEPTH * 0.1 * TOKENS, 2))
    assert table.scale == pytest.approx(1)
    for ratio in (0.1, 0.3, 0.5):
        schedule = reduction.solve(ratio)
        expected = 2 + 0.1 * sum(schedule.tokens) + 0.2 * sum(count > 0 for count in schedule.remove)
        assert table.ms(schedule) == pytest.approx(expected)
    assert reduction.schedule == reduction.solve(0.2)  # measuring leaves the schedule


FOR_OTHER_MODELS = {"quartermap", "frames", "mlp"}
"""Policies for grids of four paths, videos, models with an MLP."""


@pytest.mark.parametrize("name", [name for name in policy_names() if name not in FOR_OTHER_MODELS])
def test_every_policy_has_a_table(name: str, model, images) -> None:
    device = Device(model)
    reduction = Reduction(model, policy_config(name, **({"paths": "last"} if name == "directions" else {})))
    table = measure_cost_table(reduction, images, lambda: model(images), device.clock)
    schedule = reduction.solve(0.3)
    assert table.speedup(schedule) == pytest.approx(
        cost_table.measured_speedup(reduction, schedule, lambda: model(images), images.device, device.clock)
    )


def test_times_between_the_measured_ones_rise_with_the_tokens() -> None:
    noisy = BlockTimes(tokens=(10, 20, 30), block=(1.0, 4.0, 2.0), step=(0.5, 0.5, 0.5))
    times = [noisy.at(tokens, reduces=True) for tokens in range(5, 40)]
    assert times == sorted(times)
    assert noisy.at(15, reduces=False) == 2.0
    assert rising([3.0, 1.0, 2.0, 5.0, 4.0]).tolist() == [2.0, 2.0, 2.0, 4.5, 4.5]


def test_a_skipped_path_saves_its_share(model) -> None:
    one_path = BlockTimes(tokens=(1, TOKENS), block=(1.0, 37.0), step=(0.0, 0.0), path=0.25)
    table = CostTable((0,) * DEPTH, (one_path,), unreduced=2 + DEPTH * 37.0, rest=2.0)
    schedule = mtr_lab.patch(model, "directions", ratio=0.1, paths="last").schedule
    skipped = sum(map(len, schedule.skipped))
    assert skipped > 0
    assert table.ms(schedule) == pytest.approx(2 + (DEPTH - 0.25 * skipped) * 37)


def test_a_policy_that_skips_paths_times_a_block_with_one_path(model, images) -> None:
    reduction = Reduction(model, policy_config("directions", paths="last"))
    table = measure_cost_table(reduction, images, lambda: model(images), lambda call, device: call() or 1.0)
    assert table.blocks[0].path == 0.0  # each call takes as long
    clock = Device(model).clock
    slow = lambda call, device: clock(call, device) * (1 if any(map(any, reduction.schedule.skipped)) else 2)  # noqa: E731
    assert 0 < measure_cost_table(reduction, images, lambda: model(images), slow).blocks[0].path <= 1


class Fickle:
    """Predictions of a model that changes the first ``share(reduction)`` of the images, by the schedule in force."""

    def __init__(self, reduction: Reduction, share) -> None:
        self.reduction, self.share = reduction, share

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        changed = images[:, 0] < self.share(self.reduction.schedule.reduction)
        return torch.nn.functional.one_hot(changed.long(), 2).float()


@pytest.fixture
def fickle(model):
    """share(reduction) -> a reduction whose model changes this share of the images (N, 1), numbered from 0 to 1."""

    def make(share) -> Reduction:
        reduction = Reduction(model, policy_config("mtr"))
        reduction._model = Fickle(reduction, share)
        reduction.solve = partial(Reduction.solve, stand_in := Reduction(model, policy_config("mtr")))
        reduction.use = partial(setattr, reduction._active, "schedule")
        assert stand_in.model is model
        return reduction

    return make


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count)[:, None] / count


def test_the_largest_ratio_within_the_drop_is_taken(fickle) -> None:
    reduction = fickle(lambda removed: removed / 10)  # 1 % changes for every 10 % removed
    schedule, budget = solve_max_drop(reduction, 0.05, numbered(1000))
    assert (budget.key, budget.asked, budget.measured) == ("max_drop", 0.05, None)
    changed = math.ceil(1000 * schedule.reduction / 10)
    assert budget.promised == upper_bound(changed, 1000) <= 0.05
    following = reduction.solve(DROP_STEP * (math.floor(schedule.reduction / DROP_STEP) + 1))
    assert upper_bound(math.ceil(1000 * following.reduction / 10), 1000) > 0.05


def test_the_search_ends_at_the_first_ratio_that_fails(fickle) -> None:
    """A ratio beyond one that fails may look good by chance: it is not tested."""
    reduction = fickle(lambda removed: 0.5 if 0.1 < removed < 0.13 else 0.0)
    assert solve_max_drop(reduction, 0.05, numbered(100))[0].reduction < 0.11


@pytest.mark.parametrize("true_drop", [0.06, 0.08])
def test_a_drop_beyond_the_promise_is_rare(true_drop: float, model, fickle) -> None:
    """Images at random: a ratio above 0.1, where the drop is too large, is accepted in at most 5 % of 400 trials."""
    rng = torch.Generator().manual_seed(0)
    reduction = fickle(lambda removed: 0.0 if removed < 0.1 else true_drop)
    schedules = {step: reduction.solve(step * DROP_STEP) for step in range(1, 6)}
    solve = reduction.solve
    reduction.solve = lambda ratio: (
        schedules.get(round(ratio / DROP_STEP))
        or (solve(ratio) if ratio == 0 else (_ for _ in ()).throw(OutOfReach("out of reach")))
    )
    wrong = 0
    for _ in range(400):
        drawn = torch.rand(150, 1, generator=rng)
        wrong += solve_max_drop(reduction, 0.05, drawn)[0].reduction >= 0.1
    assert wrong / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    if true_drop == 0.06:
        assert wrong  # the level is used


def test_a_loss_of_top1_counts_what_is_gained(fickle) -> None:
    labels = torch.zeros(400, dtype=torch.long)
    labels[:200] = 1  # the unreduced model says 0: images that change gain the right class
    reduction = fickle(lambda removed: 0.4 if removed else 0.0)
    with pytest.raises(UserError, match="400 calibration images change their class"):
        solve_max_drop(reduction, 0.05, numbered(400))
    assert solve_max_drop(reduction, 0.05, numbered(400), labels)[1].promised < 0
    with pytest.raises(UserError, match="160 of 400 calibration images lose the right class and 0 gain it"):
        solve_max_drop(reduction, 0.05, numbered(400), 1 - labels)


def test_the_bound_of_a_loss_is_not_below_that_of_its_parts() -> None:
    assert drop_bound(7, None, 500) == upper_bound(7, 500, 0.95)
    assert drop_bound(7, 0, 500) == upper_bound(7, 500, 0.975)
    assert drop_bound(7, 3, 500) < drop_bound(7, 0, 500)


@pytest.mark.parametrize(("drop", "with_labels"), [(0.01, False), (0.05, False), (0.05, True)])
def test_the_images_that_a_proof_needs(drop: float, with_labels: bool, fickle) -> None:
    needed = images_needed(drop, with_labels)
    gained = 0 if with_labels else None
    assert drop_bound(0, gained, needed) <= drop < drop_bound(0, gained, needed - 1)
    assert not with_labels or needed > images_needed(drop)
    perfect = fickle(lambda removed: 0.0)
    labels = torch.zeros(needed, dtype=torch.long) if with_labels else None
    assert solve_max_drop(perfect, drop, numbered(needed), labels)[0].reduction > 0.5
    with pytest.raises(UserError, match=rf"cannot be shown .* give at least {needed}"):
        solve_max_drop(perfect, drop, numbered(needed - 1), None if labels is None else labels[1:])


def test_a_patched_model_keeps_its_drop(model) -> None:
    images = torch.randn(80, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    reduction = mtr_lab.patch(model, "mtr", max_drop=0.4, images=images)
    with torch.no_grad():
        reduced = model(images).argmax(-1)
        mtr_lab.unpatch(model)
        changed = int((model(images).argmax(-1) != reduced).sum())
    assert reduction.budget.promised == upper_bound(changed, 80) <= 0.4


def test_a_drop_is_not_measured_on_images_that_chose_the_schedule(model, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(80, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    seen: dict[str, torch.Tensor] = {}
    search, solve = solver.GreedySearch, budgets.solve_max_drop
    monkeypatch.setattr(
        solver, "GreedySearch", lambda *args, **more: seen.update(chosen=args[4]) or search(*args, **more)
    )
    monkeypatch.setattr(
        patching, "solve_max_drop", lambda *args, **more: seen.update(tested=args[2]) or solve(*args, **more)
    )
    mtr_lab.patch(model, "mtr", max_drop=0.5, images=images, schedule="auto")
    both = torch.cat([seen["chosen"], seen["tested"]]).flatten(1)[:, 0]
    assert len(seen["chosen"]) == 40
    assert sorted(both.tolist()) == sorted(images.flatten(1)[:, 0].tolist())
    assert is_for_search(1000).sum() == 128


def test_bad_budgets_are_explained(model, images) -> None:
    with pytest.raises(UserError, match="ratio=0.3 and speedup=1.5: give one of ratio, speedup, max_drop"):
        mtr_lab.patch(model, ratio=0.3, speedup=1.5, images=images)
    with pytest.raises(UserError, match="speedup is measured on images, and none were given: pass a batch"):
        mtr_lab.patch(model, speedup=1.5)
    with pytest.raises(UserError, match="max_drop is measured on images, and none were given: pass hundreds"):
        mtr_lab.patch(model, max_drop=0.1)
    with pytest.raises(UserError, match="schedule gives the counts itself: leave speedup out"):
        mtr_lab.patch(model, speedup=1.5, schedule=[0, 1, 0, 0, 0, 0], images=images)
    with pytest.raises(UserError, match=r"max_drop=0.1 cannot be shown .* on 4 calibration images.* at least 29"):
        mtr_lab.patch(model, max_drop=0.1, images=images)
    with pytest.raises(UserError, match=r"labels have the shape \(3,\)"):
        mtr_lab.patch(model, max_drop=0.1, images=images, labels=torch.zeros(3))
    with pytest.raises(UserError, match="labels are for max_drop"):
        mtr_lab.patch(model, ratio=0.3, labels=torch.zeros(4))
    assert model.reduction is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("speedup", v) for v in (1, 0.5, math.inf, "2", True)] + [("max_drop", v) for v in (0, 1, 5, "a")],
)
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"mtr.{key}={value}: expected"):
        check_budget({"ratio": None, key: value})


@pytest.mark.slow
def test_a_promise_is_kept_on_this_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = mtr_lab.create_model("vim_nano").eval()
    budget = mtr_lab.patch(model, "mtr", speedup=1.3, images=torch.randn(8, 3, 112, 112)).budget
    assert np.isfinite(budget.promised)
    assert 1.0 < budget.measured < 2.0
