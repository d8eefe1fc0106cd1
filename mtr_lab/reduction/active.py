"""What a patched model carries: the policy and the schedule in force, as the model and as its blocks read them."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import Backbone
from mtr_lab.reduction.partial_blocks import SCANS
from mtr_lab.reduction.policy import Policy
from mtr_lab.reduction.resolution import resize_picture
from mtr_lab.reduction.schedule import Schedule
from mtr_lab.reduction.settings import EXACT
from mtr_lab.tokens import Evidence, ScanPath, TokenState
from mtr_lab.tokens.positions import Positions


class ActiveReduction:
    """The policy and the schedule in force: one object for the model and all its blocks."""

    def __init__(self, policy: Policy, schedule: Schedule) -> None:
        self.policy, self.schedule = policy, schedule
        self.record_score: Callable[[Tensor], None] | None = None
        """Called with the importance (B, L) at each block that chooses tokens by importance."""
        self.decide: Callable[[TokenState, Evidence, int], ops.Plan] | None = None
        """Makes the plans of the blocks instead of the policy."""

    @property
    def acting_policy(self) -> Policy | None:
        """The policy, ``None`` if the schedule changes nothing."""
        return self.policy if self.schedule.acts else None

    @property
    def key(self) -> tuple[Policy, Schedule] | None:
        """Equal if and only if the forward pass is the same; ``None`` for the unreduced one."""
        return (self.policy, self.schedule) if self.schedule.acts else None

    @property
    def reads_source(self) -> bool:
        """Whether blocks read ``source`` of their tokens."""
        return self.acting_policy is not None and self.acting_policy.unmerges

    @property
    def merges_tokens(self) -> bool:
        """Whether blocks merge tokens and drop none, and the rest is not a full grid."""
        policy = self.acting_policy
        if policy is None or policy.keeps_grid or policy.merges_in_mlp or policy.prunes:
            return False
        return any(self.schedule.remove)

    def on_picture(self, images: Tensor) -> Tensor:
        """The images that the backbone gets instead."""
        size = self.schedule.resolution
        return images if size is None else resize_picture(images, size)

    def on_embedding(self, state: TokenState, images: Tensor, model: Backbone) -> TokenState:
        """The tokens before the first block, with a pending plan if some are removed; ``images`` are those embedded."""
        cells = None if self.acting_policy is None else self.acting_policy.cells
        return state if cells is None else cells.reduce(state, images, model)


class ActiveBlockReduction:
    """The view of one block on the :class:`ActiveReduction` of its model."""

    def __init__(self, active: ActiveReduction, block: int, is_sampled: bool = False, is_alone: bool = False) -> None:
        self._active, self._block, self._is_sampled, self._is_alone = active, block, is_sampled, is_alone

    @property
    def remove(self) -> int:
        """How many tokens are removed after the mixer."""
        return self._active.schedule.remove[self._block]

    def positions(self, state: TokenState) -> Positions:
        """What the mixer is told about its tokens."""
        policy = self._active.acting_policy
        if policy is None:
            return Positions(state)
        is_alone = self._is_alone and state.special_alone and not self.remove
        return Positions(
            state,
            aligned=policy.align,
            size_exponent=policy.size_exponent,
            repeated=policy.stretch == EXACT,
            choose_paths=self._choose_paths(policy),
            unmerged=policy.unmerges,
            pruned=policy.prunes,
            sampled=self._is_sampled,
            read=state.special if is_alone else None,
            is_last=self._block == len(self._active.schedule.remove) - 1,
            decide=partial(self._plan, state) if policy.merges_early and self.remove else None,
        )

    def _choose_paths(self, policy: Policy) -> Callable[[Sequence[ScanPath]], Sequence[ScanPath]] | None:
        """The paths of a mixer -> those to scan; ``None`` to scan all of them."""
        part = SCANS[policy.paths]
        if part is None:
            return None
        choose, skipped = part.choose, self._active.schedule.skipped
        if not skipped or not skipped[self._block]:
            return choose
        return lambda paths: [path for path in choose(paths) if path.name not in skipped[self._block]]

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect."""
        return self._active.policy.needs if self.remove else ()

    def after_mixer(self, state: TokenState, evidence: Evidence) -> TokenState:
        """The tokens after the mixer, reduced if some are removed."""
        if not self.remove or self._active.policy.merges_in_mlp:
            return state
        state, exponent = state.reduced(evidence.plan or self._plan(state, evidence)), self._active.policy.size_exponent
        return state._replace(delta_scale=state.size**exponent) if exponent else state

    def _plan(self, state: TokenState, evidence: Evidence) -> ops.Plan:
        """The decision on the tokens of the mixer."""
        policy, record = self._active.policy, self._active.record_score
        if record is not None and policy.ranks:
            record(policy.importance(state, evidence))  # computed again by the policy, to the same values
        return (self._active.decide or policy)(state, evidence, self.remove)

    def around_mlp(self, state: TokenState, evidence: Evidence) -> ops.Plan | None:
        """The plan that merges tokens for the MLP alone; ``None`` for no plan."""
        return self._plan(state, evidence) if self.remove and self._active.policy.merges_in_mlp else None
