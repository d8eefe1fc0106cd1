"""The paths along which a block scans its tokens, and the order of the survivors of a reduction on each path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mtr_lab.tokens.layout import Layout
from mtr_lab.tokens.state import TokenState


@dataclass(frozen=True)
class ScanPath:
    """One direction of a scan over the patches of a grid; special tokens keep their position in the sequence.

    Args:
        name: policies select evidence by it.
        reverse: scan from the last token to the first.
        columns: column by column instead of row by row.
        snake: every second line in the opposite direction, so that neighbours on the path are neighbours in the image.
    """

    name: str
    reverse: bool = False
    columns: bool = False
    snake: bool = False

    @property
    def is_raster(self) -> bool:
        """Whether the path is the token order or its reverse, for which a scan needs no table."""
        return not (self.columns or self.snake)

    def order(self, layout: Layout, device: torch.device) -> Tensor:
        """(L0,) int64, the positions of an unreduced sequence in the order of the path."""
        lines = torch.arange(layout.patches, device=device).view(layout.frames, *layout.grid)
        lines = (lines.transpose(1, 2) if self.columns else lines).flatten(0, 1)
        if self.snake:
            odd = torch.arange(len(lines), device=device) % 2 == 1
            lines = torch.where(odd[:, None], lines.flip(1), lines)
        patches = layout.patch_positions(device)
        order = torch.arange(layout.tokens, device=device).scatter(0, patches, patches[lines.flatten()])
        return order.flip(0) if self.reverse else order


PATHS = {
    path.name: path
    for path in (
        ScanPath("forward"),
        ScanPath("backward", reverse=True),
        ScanPath("columns", columns=True),
        ScanPath("columns_backward", reverse=True, columns=True),
        ScanPath("snake", snake=True),
        ScanPath("snake_backward", reverse=True, snake=True),
        ScanPath("columns_snake", columns=True, snake=True),
        ScanPath("columns_snake_backward", reverse=True, columns=True, snake=True),
    )
}


def order(state: TokenState, paths: Sequence[ScanPath]) -> Tensor | None:
    """The tokens of a state in the order of each path, as ``mtr_lab.ops.selective_scan`` takes it.

    Survivors keep the order of their original positions along the path. No sort is needed: the rank of a survivor is
    the number of survivors before it.

    Returns:
        (G, B, L) int64, or ``None`` if all paths are raster.
    """
    if all(path.is_raster for path in paths):
        return None
    tables = _tables(paths, _layout(state), state.index.device)
    if state.index.shape[1] == tables.shape[1]:  # the grid is full
        return tables[:, None].expand(-1, state.index.shape[0], -1)
    step = _steps(tables, state)
    occupied = step.new_zeros(*step.shape[:2], tables.shape[1]).scatter_(2, step, 1)
    rank = (occupied.cumsum(2) - 1).gather(2, step)  # of each token among the survivors
    tokens = torch.arange(rank.shape[2], device=rank.device).expand_as(rank)
    return torch.zeros_like(rank).scatter_(2, rank, tokens)


def gap(state: TokenState, paths: Sequence[ScanPath]) -> Tensor:
    """The number of removed tokens just before each step of each path, (B, G, L) int64."""
    if all(path.is_raster for path in paths):
        missing = F.pad(state.index.diff(dim=1) - 1, (1, 1))  # before each token, and after the last one
        gaps = [missing[:, 1:].flip(1) if path.reverse else missing[:, :-1] for path in paths]
        return torch.stack(gaps, dim=1)
    tokens = order(state, paths)
    assert tokens is not None
    steps = _steps(_tables(paths, _layout(state), state.index.device), state)
    return F.pad(steps.gather(2, tokens).diff(dim=2) - 1, (1, 0)).transpose(0, 1)


def steps(state: TokenState, paths: Sequence[ScanPath]) -> Tensor:
    """The step at which each path reads the original position of each token, (G, B, L) int64."""
    layout, device = _layout(state), state.index.device
    if state.index.shape[1] == layout.tokens:  # the grid is full
        return _ranks(paths, layout, device)[:, None].expand(-1, state.index.shape[0], -1)
    return _ranks(paths, layout, device)[:, state.index]


def moves(state: TokenState, paths: Sequence[ScanPath]) -> Tensor:
    """The move over the grid from the position before it on each path to that of each token.

    Returns:
        (G, B, L) int64: 0 for the first position of a path, 1 from the left, 2 from the right, 3 from below, 4 from
        above.
    """
    layout, device = _layout(state), state.index.device
    table = _moves(paths, layout, device)
    if state.index.shape[1] == layout.tokens:
        return table[:, None].expand(-1, state.index.shape[0], -1)
    return table[:, state.index]


def walk(layout: Layout, paths: Sequence[ScanPath], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """How paths run over a full grid without special tokens.

    Returns:
        order: (G, L0) int64, the token at each step.
        steps: (G, L0) int64, the step at which each token is read.
        moves: (G, L0) int64, the move that leads to each step, numbered as in ``moves``.
    """
    return _tables(paths, layout, device), _ranks(paths, layout, device), _step_moves(paths, layout, device)


def _steps(tables: Tensor, state: TokenState) -> Tensor:
    """(G, B, L) int64, the step at which each path reads the original position of each token."""
    return _inverse(tables)[:, state.index]


def _inverse(tables: Tensor) -> Tensor:
    """(G, L0) int64, the step at which each path reads each position, of the orders of the paths."""
    steps = torch.arange(tables.shape[1], device=tables.device).expand_as(tables)
    return torch.zeros_like(tables).scatter_(1, tables, steps)


Table = Callable[[Sequence[ScanPath], Layout, torch.device], Tensor]


def _cached(make: Table) -> Table:
    """Cached, but not while a compiler or a dispatch mode records: its tensors must not be used later."""

    @lru_cache(64)
    def cached(paths: tuple[ScanPath, ...], layout: Layout, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # else a later pass with gradients could not use it
            return make(paths, layout, device)

    def table(paths: Sequence[ScanPath], layout: Layout, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return make(paths, layout, device)
        return cached(tuple(paths), layout, device)

    return table


@_cached
def _tables(paths: Sequence[ScanPath], layout: Layout, device: torch.device) -> Tensor:
    """(G, L0) int64, the order of each path over an unreduced sequence."""
    return torch.stack([path.order(layout, device) for path in paths])


@_cached
def _ranks(paths: Sequence[ScanPath], layout: Layout, device: torch.device) -> Tensor:
    """(G, L0) int64, the step at which each path reads each position."""
    return _inverse(_tables(paths, layout, device))


@_cached
def _step_moves(paths: Sequence[ScanPath], layout: Layout, device: torch.device) -> Tensor:
    """(G, L0) int64, the move that leads to each step, numbered as in ``moves``."""
    order = _tables(paths, layout, device)
    down, right = (F.pad(places.diff(dim=1), (1, 0)) for places in (order // layout.columns, order % layout.columns))
    return (right > 0) + 2 * (right < 0) + 3 * (down < 0) + 4 * (down > 0)


@_cached
def _moves(paths: Sequence[ScanPath], layout: Layout, device: torch.device) -> Tensor:
    """(G, L0) int64, as ``moves``, of each position of a grid without special tokens."""
    return _step_moves(paths, layout, device).gather(1, _ranks(paths, layout, device))


def _layout(state: TokenState) -> Layout:
    layout = state.grid or state.layout
    if layout is None:
        raise ValueError("a path over the grid needs the state's layout: pass it to TokenState.start")
    return layout
