"""Attach a policy to a model, and remove it again."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones import Backbone, as_backbone, blocks_of, height_and_width, route, unroute
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
from mtr_lab.reduction.directions import Pair, Skipped, enough_pairs, last_first, least_first
from mtr_lab.reduction.dtp import deviations, two_blocks
from mtr_lab.reduction.places import SCANS, blocks_alone, sampled_blocks
from mtr_lab.reduction.policy import Policy, make_policy, policy_config
from mtr_lab.reduction.resolution import Size, picture_of, smaller_pictures
from mtr_lab.reduction.schedule import AUTO, DTP, MEASURED, NO_TOKENS, OutOfReach, Schedule, make_schedule
from mtr_lab.reduction.sensitivity import GreedySearch, divergences


def measured_on_images(config: Mapping[str, Any]) -> str:
    """The setting of a policy's configuration by which schedules are measured on images, empty if none is."""
    if isinstance(config["schedule"], str) and config["schedule"] in MEASURED:
        return f"mtr.schedule={config['schedule']}"
    if config["resolution"] == AUTO and config["schedule"] != NO_TOKENS:
        return "mtr.resolution=auto"
    return "mtr.paths=least" if config["paths"] == "least" else ""


class Reduction:
    """The handle of a patched model: solves schedules and switches between them.

    Args:
        model: the model to patch.
        config: the configuration of the policy, see ``policy_config``.
        img_size: (height, width) that schedules are solved for, the model's own by default.
        images: (B, channels, H, W) on the model's device, for ``schedule=auto`` and ``resolution=auto`` to measure on;
            they set ``img_size``.
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
        self._model = model
        self.budget: Budget | None = None
        """What ``patch`` was asked for instead of a ratio, promised and measured."""
        self._img_size = img_size if images is None else (images.shape[-2], images.shape[-1])
        self._images = images
        self._search: GreedySearch | None = None
        self._pairs: list[Pair] = []
        self._deviations: list[float] | None = None
        _detach(model)
        self._active = ActiveReduction(self.policy, self.solve(0.0))
        model.reduction = self._active
        sampled = sampled_blocks(model, SCANS[self.policy.paths])
        alone = blocks_alone(model, self.policy.share_alone)
        for number, block in enumerate(blocks_of(model)):
            block.reduction = ActiveBlockReduction(self._active, number, sampled[number], alone[number])

    @property
    def model(self) -> Backbone:
        """The model that computes: the patched one, or the one in the place of an object of the authors' class."""
        return self._model

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        return self._active.schedule

    def solve(self, ratio: float | None, resolution: float | None = None) -> Schedule:
        """The schedule that removes this share of the FLOPs; for ``None`` the configured counts.

        Args:
            resolution: instead of the configured one.

        Raises:
            UserError: as ``make_schedule``, which refuses ``auto`` without images; or an impossible ``resolution``.
        """
        resolution = self.config["resolution"] if resolution is None else resolution
        full = self._img_size or self._model.input_shape[-2:]
        if resolution is None or ratio == 0:
            return self._solve(ratio, None)
        if resolution == AUTO:  # given counts leave no budget for a smaller picture
            return self._solve(ratio, None) if ratio is None else self._solve_with_picture(ratio, full)
        picture = picture_of(self._model, resolution, full)
        return self._solve(ratio, None if picture == tuple(full) else picture)

    def _solve_with_picture(self, ratio: float, full: Sequence[int]) -> Schedule:
        """The schedule on the size of the picture that changes the output least; the largest, if no block reduces."""
        if self._images is None and self.config["schedule"] != NO_TOKENS:
            raise UserError(
                "mtr.resolution=auto measures on images how to divide the ratio between the size of the picture and "
                "the tokens, and was given none: pass about a hundred as patch(…, images=images), or give the size, "
                "such as mtr.resolution=0.75."
            )
        schedules, error = [], None
        for picture in (None, *smaller_pictures(self._model, full)):
            alone = self._cost([0] * len(blocks_of(self._model)), picture)
            if alone.reduction >= ratio:
                schedules.append(alone)
                break
            try:
                schedules.append(self._solve(ratio, picture))
            except OutOfReach as out_of_reach:
                error = out_of_reach
        if not schedules:
            raise error or OutOfReach(f"mtr.ratio={ratio} is out of reach: the model accepts no smaller picture.")
        if len(schedules) == 1:
            return schedules[0]
        with self._measuring() as images:
            kl = divergences(self._model, self.use, self._solve(0.0, None), schedules, images)
        return schedules[kl.index(min(kl))]

    def _cost(self, counts: Sequence[int], resolution: Size | None) -> Schedule:
        return make_schedule(self._model, self.policy, schedule=counts, img_size=self._img_size, resolution=resolution)

    def _solve(self, ratio: float | None, resolution: Size | None) -> Schedule:
        """The schedule on a picture of that size."""
        counts, layers = self.config["schedule"], self.config["layers"]
        beside: Any = {"resolution": resolution, "skipped": self._skipped(ratio, resolution)}
        solve = partial(make_schedule, self._model, self.policy, ratio=ratio, layers=layers)
        solve = partial(solve, img_size=self._img_size, **beside)
        if ratio is None and counts == NO_TOKENS:
            return self._cost([0] * len(blocks_of(self._model)), resolution)
        if counts == DTP and ratio and self._images is not None:
            return solve(schedule=dict.fromkeys(self._two_blocks(), 1.0))
        if counts == AUTO and ratio and self._images is not None:
            constant = solve(first_block=0, interval=1)  # refuses a ratio out of reach before anything is measured
            return solve(schedule=self._measured(ratio, beside)) if any(constant.remove) else constant
        blocks = {key: self.config[key] for key in ("first_block", "interval")}
        return solve(schedule="constant" if ratio == 0 else counts, **blocks)

    def release_images(self) -> None:
        """Free the images that ``auto`` measures on, and what was measured: no more ratios can be solved."""
        self._images = self._search = self._deviations = None
        self._pairs = []

    def _two_blocks(self) -> list[int]:
        """The blocks that reduce under ``schedule=dtp``."""
        infos = block_infos(self._model, self.policy, self._img_size)
        if self._deviations is None:
            with self._measuring() as images:
                self._deviations = deviations(self._model, self.policy, infos, self._solve_unreduced(), images)
        return two_blocks(self._deviations, infos, self.policy)

    def _skipped(self, ratio: float | None, resolution: Size | None) -> Skipped:
        """The scan paths that every block skips, to save the part of the ratio that the policy gives to them."""
        part = SCANS[self.policy.paths]
        if part is None or not part.skips or not ratio:
            return ()
        depth = len(blocks_of(self._model))

        def cost(skips: Skipped) -> Schedule:
            return make_schedule(
                self._model,
                self.policy,
                schedule=[0] * depth,
                img_size=self._img_size,
                resolution=resolution,
                skipped=skips,
            )

        if not self._pairs and part.skips == "last":
            self._pairs = last_first(self._model)
        elif not self._pairs:
            if self._images is None:
                raise UserError(
                    "mtr.paths=least measures on images which directions matter least, and was given none: pass about "
                    "a hundred as patch(…, images=images), or take mtr.paths=last."
                )
            with self._measuring() as images:
                self._pairs = least_first(self._model, self.use, cost, self._solve_unreduced(), images)
        return enough_pairs(self._pairs, self.policy.paths_share * ratio, depth, cost)

    def _solve_unreduced(self) -> Schedule:
        return make_schedule(self._model, self.policy, ratio=0.0, img_size=self._img_size)

    def _measured(self, ratio: float, beside: dict[str, Any]) -> dict[int, float]:
        """The counts of the measured schedule by block, as weights for ``make_schedule``."""
        with self._measuring() as images:
            if self._search is None or self._search.beside != beside:
                infos = block_infos(self._model, self.policy, self._img_size, beside["resolution"])
                blocks = reducing_blocks(infos, self.policy, first_block=0, interval=1, layers=self.config["layers"])
                self._search = GreedySearch(self._model, self.use, self.policy, blocks, images, **beside)
            measured = self._search.reach(ratio)
        return {block: count for block, count in enumerate(measured.remove) if count}

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[Tensor]:
        """The images to measure on; the model is in evaluation mode, and afterwards as it was."""
        self._check_active()
        assert self._images is not None
        model: Any = self._model
        training, schedule = model.training, self.schedule
        model.eval()
        try:
            yield self._images
        finally:
            model.train(training)
            self.use(schedule)

    def __repr__(self) -> str:
        removed = f"{100 * self.schedule.reduction:.1f} % of the FLOPs removed"
        size = self.schedule.resolution
        picture = "" if size is None else f", picture {size[0]}×{size[1]}"
        budget = "" if self.budget is None else f", {self.budget}"
        return f"Reduction({self.policy.policy!r}, {removed}{picture}, tokens {list(self.schedule.tokens)}{budget})"

    def use(self, schedule: Schedule) -> None:
        """Put a schedule in force; the model's next forward pass follows it.

        Raises:
            UserError: the model was unpatched or patched anew since; the schedule is of another depth.
        """
        self._check_active()
        if len(schedule.remove) != (depth := len(blocks_of(self._model))):
            raise UserError(f"a schedule of {len(schedule.remove)} blocks does not fit a model of {depth}.")
        self._active.schedule = schedule

    def _check_active(self) -> None:
        if self._model.reduction is not self._active:
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

    An object of the authors' own class (Vim, VideoMamba) gets a model of this library that computes in its place, with
    the very same parameters; its ``forward`` and ``forward_features`` take the images alone. Wrappers of
    ``torch.compile`` and of data parallelism are looked into.

        patch(model, "mtr", speedup=1.5, images=batch)        # 1.5 times as fast on this device, at this batch size
        patch(model, "mtr", max_drop=0.02, images=unlabelled) # at most 2 % of the classes change, 95 % confidence

    Args:
        model: a model of this library, any other with the members of ``mtr_lab.backbones.Backbone``, or an object of
            the authors' class.
        policy: the name of a policy in conf/reduction, the path of a YAML file, or a policy.
        ratio: share of the unreduced model's FLOPs to remove, the policy's own steps charged.
        speedup: instead of a ratio, how many times as fast the model has to be on ``images``; the cost table that this
            is solved on is cached, see ``mtr_lab.reduction.cost_table``.
        max_drop: instead of a ratio, the largest share of images whose class may change, or with ``labels`` the largest
            loss of top-1, a fraction: the largest ratio that keeps it with 95 % confidence on images like ``images``.
        schedule: with a budget, how the counts of the blocks relate (``constant``, ``linear``, ``front``, ``none``, or
            ``auto`` and ``dtp``, measured on ``images``); without one, how many tokens to remove after each block.
        img_size: side or (height, width) of the images that the ratio refers to, the model's own size by default.
        images: (B, channels, H, W), preprocessed for the model and on its device; they set ``img_size``. For
            ``schedule="auto"`` and ``resolution="auto"``, about a hundred; do not evaluate on the same images. For
            ``speedup``, a batch of the size that the model will get. For ``max_drop``, hundreds that the model was not
            trained on; with ``auto``, up to 128 of them choose the schedule, and the drop is measured on the others.
        labels: (B,) classes of the images, for ``max_drop``.
        parts: changes to the policy's configuration, e.g. ``target_fraction=0.3`` or ``resolution=96``: the shorter
            side in pixels (an integer), a scale (a float), or ``"auto"``. The picture is resized first, and the ratio
            counts from the full size.

    Returns:
        The handle. Its ``schedule`` has the token counts and the FLOPs, its ``budget`` what was asked for instead of a
        ratio, what is promised, and the speed-up measured.

    Raises:
        UserError: an unknown policy or part, a file that holds no policy, several budgets or none, a budget out of
            reach (states the maximum), images that are missing or too few, or a model of another library or of a
            variant that is not represented.
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
    if max_drop is not None and measured_on_images(config) and images is not None:
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
        _detach(backbone)
        unroute(model)
        raise
    route(model, backbone)
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
    _detach(unroute(model) or as_backbone(model, "unpatch"))


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
