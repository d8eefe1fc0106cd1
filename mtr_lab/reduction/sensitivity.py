"""``schedule=auto``: remove tokens where a few unlabelled images show that it moves the model's output least."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.backbones import Backbone, first_state, run
from mtr_lab.reduction.policy import Policy
from mtr_lab.reduction.schedule import Schedule, block_infos, make_schedule, possible_counts
from mtr_lab.tokens import TokenState

STRIDE = 0.05
"""The share of the FLOPs that one choice saves."""


@dataclass(frozen=True)
class Choice:
    """A schedule, how far it moves the output (KL to the unreduced output, nats an image), and at what price."""

    schedule: Schedule
    kl: float
    price: float
    """Nats for each share of the FLOPs by which it is cheaper than the schedule before it."""


class GreedySearch:
    """Grows a schedule choice by choice: more tokens at the one block where this costs the fewest nats a FLOP saved.

    Each choice is measured on top of all before it. A price rises as more tokens are gone, nearly always; so a block
    that was dearer when last measured than the best price now is not measured again (lazy greedy; Minoux 1978).
    The same images give the same schedules. A larger ratio goes on where a smaller one stopped, for which the states of
    the images before every block are kept.

    Args:
        model: patched.
        use: puts a schedule in force.
        blocks: those that may reduce.
        images: (B, channels, H, W), unlabelled, preprocessed and on the model's device.
    """

    def __init__(
        self,
        model: Backbone,
        use: Callable[[Schedule], None],
        policy: Policy,
        blocks: Iterable[int],
        images: Tensor,
    ) -> None:
        self._model, self._use, self._policy = model, use, policy
        self._size = (images.shape[-2], images.shape[-1])
        self._infos = block_infos(model, policy, self._size)
        self._prices = dict.fromkeys(blocks, 0.0)
        with torch.no_grad():
            unreduced = make_schedule(model, policy, ratio=0.0, img_size=self._size)
            self._unreduced = self._log_probs(self._from_images(images, unreduced)[-1])
            nothing = self._cost([0] * len(self._infos))  # after mixers; the policy may act at other places, too
            self._states = self._from_images(images, nothing)
            self._path = [Choice(nothing, self._moved(self._states[-1]), 0.0)]

    @torch.no_grad()
    def reach(self, ratio: float) -> Schedule:
        """The first schedule that saves this share of the FLOPs, the last one there is if none does."""
        while self._path[-1].schedule.reduction < ratio and (choice := self._choose()):
            self._path.append(choice)
        reached = [choice.schedule for choice in self._path if choice.schedule.reduction >= ratio]
        return reached[0] if reached else self._path[-1].schedule

    def _choose(self) -> Choice | None:
        """The cheapest next choice, ``None`` if nothing more can go."""
        current, best = self._path[-1], None
        for block in sorted(self._prices, key=lambda block: self._prices[block]):
            if best is not None and best.price <= self._prices[block]:
                break
            more = self._more_at(block, current.schedule)
            saved = more.reduction - current.schedule.reduction
            if saved <= 0:
                del self._prices[block]
                continue
            states = self._run(block, self._states[block], more)
            kl = self._moved(states[-1])
            self._prices[block] = (kl - current.kl) / saved
            if best is None or self._prices[block] < best.price:
                best = Choice(more, kl, self._prices[block])
                continued = [*self._states[:block], *states]
        if best is not None:
            self._states = continued
        return best

    def _more_at(self, block: int, current: Schedule) -> Schedule:
        """So many tokens more at this block that a stride is saved, or all that can go there."""

        def with_more(extra: int) -> Schedule:
            return self._cost([count + extra * (i == block) for i, count in enumerate(current.remove)])

        target = current.reduction + STRIDE
        return with_more(bisect_left(range(current.tokens[block]), target, key=lambda n: with_more(n).reduction))

    def _cost(self, counts: Sequence[int]) -> Schedule:
        possible = possible_counts(self._policy, counts, self._infos)
        return make_schedule(self._model, self._policy, schedule=possible, img_size=self._size)

    def _from_images(self, images: Tensor, schedule: Schedule) -> list[TokenState]:
        self._use(schedule)
        return self._run(0, first_state(self._model, images), schedule)

    def _moved(self, state: TokenState) -> float:
        """KL of the output from a state after the last block to the unreduced output, nats an image."""
        reduced = self._log_probs(state)
        return F.kl_div(reduced, self._unreduced, reduction="batchmean", log_target=True).item()

    def _run(self, first: int, state: TokenState, schedule: Schedule) -> list[TokenState]:
        """The blocks from ``first`` on: the states before each of them and after the last."""
        self._use(schedule)
        states = []
        for before, after in run(self._model, state, first):
            states.append(before)
            state = after
        return [*states, state]

    def _log_probs(self, state: TokenState) -> Tensor:
        """(B, K) in float64 from the state after the last block."""
        return self._model.classify(state).double().log_softmax(-1)
