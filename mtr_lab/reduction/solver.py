"""The schedule of a ratio: the size of the picture, the skipped scan paths, and the tokens that every block removes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mtr_lab.backbones import blocks_of
from mtr_lab.errors import UserError
from mtr_lab.reduction.blocks import block_infos, reducing_blocks
from mtr_lab.reduction.directions import Pair, Skipped, enough_pairs, last_first, least_first
from mtr_lab.reduction.dtp import deviations, two_blocks
from mtr_lab.reduction.partial_blocks import SCANS
from mtr_lab.reduction.resolution import Size, fewer_frames, picture_of, smaller_pictures
from mtr_lab.reduction.schedule import AUTO, DTP, MEASURED, NO_TOKENS, SHAPES, OutOfReach, Schedule, make_schedule
from mtr_lab.reduction.sensitivity import GreedySearch, divergences

if TYPE_CHECKING:
    from mtr_lab.reduction.handle import Reduction  # imports this module


def measured_on_images(config: Mapping[str, Any]) -> str:
    """The setting of a policy's configuration by which schedules are measured on images, empty if none is."""
    if isinstance(config["schedule"], str) and config["schedule"] in MEASURED:
        return f"mtr.schedule={config['schedule']}"
    if config["resolution"] == AUTO and config["schedule"] != NO_TOKENS:
        return "mtr.resolution=auto"
    return "mtr.paths=least" if config["paths"] == "least" else ""


class Solver:
    """Solves schedules for the policy of a model. What it measures on images once, it uses for all ratios.

    Args:
        reduction: the handle of the model.
        img_size: (height, width) that the ratio refers to, the model's own by default.
        images: (B, channels, H, W) on the model's device, to measure on; they set ``img_size``.
    """

    def __init__(self, reduction: "Reduction", img_size: Size | None, images: Tensor | None) -> None:
        self._reduction, self._model, self._policy = reduction, reduction.model, reduction.policy
        self._config = reduction.config
        self._img_size = img_size if images is None else (images.shape[-2], images.shape[-1])
        self._images = images
        self._search: GreedySearch | None = None
        self._pairs: list[Pair] = []
        self._deviations: list[float] | None = None

    def solve(self, ratio: float | None, resolution: float | None) -> Schedule:
        """See ``Reduction.solve``."""
        resolution = self._config["resolution"] if resolution is None else resolution
        full = self._img_size or self._model.input_shape[-2:]
        frames = self._config.get("frames")  # older configurations lack it
        if frames is not None:
            if resolution is not None:
                raise UserError(f"mtr.frames={frames} and mtr.resolution={resolution}: set one of them to null.")
            shorter = [(count, *full) for count in fewer_frames(self._model, frames)]
            if ratio == 0:
                return self._solve_tokens(ratio, None)
            return self._solve_frames(ratio, shorter) if frames == AUTO else self._solve_tokens(ratio, shorter[0])
        if resolution is None or ratio == 0:
            return self._solve_tokens(ratio, None)
        if resolution == AUTO:  # given counts leave no budget for a smaller picture
            return self._solve_tokens(ratio, None) if ratio is None else self._solve_picture(ratio, full)
        picture = picture_of(self._model, resolution, full)
        return self._solve_tokens(ratio, None if picture == tuple(full) else picture)

    def release_images(self) -> None:
        """Free the images, and what was measured on them."""
        self._images = self._search = self._deviations = None
        self._pairs = []

    def _solve_picture(self, ratio: float, full: Sequence[int]) -> Schedule:
        """The schedule on the size of the picture that changes the output least; the largest, if no block reduces."""
        if self._images is None and self._config["schedule"] != NO_TOKENS:
            raise UserError(
                "mtr.resolution=auto measures on images how to divide the ratio between the size of the picture and "
                "the tokens, and got none: pass about a hundred as patch(…, images=images), or give the size, "
                "such as mtr.resolution=0.75."
            )
        schedules, error = [], None
        for picture in (None, *smaller_pictures(self._model, full)):
            alone = self._without_removal(picture)
            if alone.reduction >= ratio:
                schedules.append(alone)
                break
            try:
                schedules.append(self._solve_tokens(ratio, picture))
            except OutOfReach as out_of_reach:
                error = out_of_reach
        if not schedules:
            raise error or OutOfReach(f"mtr.ratio={ratio} is out of reach: the model accepts no smaller picture.")
        if len(schedules) == 1:
            return schedules[0]
        with self._measuring() as images:
            kl = divergences(self._model, self._reduction.use, self._unreduced(), schedules, images)
        return schedules[kl.index(min(kl))]

    def _solve_frames(self, ratio: float | None, shorter: Sequence[Size]) -> Schedule:
        """The longest video that is enough, from which no token is removed."""
        if ratio is None or self._config["schedule"] != NO_TOKENS:
            raise UserError(
                f"mtr.frames=auto chooses the frames that mtr.ratio leaves, and no tokens: give mtr.ratio and "
                f"mtr.schedule={NO_TOKENS}, or the number of frames."
            )
        schedules = [self._without_removal(size) for size in shorter]
        enough = next((schedule for schedule in schedules if schedule.reduction >= ratio), None)
        if enough is None:
            raise OutOfReach(f"mtr.ratio={ratio} is out of reach: one frame is left of the video. Lower it.")
        return enough

    def _solve_tokens(self, ratio: float | None, resolution: Size | None) -> Schedule:
        """The schedule on a picture of that size."""
        counts, layers = self._config["schedule"], self._config["layers"]
        beside: Any = {"resolution": resolution, "skipped": self._skipped(ratio, resolution)}
        solve = partial(self._make_schedule, ratio=ratio, layers=layers, **beside)
        if ratio is None and counts == NO_TOKENS:
            return self._without_removal(resolution)
        if counts == DTP and ratio and self._images is not None:
            return solve(schedule=dict.fromkeys(self._two_blocks(), 1.0))
        if counts == AUTO and ratio and self._images is not None:
            constant = solve(first_block=0, interval=1)  # refuses a ratio out of reach before anything is measured
            return self._least_change(ratio, solve, beside) if any(constant.remove) else constant
        return solve(schedule="constant" if ratio == 0 else counts, **self._blocks)

    def _skipped(self, ratio: float | None, resolution: Size | None) -> Skipped:
        """The scan paths that every block skips, to save the part of the ratio that the policy gives to them."""
        part = SCANS[self._policy.paths]
        if part is None or not part.skips or not ratio:
            return ()
        cost = partial(self._without_removal, resolution)
        if not self._pairs and part.skips == "last":
            self._pairs = last_first(self._model)
        elif not self._pairs:
            if self._images is None:
                raise UserError(
                    "mtr.paths=least measures on images which directions matter least, and got none: pass about "
                    "a hundred as patch(…, images=images), or take mtr.paths=last."
                )
            with self._measuring() as images:
                self._pairs = least_first(self._model, self._reduction.use, cost, self._unreduced(), images)
        return enough_pairs(self._pairs, self._policy.paths_share * ratio, len(blocks_of(self._model)), cost)

    def _two_blocks(self) -> list[int]:
        """The blocks that reduce under ``schedule=dtp``."""
        infos = block_infos(self._model, self._policy, self._img_size)
        if self._deviations is None:
            with self._measuring() as images:
                self._deviations = deviations(self._model, self._policy, infos, self._unreduced(), images)
        return two_blocks(self._deviations, infos, self._policy)

    def _least_change(self, ratio: float, solve: Callable[..., Schedule], beside: dict[str, Any]) -> Schedule:
        """The schedule that changes the output least on the images: that of the search, or a named one."""
        schedules = [solve(schedule=self._search_blocks(ratio, beside))]
        for shape in SHAPES:
            with contextlib.suppress(UserError):  # the model lacks these blocks, or they cannot remove as much as all
                schedules.append(solve(schedule=shape, **self._blocks))
        with self._measuring() as images:
            kl = divergences(self._model, self._reduction.use, self._unreduced(), schedules, images)
        return schedules[kl.index(min(kl))]

    def _search_blocks(self, ratio: float, beside: dict[str, Any]) -> dict[int, float]:
        """The counts that a search over all blocks finds, as weights for ``make_schedule``."""
        with self._measuring() as images:
            if self._search is None or self._search.beside != beside:
                infos = block_infos(self._model, self._policy, self._img_size, beside["resolution"])
                blocks = reducing_blocks(infos, self._policy, first_block=0, interval=1, layers=self._config["layers"])
                self._search = GreedySearch(self._model, self._reduction.use, self._policy, blocks, images, **beside)
            reached = self._search.reach(ratio)
        return {block: count for block, count in enumerate(reached.remove) if count}

    @property
    def _blocks(self) -> dict[str, Any]:
        """The settings of ``make_schedule`` that say at which blocks a named schedule reduces."""
        return {key: self._config[key] for key in ("first_block", "interval")}

    def _without_removal(self, resolution: Size | None, skipped: Skipped = ()) -> Schedule:
        """The schedule in which no block removes tokens."""
        counts = [0] * len(blocks_of(self._model))
        return self._make_schedule(schedule=counts, resolution=resolution, skipped=skipped)

    def _unreduced(self) -> Schedule:
        return self._make_schedule(ratio=0.0)

    def _make_schedule(self, **settings: Any) -> Schedule:
        return make_schedule(self._model, self._policy, img_size=self._img_size, **settings)

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[Tensor]:
        """The images to measure on; the model is in evaluation mode, and afterwards as it was.

        Raises:
            UserError: there is no image, or values that are not finite.
        """
        assert self._images is not None
        if not len(self._images) or not self._images.isfinite().all():
            what = "images with values that are not finite" if len(self._images) else "a batch without images"
            raise UserError(f"{measured_on_images(self._config)} measures on images, and got {what}.")
        model: Any = self._model
        training, schedule = model.training, self._reduction.schedule
        self._reduction.use(schedule)  # refuses a handle that is no longer in force
        model.eval()
        try:
            yield self._images
        finally:
            model.train(training)
            self._reduction.use(schedule)
