"""Attach a policy to a model, and remove it again."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones import Backbone, as_backbone, blocks_of, height_and_width, route, unroute
from mtr_lab.errors import UserError
from mtr_lab.reduction.budgets import (
    MAX_DROP,
    SPEEDUP,
    check_budget,
    check_images,
    is_for_search,
    solve_max_drop,
    solve_speedup,
)
from mtr_lab.reduction.cost_table import cost_table, measured_speedup
from mtr_lab.reduction.handle import Reduction, detach
from mtr_lab.reduction.policy import Policy, policy_config
from mtr_lab.reduction.schedule import Schedule
from mtr_lab.reduction.solver import measured_on_images


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
    bit for bit. Patching a patched model replaces its policy; after an error, the policy that it had is in force.

    An object of the authors' own class (Vim, VideoMamba) gets a model of this library that computes in its place, with
    the very same parameters; its ``forward`` and ``forward_features`` take the images alone. Wrappers of
    ``torch.compile`` and of data parallelism are unwrapped.

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
            "remove per block)."
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
    before = _policy(backbone)
    try:
        reduction = Reduction(backbone, config, None if img_size is None else height_and_width(img_size), images, kind)
        if measured_on is None:
            reduction.use(reduction.solve(ratio))
        else:
            reduction.use(_solve_budget(reduction, speedup, max_drop, measured_on, labels))
    except BaseException:
        _restore(before)
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
    detach(unroute(model) or as_backbone(model, "unpatch"))


@contextlib.contextmanager
def keeping_policy(model: Backbone) -> Iterator[None]:
    """Restore the policy that the model has now, or none, at the end of the block; the old handle is valid again."""
    policy = _policy(model)
    try:
        yield
    finally:
        _restore(policy)


def _policy(model: Backbone) -> list[tuple[Any, Any]]:
    """The model and its blocks, with what is attached to each."""
    modules: list[Any] = [model, *blocks_of(model)]
    return [(module, module.reduction) for module in modules]


def _restore(policy: list[tuple[Any, Any]]) -> None:
    for module, reduction in policy:
        module.reduction = reduction
