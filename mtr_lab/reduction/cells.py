"""``mtr.input``: tokens of two sizes before the first block, one for all patches of a cell that has little detail."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.backbones import Backbone
from mtr_lab.errors import UserError
from mtr_lab.ops import make_plan
from mtr_lab.reduction.score import pseudo_random
from mtr_lab.tokens import Layout, TokenState
from mtr_lab.tokens.gather import take

SHAPES = {"2x2": (2, 2), "1x2": (1, 2), "2x1": (2, 1), "4x4": (4, 4)}
"""(rows, columns) of the patches of a cell."""
MEAN, COARSE = "mean", "coarse"
TOKENS = (MEAN, COARSE)
"""The token of a cell: the ``mean`` of its embedded patches, or ``coarse``, its patch of a picture shrunk by the cell,
with the position embedding interpolated to that grid."""
FIRST, MIDDLE = "first", "middle"
PLACES = (FIRST, MIDDLE)
"""The patch in whose place the token of a cell stands: the ``first`` in raster order or the ``middle`` one."""


def variance(cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """The variance of the pixels of each cell: (B, cells, channels, height, width) -> (B, cells)."""
    return cells.flatten(3).var(-1, correction=0).mean(-1)


def detail(cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """What is lost if a cell is shrunk to a patch: the mean variance of pixels that become one. As ``variance``."""
    rows, columns = shape
    merged = cells.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).movedim(4, 5)
    return merged.flatten(5).var(-1, correction=0).mean((2, 3, 4))


CRITERIA: dict[str, Callable[[Tensor, tuple[int, int]], Tensor] | None] = {
    "variance": variance,
    "detail": detail,
    "random": None,
}
"""What chooses the cells: the lowest ``variance`` of their pixels, the least ``detail``, or chance (``random``: by the
policy's seed, the same cells of every image)."""
PIXEL_FLOPS = 4  # of a criterion: add up the mean, subtract it, square, and add


@dataclass(frozen=True)
class Cells:
    """The choice of cells, and the token that each becomes. See ``Policy``."""

    criterion: str
    shape: str
    token: str
    place: str
    share: float
    seed: int

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of the patches of a cell."""
        return SHAPES[self.shape]

    def chosen(self, layout: Layout) -> int:
        """The number of cells that become one token each: as many as make up ``share``, as far as there are cells."""
        rows, columns = self.sides
        coarse = self._grid(layout)
        return min(round(self.share * layout.patches / (rows * columns - 1)), coarse.patches)

    def removes(self, layout: Layout) -> int:
        """The number of tokens removed from each sequence."""
        rows, columns = self.sides
        return self.chosen(layout) * (rows * columns - 1)

    def check(self, model: Backbone) -> None:
        """Raise a ``UserError`` unless the cells fit the model."""
        name, stage, layout = type(model).__name__, model.stages[0], model.layouts()[0]
        if layout.frames > 1 or layout.sequences > 1:
            raise UserError(f"mtr.input={self.criterion} cuts images into cells: {name} has frames or windows.")
        if not self._grid(layout).patches:
            grid = f"{layout.rows} x {layout.columns}"
            raise UserError(f"mtr.input_cell={self.shape} does not fit the {grid} patches of {name}.")
        if self.token == COARSE and (len(model.stages) > 1 or stage.stride != stage.patch_size):
            raise UserError(
                f"mtr.input_token={COARSE} shrinks the picture by whole patches, and those of {name} overlap or pass "
                f"several stages: set mtr.input_token={MEAN}."
            )

    def reduce(self, state: TokenState, images: Tensor, model: Backbone) -> TokenState:
        """The state before the first block with one token for each chosen cell; ``images`` are what was embedded."""
        layout = state.layout
        assert layout is not None
        number = self.chosen(layout)
        if number == 0:
            return state
        members = self._members(layout, images.device)
        picture = self._covered(images, layout, model)
        picked = self._scores(picture, layout, state).argsort(dim=1, stable=True)[:, :number]
        last = members.shape[1]
        kept = last // 2 if self.place == MIDDLE else 0
        target = members[:, kept][picked]  # (B, k)
        others = [column for column in range(last) if column != kept]
        source = members[:, others][picked].flatten(1)
        mass = torch.ones_like(state.size)
        if self.token == COARSE:
            mass = mass.scatter(1, source, 0)
            state = self._with_coarse_tokens(state, target, picked, picture, model)
        plan = make_plan(source, target.repeat_interleave(last - 1, dim=1), state.index.double(), mass)
        return state.reduced(plan)

    def flops(self, model: Backbone, layout: Layout) -> int:
        """True FLOPs of choosing the cells of one image, and of embedding the shrunk picture."""
        coarse, values = self._grid(layout), 0
        rows, columns = self.sides
        if self.chosen(layout):
            pixels = coarse.patches * rows * columns * model.stages[0].stride ** 2 * model.input_shape[0]
            values = pixels * ((CRITERIA[self.criterion] is not None) * PIXEL_FLOPS + (self.token == COARSE))
        if self.token == MEAN or not self.chosen(layout):
            return values
        both = model.costs([layout]).flops, model.costs([coarse]).flops  # linear in the number of patches
        return values + (both[0] - both[1]) // (layout.patches - coarse.patches) * coarse.patches

    def _grid(self, layout: Layout) -> Layout:
        """The layout of whole cells, without special tokens; patches beyond the last cell are in none."""
        rows, columns = self.sides
        return Layout(layout.rows // rows, layout.columns // columns)

    def _members(self, layout: Layout, device: torch.device) -> Tensor:
        """(cells, patches of a cell) int64, the positions of the patches of each cell in the sequence, ascending."""
        (rows, columns), coarse = self.sides, self._grid(layout)
        grid = layout.patch_positions(device).view(layout.rows, layout.columns)
        covered = grid[: coarse.rows * rows, : coarse.columns * columns]
        return covered.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).movedim(2, 1).flatten(0, 1).flatten(1)

    def _covered(self, images: Tensor, layout: Layout, model: Backbone) -> Tensor:
        """The part of the images that whole cells cover."""
        (rows, columns), coarse, stride = self.sides, self._grid(layout), model.stages[0].stride
        return images[..., : coarse.rows * rows * stride, : coarse.columns * columns * stride]

    def _scores(self, picture: Tensor, layout: Layout, state: TokenState) -> Tensor:
        """(B, cells): those of the lowest scores become one token."""
        coarse, criterion = self._grid(layout), CRITERIA[self.criterion]
        if criterion is None:
            return pseudo_random(torch.arange(coarse.patches, device=picture.device), self.seed).expand(
                len(picture), -1
            )
        cells = picture.float().unflatten(3, (coarse.columns, -1)).unflatten(2, (coarse.rows, -1))
        return criterion(cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), self.sides)

    def _with_coarse_tokens(
        self, state: TokenState, target: Tensor, picked: Tensor, picture: Tensor, model: Backbone
    ) -> TokenState:
        """The state with the tokens of the shrunk picture at ``target`` (B, k), for the cells ``picked`` (B, k)."""
        embedded = model.embed(F.avg_pool2d(picture, self.sides))
        assert embedded.layout is not None
        cells = embedded.layout.patch_positions(picture.device)
        values = take(embedded.hidden, cells[picked])
        hidden = state.hidden.scatter(1, target[..., None].expand_as(values), values.to(state.hidden.dtype))
        return state._replace(raw_hidden=hidden)
