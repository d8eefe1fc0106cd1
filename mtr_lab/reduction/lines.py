"""``grouping=lines``: every row of the grid loses the same number of tokens, then every column; a full grid remains.

STORM (arXiv 2606.19932). In a row the positions (0, 1), (2, 3), … are pairs; a last one without a partner stays. The
removals of a row are shared out over windows of consecutive pairs, in proportion to their lengths (floor, then largest
remainder). In a window the most similar pairs merge into their second token; with ``merge=prune`` the less important
token of a pair goes, those of least importance first. Columns follow in the same way, on the merged tokens.

Left open by the source and chosen here: both sides shrink in proportion, one line at a time; every frame and window
is a separate grid; special tokens stand again behind the same share of the patches, as in a smaller picture.

B sequences, L tokens, P pairs of a line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab import ops
from mtr_lab.ops import Plan, make_plan
from mtr_lab.tokens import Layout, TokenState

LINES, GRID = "lines", "grid"
"""The values of ``mtr.grouping`` and ``mtr.order`` that belong together."""


def grids(layout: Layout) -> dict[int, Layout]:
    """The grids that can remain of a full one, by their number of tokens, from the largest to one patch a frame."""
    rows, columns = layout.grid
    chain = {layout.tokens: layout}
    while rows * columns > 1:
        if rows == 1 or (columns > 1 and columns * layout.rows >= rows * layout.columns):
            columns -= 1
        else:
            rows -= 1
        smaller = layout.resized(rows, columns)
        chain[smaller.tokens] = smaller
    return chain


cached_grids = lru_cache(64)(grids)
"""``grids`` for schedules; a compiler that traces a plan ignores caches, and warns of them."""


def removals(tokens: int, layout: Layout) -> list[int]:
    """The numbers of tokens that one step can remove: at most half of a line, rounded down.

    Args:
        tokens: how many there are, a key of ``grids``.
        layout: of the unreduced tokens.
    """
    old = cached_grids(layout)[tokens]
    return [
        tokens - number
        for number, new in cached_grids(layout).items()
        if number < tokens and 2 * new.rows >= old.rows and 2 * new.columns >= old.columns
    ]


def flops(tokens: int, layout: Layout, remove: int, channels: int, *, merges: bool) -> int:
    """True FLOPs of making and applying a plan on one sequence; arguments as ``removals``."""
    old, new = cached_grids(layout)[tokens], cached_grids(layout)[tokens - remove]
    applied = 2 * 2 * remove * channels
    if not merges:
        return applied
    shorter, fewer = new.columns < old.columns, new.rows < old.rows
    pairs = shorter * old.rows * (old.columns // 2) + fewer * new.columns * (old.rows // 2)
    merged_between = old.rows * (old.columns - new.columns) if shorter and fewer else 0
    return applied + 2 * old.frames * (pairs + merged_between) * channels


@dataclass(frozen=True)
class Rule:
    """How the tokens of a line are chosen and merged.

    Args:
        window: pairs in a window.
        cosine: compare the tokens of a pair by cosine, else by the negative L1 distance.
        mass: the weights of a mean, see ``merge.Merge``.
        normalised: whether merged tokens are averaged, else added.
    """

    window: int
    cosine: bool
    mass: Callable[[TokenState, Tensor], Tensor]
    normalised: bool


def plan(state: TokenState, remove: int, rule: Rule, features: Tensor | None, importance: Tensor) -> Plan:
    """The plan that removes whole lines' worth of tokens.

    Args:
        state: with its layout; its tokens form a full grid.
        features: (B, L, C), compared to merge the most similar; ``None`` to drop the less important.
        importance: (B, L).

    Raises:
        ValueError: the state has no layout.
    """
    if state.layout is None:
        raise ValueError("rows and columns need the state's layout: pass it to TokenState.start")
    old, new = state.current_layout, grids(state.layout)[state.index.shape[1] - remove]
    assert old is not None
    middle = state.layout.resized(old.rows, new.columns)
    rows = columns = None
    if new.columns < old.columns:
        rows = _step(state, old, middle, False, rule, features, importance)
        if new.rows == old.rows:
            return rows._replace(grid=new.grid)
        state = state._replace(source=None, offset=None).reduced(rows)  # of which metadata alone are read
        features = None if features is None else ops.apply_plan(features, *rows[:5])
        importance = importance.gather(1, rows.keep)
    columns = _step(state, middle, new, True, rule, features, importance)
    return (columns if rows is None else _both(rows, columns))._replace(grid=new.grid)


def _both(first: Plan, second: Plan) -> Plan:
    """The plan with the effect of one plan after the other."""
    into = first.dest.clamp(min=0)
    dest = torch.where(first.dest < 0, -1, second.dest.gather(1, into))
    weight = first.weight * second.weight.gather(1, into)
    removed = torch.cat([first.removed, first.keep.gather(1, second.removed)], dim=1)
    return Plan(dest, weight, first.keep.gather(1, second.keep), removed)


def _step(
    state: TokenState,
    old: Layout,
    new: Layout,
    columns: bool,
    rule: Rule,
    features: Tensor | None,
    importance: Tensor,
) -> Plan:
    """The plan that shortens every row, or every column, from the layout ``old`` to ``new``."""
    batch, device = state.index.shape[0], state.index.device
    lines, slots = _lines(old, columns, device), _lines(new, columns, device)  # (K, n), (K, n'), sequence positions
    first, second = lines[:, :-1:2], lines[:, 1::2]  # (K, P)
    everywhere = (batch, *first.shape)
    if features is None:
        lesser, other = (importance[:, places] for places in (first, second))  # (B, K, P)
        drops_first, value = lesser <= other, -torch.minimum(lesser, other)
    else:
        one, other = (places.flatten().expand(batch, -1) for places in (first, second))
        value = ops.pair_similarity(features, one, other, rule.cosine).view(everywhere)
        drops_first = torch.ones(everywhere, dtype=torch.bool, device=device)
    removed = _chosen(value, lines.shape[1] - slots.shape[1], rule.window)
    removed = torch.stack([removed & drops_first, removed & ~drops_first], dim=-1).flatten(2)
    removed = F.pad(removed, (0, lines.shape[1] - removed.shape[2]))  # (B, K, n), a last token without a partner stays

    place = removed.long().argsort(dim=2, descending=True, stable=True)[..., : lines.shape[1] - slots.shape[1]]
    source = lines.expand(batch, -1, -1).gather(2, place)
    into = torch.full_like(source, -1)
    if features is not None:
        into = lines.expand(batch, -1, -1).gather(2, place + 1)
    slot = ((~removed).long().cumsum(2) - 1).clamp(min=0)  # of each survivor in its line
    position = slots.expand(batch, -1, -1).gather(2, slot)
    key = torch.zeros(importance.shape, dtype=torch.float64, device=device)
    key = key.scatter(1, lines.flatten().expand(batch, -1), position.flatten(1).double())
    for old_place, new_place in zip(old.special, new.special, strict=True):
        key[:, old_place] = new_place
    made = make_plan(source.flatten(1), into.flatten(1), key, rule.mass(state, importance))
    return made if rule.normalised else made._replace(weight=(made.dest >= 0).to(made.weight.dtype))


def _lines(layout: Layout, columns: bool, device: torch.device) -> Tensor:
    """The sequence positions of the patches, one row (or column) of a frame after the other: (K, n)."""
    grid = layout.patch_positions(device).view(layout.frames, *layout.grid)
    return (grid.transpose(1, 2) if columns else grid).flatten(0, 1)


def _chosen(value: Tensor, count: int, window: int) -> Tensor:
    """The pairs (B, K, P) of the highest values, ``count`` in each line, shared over windows; of equals the first."""
    parts = []
    for part, share in zip(value.split(window, dim=2), _shares(value.shape[2], count, window), strict=True):
        best = part.argsort(dim=2, descending=True, stable=True)[..., :share]
        parts.append(torch.zeros(part.shape, dtype=torch.uint8, device=value.device).scatter(2, best, 1))
    return torch.cat(parts, dim=2).bool()


def _shares(pairs: int, count: int, window: int) -> Sequence[int]:
    """How many of ``count`` removals each window gets: by length, rounded by the largest remainder."""
    lengths = [min(window, pairs - start) for start in range(0, pairs, window)]
    shares = [count * length // pairs for length in lengths]
    by_remainder = sorted(range(len(lengths)), key=lambda i: -(count * lengths[i] % pairs))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares
