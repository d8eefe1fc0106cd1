"""Attach a policy to a model, and take it off again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones import Backbone, blocks_of, first_state, height_and_width, missing_members, run
from mtr_lab.backbones.interface import MEMBERS
from mtr_lab.errors import UserError
from mtr_lab.reduction.group import GROUPINGS
from mtr_lab.reduction.places import EMBEDDINGS, MLPS, PICTURES, SCANS
from mtr_lab.reduction.policy import Policy, make_policy, policy_config
from mtr_lab.reduction.schedule import AUTO, Schedule, block_infos, make_schedule, reducing_blocks
from mtr_lab.reduction.sensitivity import GreedySearch
from mtr_lab.tokens import Evidence, ScanPath, TokenState


class ActiveReduction:
    """The policy and the schedule that a model follows, one object for the model and all its blocks."""

    def __init__(self, policy: Policy, schedule: Schedule) -> None:
        self.policy, self.schedule = policy, schedule
        self.record_score: Callable[[Tensor], None] | None = None
        """Given the importance (B, L) by which a block chooses, where tokens are chosen by importance."""

    @property
    def acting(self) -> Policy | None:
        """The policy, ``None`` where nothing is reduced."""
        return self.policy if self.schedule.acts else None

    @property
    def key(self) -> tuple[Policy, Schedule] | None:
        """Equal if and only if the forward pass is the same; ``None`` where nothing is reduced."""
        return (self.policy, self.schedule) if self.schedule.acts else None

    def on_picture(self, images: Tensor) -> Tensor:
        """The images that the backbone is given instead."""
        part = PICTURES[self.acting.picture] if self.acting else None
        return images if part is None else part.change(images)

    def on_embedding(self, state: TokenState) -> TokenState:
        """The tokens before the first block, with a pending plan if some go."""
        part = EMBEDDINGS[self.acting.embedding] if self.acting else None
        if part is None:
            return state
        assert state.layout is not None
        return state.reduced(part.plan(state, part.removes(state.layout)))


class ActiveBlockReduction:
    """The part of :class:`ActiveReduction` that one block reads."""

    def __init__(self, in_force: ActiveReduction, block: int) -> None:
        self._in_force, self._block = in_force, block

    @property
    def remove(self) -> int:
        """How many tokens go after the mixer."""
        return self._in_force.schedule.remove[self._block]

    @property
    def aligned(self) -> bool:
        """Whether the scan's state decays over the places of removed tokens."""
        policy = self._in_force.acting
        return policy is not None and policy.align

    @property
    def size_exponent(self) -> float:
        """Δ of a token is multiplied by its size to this power."""
        policy = self._in_force.acting
        return 0.0 if policy is None else policy.stretch

    @property
    def choose_paths(self) -> Callable[[Sequence[ScanPath]], Sequence[ScanPath]] | None:
        """Picks the paths to scan from a mixer's own; ``None`` for all of them."""
        policy = self._in_force.acting
        part = None if policy is None else SCANS[policy.paths]
        return None if part is None else part.choose

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect."""
        policy = self._in_force.acting
        part = None if policy is None else MLPS[policy.mlp]
        own = self._in_force.policy.needs if self.remove else ()
        return own if part is None else tuple(dict.fromkeys((*own, *part.needs)))

    def after_mixer(self, state: TokenState, evidence: Evidence) -> tuple[TokenState, Evidence]:
        """The tokens after the mixer, reduced if some go, and their evidence if the part of the MLP reads it."""
        if not self.remove:
            return state, evidence
        policy, record = self._in_force.policy, self._in_force.record_score
        if record is not None and (policy.prune_first or GROUPINGS[policy.grouping].ranked):
            record(policy.importance(state, evidence))  # a pure function: what the policy computes
        plan = policy(state, evidence, self.remove)
        return state.reduced(plan), evidence.of(plan.keep) if MLPS[policy.mlp] else evidence

    def around_mlp(self, state: TokenState, evidence: Evidence) -> ops.Plan | None:
        """The plan by which tokens are merged for the MLP alone; ``None`` for none."""
        policy = self._in_force.acting
        part = None if policy is None else MLPS[policy.mlp]
        if part is None:
            return None
        return part.plan(state, evidence, part.removes(state.index.shape[1], state.special.shape[1]))


class Reduction:
    """A patched model's handle: solves schedules for it and switches between them.

    ``policy`` is the policy, ``config`` its configuration. ``images`` (B, channels, H, W), on the model's device, are
    what ``schedule=auto`` measures on; they also set ``img_size``. ``kind`` is the class of the policy.
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
        self._in_force = ActiveReduction(self.policy, self.solve(0.0))
        model.reduction = self._in_force
        for number, block in enumerate(blocks_of(model)):
            block.reduction = ActiveBlockReduction(self._in_force, number)

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        return self._in_force.schedule

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
        model: Any = self._model
        training, schedule = model.training, self.schedule
        model.eval()
        try:
            if self._search is None:
                infos = block_infos(model, self.policy, self._img_size)
                blocks = reducing_blocks(infos, self.policy, first_block=0, interval=1, layers=self.config["layers"])
                self._search = GreedySearch(model, self.use, self.policy, blocks, images)
            found = self._search.reach(ratio)
        finally:
            model.train(training)
            self.use(schedule)
        return {block: count for block, count in enumerate(found.remove) if count}

    def __repr__(self) -> str:
        removed = f"{100 * self.schedule.reduction:.1f} % of the FLOPs removed"
        return f"Reduction({self.policy.policy!r}, {removed}, tokens {list(self.schedule.tokens)})"

    def use(self, schedule: Schedule) -> None:
        """Put a schedule in force; the model's next forward pass follows it.

        Raises:
            UserError: the model has been unpatched, or patched anew, since; the schedule is of another depth.
        """
        self._check_in_force()
        if len(schedule.remove) != (depth := len(blocks_of(self._model))):
            raise UserError(f"a schedule of {len(schedule.remove)} blocks does not fit a model of {depth}.")
        self._in_force.schedule = schedule

    def _check_in_force(self) -> None:
        if self._model.reduction is not self._in_force:
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

    Blocks remove tokens after their mixers; parameters and state dict are untouched, and ``unpatch`` restores the model
    bit for bit. A model that is already patched is patched anew.

    Args:
        model: a model of this library, or any other that describes itself as ``mtr_lab.backbones.Backbone`` does.
        policy: the name of a policy, a file in conf/reduction.
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
    backbone = _backbone(model, "patch")
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
        unpatch(model)
        raise
    return reduction


def unpatch(model: nn.Module) -> None:
    """Take the reduction off again; the model computes what it did before ``patch``, bit for bit."""
    _detach(_backbone(model, "unpatch"))


def _detach(model: Backbone) -> None:
    model.reduction = None
    for block in blocks_of(model):
        block.reduction = None


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


def trace(model: nn.Module, images: Tensor) -> list[TokenState]:
    """Run the blocks and record the state after each: where every token is and which original tokens it holds.

    Args:
        images: (B, channels, H, W), or videos (B, channels, T, H, W) for a model of them.

    Returns:
        One state a block; ``source[b, i]`` is the token that original token i of image b has become part of, -1 if it
        was dropped.
    """
    return [block.after for block in _trace(model, images, "trace")]


def trace_blocks(model: nn.Module, images: Tensor) -> list[TracedBlock]:
    """As ``trace``, with the state before each block and the score that decided there."""
    return _trace(model, images, "trace_blocks")


def _trace(model: nn.Module, images: Tensor, caller: str) -> list[TracedBlock]:
    backbone = _backbone(model, caller)
    in_force = backbone.reduction
    scores: list[Tensor] = []  # of the block that is running, at most one
    if isinstance(in_force, ActiveReduction):
        in_force.record_score = scores.append
    try:
        return [
            TracedBlock(before.applied(), after.applied(), scores.pop() if scores else None)
            for before, after in run(backbone, first_state(backbone, images, traced=True))
        ]
    finally:
        if isinstance(in_force, ActiveReduction):
            in_force.record_score = None


def _backbone(model: nn.Module, function: str) -> Backbone:
    if missing := missing_members(model):
        name, described = type(model).__name__, len(missing) <= len(MEMBERS) // 2
        lacks = f", which lacks {', '.join(missing)} of mtr_lab.backbones.Backbone" if described else ""
        raise UserError(f"{function} expects a model made by mtr_lab.create_model, got {name}{lacks}.")
    return model  # type: ignore[return-value]
