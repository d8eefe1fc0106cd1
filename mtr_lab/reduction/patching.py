"""Attach a policy to a model, and remove it again."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones import Backbone, as_backbone, blocks_of, height_and_width, route, unroute
from mtr_lab.errors import UserError
from mtr_lab.reduction.active import ActiveBlockReduction, ActiveReduction
from mtr_lab.reduction.blocks import block_infos, reducing_blocks
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
        self._model = model
        self._img_size = img_size if images is None else (images.shape[-2], images.shape[-1])
        self._images = images
        self._search: GreedySearch | None = None
        _detach(model)
        self._active = ActiveReduction(self.policy, self.solve(0.0))
        model.reduction = self._active
        for number, block in enumerate(blocks_of(model)):
            block.reduction = ActiveBlockReduction(self._active, number)

    @property
    def model(self) -> Backbone:
        """The model that computes: the patched one, or the one in the place of an object of the authors' class."""
        return self._model

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
        solve = partial(make_schedule, self._model, self.policy, ratio=ratio, img_size=self._img_size, layers=layers)
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
        model: Any = self._model
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
        return f"Reduction({self.policy.policy!r}, {removed}, tokens {list(self.schedule.tokens)})"

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
    schedule: str | Sequence[int] | None = None,
    img_size: int | tuple[int, int] | None = None,
    images: Tensor | None = None,
    **parts: Any,
) -> Reduction:
    """Make a pretrained model cheaper, in place: ``patch(model, "mtr", ratio=0.4)``; ``model(images)`` now reduces.

    Blocks remove tokens after their mixers. Parameters and state dict are untouched, and ``unpatch`` restores the model
    bit for bit. Patching a patched model replaces its policy.

    An object of the authors' own class (Vim, VideoMamba) gets a model of this library that computes in its place, with
    the very same parameters; its ``forward`` and ``forward_features`` take the images alone. Wrappers of
    ``torch.compile`` and of data parallelism are looked into.

    Args:
        model: a model of this library, any other with the members of ``mtr_lab.backbones.Backbone``, or an object of
            the authors' class.
        policy: the name of a policy in conf/reduction, the path of a YAML file, or a policy.
        ratio: share of the unreduced model's FLOPs to remove, the policy's own steps charged.
        schedule: with a ratio, how the counts of the blocks relate (``constant``, ``linear``, ``front``, or ``auto``,
            measured on ``images``); instead of a ratio, how many tokens to remove after each block.
        img_size: side or (height, width) of the images that the ratio refers to, the model's own size by default.
        images: for ``schedule="auto"``, about a hundred unlabelled images (B, channels, H, W), preprocessed for the
            model and on its device; they set ``img_size``. Do not evaluate on the same images.
        parts: changes to the policy's configuration, e.g. ``target_fraction=0.3``.

    Returns:
        The handle. Its ``schedule`` has the token counts and the FLOPs.

    Raises:
        UserError: an unknown policy or part, a file that holds no policy, a ratio out of reach (states the maximum),
            or a model of another library or of a variant that is not represented.
    """
    backbone = as_backbone(model, "patch")
    config = policy_config(policy, **parts)
    if schedule is not None:
        config["schedule"] = schedule
    elif ratio is None:
        raise UserError("patch needs a ratio (share of the FLOPs to remove) or a schedule (tokens to remove a block).")
    kind = type(policy) if isinstance(policy, Policy) else Policy
    reduction = Reduction(backbone, config, None if img_size is None else height_and_width(img_size), images, kind)
    try:
        reduction.use(reduction.solve(ratio))
    except UserError:
        _detach(backbone)
        unroute(model)
        raise
    route(model, backbone)
    return reduction


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
