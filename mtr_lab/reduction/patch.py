"""Attach a policy to a model, and take it off again."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones import Evidence, TokenState, VisionMamba, height_and_width
from mtr_lab.errors import UserError
from mtr_lab.reduction.group import GROUPINGS
from mtr_lab.reduction.plan import carry
from mtr_lab.reduction.policy import Policy, make_policy, policy_config
from mtr_lab.reduction.restore import restore
from mtr_lab.reduction.schedule import AUTO, Schedule, make_schedule, reducing_blocks
from mtr_lab.reduction.sensitivity import GreedySearch


class ReductionStep(nn.Module):
    """What ``patch`` attaches to a block: a policy and how many tokens to remove."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.remove = 0
        self.needs = policy.needs

    def forward(self, state: TokenState, evidence: Evidence) -> TokenState:
        return carry(self.policy(state, evidence, self.remove), state)


class Reduction:
    """A patched model's handle: solves schedules for it and switches between them.

    ``policy`` is the policy, ``config`` its configuration, ``schedule`` the schedule in force. ``images`` (B, channels,
    H, W), on the model's device, are what ``schedule=auto`` measures on; they also set ``img_size``. ``kind`` is the
    class of the policy.
    """

    def __init__(
        self,
        model: VisionMamba,
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
        unpatch(model)
        self._steps = [ReductionStep(self.policy) for _ in model.blocks]
        for block, step in zip(model.blocks, self._steps, strict=True):
            block.step = step
            block.align, block.stretch = self.policy.align, self.policy.stretch
        model.restore = restore
        self.schedule = self.solve(0.0)

    def solve(self, ratio: float | None) -> Schedule:
        """The schedule that removes this share of the FLOPs, or the configured counts for ``None``.

        Raises:
            UserError: as ``make_schedule``, which refuses ``auto`` where there are no images.
        """
        counts, layers = self.config["schedule"], self.config["layers"]
        solve = partial(make_schedule, self._model, self.policy, ratio=ratio, img_size=self._img_size, layers=layers)
        if counts == AUTO and ratio and self._images is not None:
            solve(first_block=0, interval=1)  # finds a ratio out of reach before anything is measured
            return solve(schedule=self._measured(ratio, self._images))
        where = {key: self.config[key] for key in ("first_block", "interval")}
        return solve(schedule="constant" if ratio == 0 else counts, **where)

    def _measured(self, ratio: float, images: Tensor) -> dict[int, float]:
        """How the numbers removed at the blocks relate in the schedule found by measuring."""
        self._check_in_force()
        training = self._model.training
        self._model.eval()
        try:
            if self._search is None:
                blocks = reducing_blocks(len(self._steps), first_block=0, interval=1, layers=self.config["layers"])
                self._search = GreedySearch(self._model, self._steps, self.policy, blocks, images)
            found = self._search.reach(ratio)
        finally:
            self._model.train(training)
            self.use(self.schedule)
        return {block: count for block, count in enumerate(found.remove) if count}

    def __repr__(self) -> str:
        removed = f"{100 * self.schedule.reduction:.1f} % of the FLOPs removed"
        return f"Reduction({self.policy.policy!r}, {removed}, tokens {list(self.schedule.tokens)})"

    def use(self, schedule: Schedule) -> None:
        """Put a schedule in force; the model's next forward pass follows it.

        Raises:
            UserError: the model has been unpatched, or patched anew, since.
        """
        self._check_in_force()
        for step, remove in zip(self._steps, schedule.remove, strict=True):
            step.remove = remove
        self.schedule = schedule

    def _check_in_force(self) -> None:
        if any(block.step is not step for block, step in zip(self._model.blocks, self._steps, strict=True)):
            raise UserError("this reduction is no longer in force: the model was unpatched or patched anew.")


def patch(
    model: VisionMamba,
    policy: str | Path | Policy = "mtr",
    *,
    ratio: float | None = None,
    schedule: str | Sequence[int] | None = None,
    img_size: int | tuple[int, int] | None = None,
    images: Tensor | None = None,
    **parts: Any,
) -> Reduction:
    """Make a pretrained model cheaper, in place: ``patch(model, "mtr", ratio=0.4)``; ``model(images)`` now reduces.

    Each block gets a ``step`` that removes tokens after its mixer; parameters and state dict are untouched, and
    ``unpatch`` restores the model bit for bit. A model that is already patched is patched anew.

    Args:
        model: a Vision Mamba model of this library.
        policy: the name of a policy, a file in conf/reduction; the path of a YAML file of your own, which ends in
            ``.yaml`` or ``.yml``; or a ``Policy``.
        ratio: share of the unreduced model's FLOPs to remove, the reduction's own cost charged.
        schedule: with a ratio, how the numbers removed at the blocks relate (``constant``, ``linear``, ``front``; or
            ``auto``, measured on ``images``); instead of a ratio, how many tokens to remove after each block.
        img_size: side or (height, width) of the images the ratio is meant for, the model's own size by default.
        images: for ``schedule="auto"``, about a hundred unlabelled images (B, channels, H, W) as the model takes them,
            on its device; their size is then ``img_size``. Do not evaluate on the same ones.
        parts: changes to the policy's configuration, e.g. ``target_fraction=0.3``.

    Returns:
        The handle, whose ``schedule`` says what is removed where and what it saves.

    Raises:
        UserError: an unknown policy or part, a file that is no policy's, a ratio out of reach (states the maximum), a
            model of another library.
    """
    _check(model, "patch")
    config = policy_config(policy, **parts)
    if schedule is not None:
        config["schedule"] = schedule
    elif ratio is None:
        raise UserError("patch needs a ratio (share of the FLOPs to remove) or a schedule (tokens to remove a block).")
    kind = type(policy) if isinstance(policy, Policy) else Policy
    reduction = Reduction(model, config, None if img_size is None else height_and_width(img_size), images, kind)
    try:
        reduction.use(reduction.solve(ratio))
    except UserError:
        unpatch(model)
        raise
    return reduction


def unpatch(model: VisionMamba) -> None:
    """Take the reduction off again; the model computes what it did before ``patch``, bit for bit."""
    _check(model, "unpatch")
    model.restore = None
    for block in model.blocks:
        block.align, block.stretch = False, 0.0
        del block.step  # a module: assigning None would leave its name behind
        block.step = None


@dataclass(frozen=True)
class TracedBlock:
    """What one block did to the tokens of B images."""

    before: TokenState
    """The tokens that enter it, L of them."""
    after: TokenState
    """The tokens that leave it. ``source[b, i]`` is the token that original token i of image b has become part of, -1
    if it was dropped."""
    score: Tensor | None
    """(B, L) float32, the importance by which the policy chose among the tokens that enter. None where the block
    removes nothing, and for policies that choose by similarity alone."""


def trace(model: VisionMamba, images: Tensor) -> list[TokenState]:
    """Run the blocks and record the state after each: where every token is and which original tokens it holds.

    Args:
        images: (B, channels, H, W), or videos (B, channels, T, H, W) for a model of them.

    Returns:
        One state a block; ``source[b, i]`` is the token that original token i of image b has become part of, -1 if it
        was dropped.
    """
    return [block.after for block in _trace(model, images, "trace")]


def trace_blocks(model: VisionMamba, images: Tensor) -> list[TracedBlock]:
    """As ``trace``, with the state before each block and the score that decided there."""
    return _trace(model, images, "trace_blocks")


def _trace(model: VisionMamba, images: Tensor, caller: str) -> list[TracedBlock]:
    _check(model, caller)
    blocks: list[TracedBlock] = []
    scores: list[Tensor] = []  # of the block that is running, at most one

    def record_score(step: ReductionStep, seen: tuple[TokenState, Evidence], _: TokenState) -> None:
        if step.policy.prune_first or GROUPINGS[step.policy.grouping].ranked:
            scores.append(step.policy.importance(*seen))  # a pure function: what the step itself has just computed

    def record(_: nn.Module, before: tuple[Any, ...], after: TokenState) -> None:
        score = scores.pop() if scores else None
        blocks.append(TracedBlock(TokenState(*before).settled(), TokenState(*after).settled(), score))

    steps = [block.step for block in model.blocks if isinstance(block.step, ReductionStep)]
    hooks = [step.register_forward_hook(record_score) for step in steps]
    hooks += [block.register_forward_hook(record) for block in model.blocks]
    try:
        model.forward_state(images, traced=True)
    finally:
        for hook in hooks:
            hook.remove()
    return blocks


def _check(model: nn.Module, function: str) -> None:
    if not isinstance(model, VisionMamba):
        raise UserError(f"{function} expects a model made by mtr_lab.create_model, got {type(model).__name__}.")
