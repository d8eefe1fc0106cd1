"""``schedule=auto``: remove tokens at the blocks where this changes the model's output least, measured on images.

``GreedySearch`` finds a schedule; ``divergences`` compares it with the named ones, see ``Solver``.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.backbones import Backbone, first_state, last_state, run
from mtr_lab.reduction.blocks import block_infos, possible_counts
from mtr_lab.reduction.policy import Policy
from mtr_lab.reduction.resolution import Size
from mtr_lab.reduction.schedule import Schedule, make_schedule
from mtr_lab.tokens import TokenState

STRIDE = 0.05
"""The share of the FLOPs that one step of the search saves."""


@dataclass(frozen=True)
class Step:
    """One step of the search."""

    schedule: Schedule
    kl: float
    """KL divergence to the unreduced output, nats an image."""
    price: float
    """The increase of ``kl`` over the step before, divided by the share of the FLOPs that the step saves."""


class GreedySearch:
    """Grows a schedule step by step: each step removes more tokens at the block with the lowest price.

    Prices are measured on top of all steps before. A price almost always rises with the number of removed tokens, so a
    block is measured again only if its last price is below the best new one (lazy greedy, Minoux 1978). The result
    depends on the images alone. The states of the images before each block are cached, so that a larger ratio
    continues where a smaller one stopped.

    Args:
        model: a patched model.
        use: puts a schedule in force.
        policy: the policy of the model.
        blocks: the blocks that may reduce.
        images: (B, channels, H, W), unlabelled, preprocessed and on the model's device.
        resolution: (height, width) to which the reduced model's picture is resized.
        skipped: for each block the names of the scan paths that the reduced model skips.
    """

    def __init__(
        self,
        model: Backbone,
        use: Callable[[Schedule], None],
        policy: Policy,
        blocks: Iterable[int],
        images: Tensor,
        resolution: Size | None = None,
        skipped: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        self.beside = {"resolution": resolution, "skipped": skipped}
        self._model, self._use, self._policy = model, use, policy
        self._size = (images.shape[-2], images.shape[-1])
        self._infos = block_infos(model, policy, self._size, resolution)
        self._prices = dict.fromkeys(blocks, 0.0)
        with torch.no_grad():
            unreduced = make_schedule(model, policy, ratio=0.0, img_size=self._size)
            self._unreduced = self._log_probs(self._from_images(images, unreduced)[-1])
            start = self._cost([0] * len(self._infos))  # the policy may act at other places than after mixers
            self._states = self._from_images(images, start)
            self._steps = [Step(start, self._kl(self._states[-1]), 0.0)]

    @torch.no_grad()
    def reach(self, ratio: float) -> Schedule:
        """The first schedule that saves this share of the FLOPs; the last one if none does."""
        while self._steps[-1].schedule.reduction < ratio and (step := self._next_step()):
            self._steps.append(step)
        reached = [step.schedule for step in self._steps if step.schedule.reduction >= ratio]
        return reached[0] if reached else self._steps[-1].schedule

    def _next_step(self) -> Step | None:
        """The step of the lowest price, ``None`` if no block can remove more."""
        current, best = self._steps[-1], None
        for block in sorted(self._prices, key=lambda block: self._prices[block]):
            if best is not None and best.price <= self._prices[block]:
                break
            more = self._remove_more(block, current.schedule)
            saved = more.reduction - current.schedule.reduction
            if saved <= 0:
                del self._prices[block]
                continue
            states = self._run(block, self._states[block], more)
            kl = self._kl(states[-1])
            self._prices[block] = (kl - current.kl) / saved
            if best is None or self._prices[block] < best.price:
                best = Step(more, kl, self._prices[block])
                continued = [*self._states[:block], *states]
        if best is not None:
            self._states = continued
        return best

    def _remove_more(self, block: int, current: Schedule) -> Schedule:
        """The fewest additional tokens at this block that save ``STRIDE``, or as many as the block can remove."""

        def with_more(extra: int) -> Schedule:
            return self._cost([count + extra * (i == block) for i, count in enumerate(current.remove)])

        target = current.reduction + STRIDE
        return with_more(bisect_left(range(current.tokens[block]), target, key=lambda n: with_more(n).reduction))

    def _cost(self, counts: Sequence[int]) -> Schedule:
        possible = possible_counts(self._policy, counts, self._infos)
        beside: Any = self.beside
        return make_schedule(self._model, self._policy, schedule=possible, img_size=self._size, **beside)

    def _from_images(self, images: Tensor, schedule: Schedule) -> list[TokenState]:
        self._use(schedule)
        return self._run(0, first_state(self._model, images), schedule)

    def _kl(self, state: TokenState) -> float:
        """KL divergence of the output for a state after the last block to the unreduced output, nats an image."""
        reduced = self._log_probs(state)
        return F.kl_div(reduced, self._unreduced, reduction="batchmean", log_target=True).item()

    def _run(self, first: int, state: TokenState, schedule: Schedule) -> list[TokenState]:
        """Run the blocks from ``first`` on: the states before each of them and after the last."""
        self._use(schedule)
        states = []
        for before, after in run(self._model, state, first):
            states.append(before)
            state = after
        return [*states, state]

    def _log_probs(self, state: TokenState) -> Tensor:
        """The state after the last block -> (B, K) in float64."""
        return self._model.classify(state).double().log_softmax(-1)


@torch.no_grad()
def divergences(
    model: Backbone, use: Callable[[Schedule], None], unreduced: Schedule, schedules: Sequence[Schedule], images: Tensor
) -> list[float]:
    """KL divergence of the output under each schedule to the unreduced output, nats an image.

    Args:
        model: a patched model.
        use: puts a schedule in force.
        images: (B, channels, H, W), preprocessed and on the model's device.
    """

    def log_probs(schedule: Schedule) -> Tensor:
        use(schedule)
        return model.classify(last_state(model, images)).double().log_softmax(-1)

    target = log_probs(unreduced)
    return [
        F.kl_div(log_probs(schedule), target, reduction="batchmean", log_target=True).item() for schedule in schedules
    ]
