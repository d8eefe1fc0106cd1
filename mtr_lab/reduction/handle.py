"""The handle of a patched model: the schedule in force, and others to switch to."""

from typing import Any

from torch import Tensor

from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.errors import UserError
from mtr_lab.reduction.active import ActiveBlockReduction, ActiveReduction
from mtr_lab.reduction.budgets import Budget
from mtr_lab.reduction.partial_blocks import SCANS, blocks_alone, sampled_blocks
from mtr_lab.reduction.policy import Policy, make_policy
from mtr_lab.reduction.schedule import Schedule
from mtr_lab.reduction.solver import Solver


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
        self._solver = Solver(self, img_size, images)
        detach(model)
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
        return self._solver.solve(ratio, resolution)

    def use(self, schedule: Schedule) -> None:
        """Put a schedule in force; the model's next forward pass follows it.

        Raises:
            UserError: the model was unpatched or patched anew since; the schedule has another depth.
        """
        if self._model.reduction is not self._active:
            raise UserError("this reduction is no longer in force: the model was unpatched or patched anew.")
        if len(schedule.remove) != (depth := len(blocks_of(self._model))):
            raise UserError(f"a schedule of {len(schedule.remove)} blocks does not fit a model of {depth}.")
        self._active.schedule = schedule

    def release_images(self) -> None:
        """Free the images that ``auto`` measures on, and what was measured: no more ratios can be solved."""
        self._solver.release_images()

    def __repr__(self) -> str:
        removed = f"{100 * self.schedule.reduction:.1f} % of the FLOPs removed"
        size = self.schedule.resolution
        picture = "" if size is None else f", picture {'×'.join(map(str, size))}"
        budget = "" if self.budget is None else f", {self.budget}"
        return f"Reduction({self.policy.policy!r}, {removed}{picture}, tokens {list(self.schedule.tokens)}{budget})"


def detach(model: Backbone) -> None:
    """Remove the policy of a model."""
    model.reduction = None
    for block in blocks_of(model):
        block.reduction = None
