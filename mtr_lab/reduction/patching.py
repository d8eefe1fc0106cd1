"""Attach a policy to a model, and remove it again."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones import Backbone, blocks_of, height_and_width, missing_members
from mtr_lab.backbones.interface import MEMBERS
from mtr_lab.errors import UserError
from mtr_lab.reduction.active import ActiveBlockReduction, ActiveReduction
from mtr_lab.reduction.blocks import block_infos, reducing_blocks
from mtr_lab.reduction.budgets import (
    MAX_DROP,
    SPEEDUP,
    Budget,
    check_budget,
    check_images,
    is_for_search,
    solve_max_drop,
    solve_speedup,
)
from mtr_lab.reduction.cost_table import cost_table, measured_speedup
from mtr_lab.reduction.policy import Policy, make_policy, policy_config
from mtr_lab.reduction.schedule import AUTO, Schedule, make_schedule
from mtr_lab.reduction.sensitivity import GreedySearch


class Reduction:
    """The handle of a patched model: solves schedules and switches between them.

    Args:
        model: the model to patch.
        config: the configuration of the policy, see ``policy_config``.
        img_size: (height, width) that schedules are solved for, the model's own by default.
        images: (B, channels, H, W) on the model's device, for ``schedule=auto`` to measure on; they set ``img_size``.
        kind: the class of the policy.
    """

    def __init__(
        self,
        model: Backbone,
        config: dict[str, Any],
        img_size: tuple[int, int] | None = None,
        images: Tensor | None = None,
        kind: type[Policy] = Policy,
    ) -> None:
        self.config = config
        self.policy = make_policy(config, kind)
        self.policy.check(model)
        self.model = model
        self.budget: Budget | None = None
        """What ``patch`` was asked for instead of a ratio, promised and measured."""
        self._img_size = img_size if images is None else (images.shape[-2], images.shape[-1])
        self._images = images
        self._search: GreedySearch | None = None
        _detach(model)
        self._active = ActiveReduction(self.policy, self.solve(0.0))
        model.reduction = self._active
        for number, block in enumerate(blocks_of(model)):
            block.reduction = ActiveBlockReduction(self._active, number)

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        return self._active.schedule

    def solve(self, ratio: float | None) -> Schedule:
        """The schedule that removes this share of the FLOPs; for ``None`` the configured counts.

        Raises:
            UserError: as ``make_schedule``, which refuses ``auto`` without images.
        """
        counts, layers = self.config["schedule"], self.config["layers"]
        solve = partial(make_schedule, self.model, self.policy, ratio=ratio, img_size=self._img_size, layers=layers)
        if counts == AUTO and ratio and self._images is not None:
            solve(first_block=0, interval=1)  # refuses a ratio out of reach before anything is measured
            return solve(schedule=self._measured(ratio, self._images))
        blocks = {key: self.config[key] for key in ("first_block", "interval")}
        return solve(schedule="constant" if ratio == 0 else counts, **blocks)

    def release_images(self) -> None:
        """Free the images that ``schedule=auto`` measures on, and what was measured: no more ratios can be solved."""
        self._images = self._search = None

    def _measured(self, ratio: float, images: Tensor) -> dict[int, float]:
        """The counts of the measured schedule by block, as weights for ``make_schedule``."""
        self._check_active()
        model: Any = self.model
        training, schedule = model.training, self.schedule
        model.eval()
        try:
            if self._search is None:
                infos = block_infos(model, self.policy, self._img_size)
                blocks = reducing_blocks(infos, self.policy, first_block=0, interval=1, layers=self.config["layers"])
                self._search = GreedySearch(model, self.use, self.policy, blocks, images)
            measured = self._search.reach(ratio)
        finally:
            model.train(training)
            self.use(schedule)
        return {block: count for block, count in enumerate(measured.remove) if count}

    def __repr__(self) -> str:
        removed = f"{100 * self.schedule.reduction:.1f} % of the FLOPs removed"
        budget = "" if self.budget is None else f", {self.budget}"
        return f"Reduction({self.policy.policy!r}, {removed}, tokens {list(self.schedule.tokens)}{budget})"

    def use(self, schedule: Schedule) -> None:
        """Put a schedule in force; the model's next forward pass follows it.

        Raises:
            UserError: the model was unpatched or patched anew since; the schedule is of another depth.
        """
        self._check_active()
        if len(schedule.remove) != (depth := len(blocks_of(self.model))):
            raise UserError(f"a schedule of {len(schedule.remove)} blocks does not fit a model of {depth}.")
        self._active.schedule = schedule

    def _check_active(self) -> None:
        if self.model.reduction is not self._active:
            raise UserError("this reduction is no longer in force: the model was unpatched or patched anew.")


def patch(
    model: nn.Module,
    policy: str | Path | Policy = "mtr",
    *,
    ratio: float | None = None,
    speedup: float | None = None,
    max_drop: float | None = None,
    schedule: str | Sequence[int] | None = None,
    img_size: int | tuple[int, int] | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    **parts: Any,
) -> Reduction:
    """Make a pretrained model cheaper, in place: ``patch(model, "mtr", ratio=0.4)``; ``model(images)`` now reduces.

    Blocks remove tokens after their mixers. Parameters and state dict are untouched, and ``unpatch`` restores the model
    bit for bit. Patching a patched model replaces its policy.

        patch(model, "mtr", speedup=1.5, images=batch)        # 1.5 times as fast on this device, at this batch size
        patch(model, "mtr", max_drop=0.02, images=unlabelled) # at most 2 % of the classes change, 95 % confidence

    Args:
        model: a model of this library, or any other with the members of ``mtr_lab.backbones.Backbone``.
        policy: the name of a policy in conf/reduction, the path of a YAML file, or a policy.
        ratio: share of the unreduced model's FLOPs to remove, the policy's own steps charged.
        speedup: instead of a ratio, how many times as fast the model has to be on ``images``; the cost table that this
            is solved on is cached, see ``mtr_lab.reduction.cost_table``.
        max_drop: instead of a ratio, the largest share of images whose class may change, or with ``labels`` the largest
            loss of top-1, a fraction: the largest ratio that keeps it with 95 % confidence on images like ``images``.
        schedule: with a budget, how the counts of the blocks relate (``constant``, ``linear``, ``front``, or ``auto``,
            measured on ``images``); without one, how many tokens to remove after each block.
        img_size: side or (height, width) of the images that the ratio refers to, the model's own size by default.
        images: (B, channels, H, W), preprocessed for the model and on its device; they set ``img_size``. For
            ``schedule="auto"``, about a hundred; do not evaluate on the same images. For ``speedup``, a batch of the
            size that the model will get. For ``max_drop``, hundreds that the model was not trained on; with ``auto``,
            up to 128 of them choose the schedule, and the drop is measured on the others.
        labels: (B,) classes of the images, for ``max_drop``.
        parts: changes to the policy's configuration, e.g. ``target_fraction=0.3``.

    Returns:
        The handle. Its ``schedule`` has the token counts and the FLOPs, its ``budget`` what was asked for instead of a
        ratio, what is promised, and the speed-up measured.

    Raises:
        UserError: an unknown policy or part, a file that holds no policy, several budgets or none, a budget out of
            reach (states the maximum), images that are missing or too few, or a model of another library.
    """
    backbone = as_backbone(model, "patch")
    config = policy_config(policy, **parts)
    asked = check_budget({"ratio": ratio, SPEEDUP: speedup, MAX_DROP: max_drop}, name="")
    if schedule is not None:
        config["schedule"] = schedule
    elif asked is None:
        raise UserError(
            "patch needs a ratio (share of the FLOPs to remove), a speedup or a max_drop, or a schedule (tokens to "
            "remove a block)."
        )
    if labels is not None and max_drop is None:
        raise UserError("labels are for max_drop: leave them out.")
    measured_on = None if asked is None or asked[0] == "ratio" else _budget_images(config, asked[0], images, labels)
    if max_drop is not None and config["schedule"] == AUTO and images is not None:
        chosen = is_for_search(len(images), images.device)
        measured_on, labels, images = images[~chosen], labels if labels is None else labels[~chosen], images[chosen]
    if max_drop is not None and measured_on is not None:
        check_images(len(measured_on), max_drop, labels is not None, "max_drop")
    kind = type(policy) if isinstance(policy, Policy) else Policy
    reduction = Reduction(backbone, config, None if img_size is None else height_and_width(img_size), images, kind)
    try:
        if measured_on is None:
            reduction.use(reduction.solve(ratio))
        else:
            reduction.use(_solve_budget(reduction, speedup, max_drop, measured_on, labels))
    except UserError:
        unpatch(model)
        raise
    return reduction


def _budget_images(config: dict[str, Any], key: str, images: Tensor | None, labels: Tensor | None) -> Tensor:
    """The images to measure a budget on; raises a ``UserError`` if it cannot be measured."""
    if not isinstance(config["schedule"], str):
        raise UserError(f"schedule gives the counts itself: leave {key} out, or name a schedule, such as constant.")
    if images is None:
        which = (
            "a batch of the size that the model will get" if key == SPEEDUP else "hundreds, unlabelled or with labels"
        )
        raise UserError(f"{key} is measured on images, and none were given: pass {which}, as patch(…, images=images).")
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(f"labels have the shape {tuple(labels.shape)}: expected one for each of {len(images)} images.")
    return images


def _solve_budget(
    reduction: Reduction, speedup: float | None, max_drop: float | None, images: Tensor, labels: Tensor | None
) -> Schedule:
    """The schedule of a budget, which ``reduction.budget`` then states."""
    model: Any = reduction.model
    training = model.training
    model.eval()
    try:
        if speedup is None:
            assert max_drop is not None
            schedule, reduction.budget = solve_max_drop(reduction, max_drop, images, labels)
            return schedule
        run = partial(model, images)
        schedule, budget = solve_speedup(reduction, speedup, cost_table(reduction, images, run, model))
        measured = measured_speedup(reduction, schedule, run, images.device)
        reduction.budget = replace(budget, measured=measured)
        return schedule
    finally:
        model.train(training)


def unpatch(model: nn.Module) -> None:
    """Remove the policy; the model computes what it did before ``patch``, bit for bit."""
    _detach(as_backbone(model, "unpatch"))


@contextlib.contextmanager
def keeping_policy(model: Backbone) -> Iterator[None]:
    """Restore the policy that the model has now, or none, at the end of the block; the old handle is valid again."""
    modules: list[Any] = [model, *blocks_of(model)]
    reductions = [module.reduction for module in modules]
    try:
        yield
    finally:
        for module, reduction in zip(modules, reductions, strict=True):
            module.reduction = reduction


def _detach(model: Backbone) -> None:
    model.reduction = None
    for block in blocks_of(model):
        block.reduction = None


def as_backbone(model: nn.Module, function: str) -> Backbone:
    """The model, which ``function`` got; raises a ``UserError`` unless it is a :class:`Backbone`."""
    if missing := missing_members(model):
        name, described = type(model).__name__, len(missing) <= len(MEMBERS) // 2
        lacks = f", which lacks {', '.join(missing)} of mtr_lab.backbones.Backbone" if described else ""
        raise UserError(f"{function} expects a model made by mtr_lab.create_model, got {name}{lacks}.")
    return model  # type: ignore[return-value]
