"""Matching among neighbours of the grid, and the decision made of it, against loops over tokens."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.ops.neighbours import NEIGHBOUR_PLAN

BACKENDS = ("reference", "cpu")


def tokens_on_a_grid(grid, share, special, seed=0, batch=2, channels=6):
    """Some tokens of a grid and all special ones: features, index, size and special positions."""
    generator = torch.Generator().manual_seed(seed)
    unreduced = math.prod(grid) + special
    length = max(special + 3, round(share * unreduced))
    places = torch.randperm(unreduced, generator=generator)[:special].sort().values.tolist()
    rows = []
    for _ in range(batch):
        ordinary = [i for i in torch.randperm(unreduced, generator=generator).tolist() if i not in places]
        rows.append(sorted(places + ordinary[: length - special]))
    index = torch.tensor(rows)
    at = torch.tensor([[row.index(place) for place in places] for row in rows], dtype=torch.int64).view(batch, special)
    size = torch.randint(1, 5, (batch, length), generator=generator).float()
    return torch.randn(batch, length, channels, generator=generator), index, size, at


def coordinates(index, special, grid):
    """Of one image: where each ordinary token stood on the grid, by its position."""
    places = {index[s] for s in special}
    ordinary = [i for i in range(max(index) + 1) if i not in places]
    return {
        i: np.unravel_index(ordinary.index(original), (10**6, *grid[1:]))
        for i, original in enumerate(index)
        if original not in places
    }


def are_neighbours(place, other):
    """Whether two places are at most one row and column apart, in the same frame."""
    *frame, row, column = (abs(int(a) - int(b)) for a, b in zip((0, *place)[-3:], (0, *other)[-3:], strict=True))
    return frame in ([], [0]) and max(row, column) <= 1


def nearest(features, where, index, i, targets):
    """The neighbour of token i among the targets, and its cosine; the nearest in the sequence if there is none."""
    near = [j for j in targets if are_neighbours(where[i], where[j])]
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    if near:
        best = max(near, key=lambda j: unit[i] @ unit[j])
        return best, float(unit[i] @ unit[best])
    ordinary = sorted(where)
    place = {j: index[j] - sum(index[s] < index[j] for s in range(len(index)) if s not in ordinary) for j in ordinary}
    return min(targets, key=lambda j: abs(place[i] - place[j])), -math.inf


GRIDS = st.one_of(
    st.tuples(st.integers(4, 30)),
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.tuples(st.integers(2, 3), st.integers(2, 4), st.integers(2, 4)),
)


@settings(max_examples=40, deadline=None)
@given(grid=GRIDS, share=st.floats(0.3, 1), special=st.integers(0, 2), seed=st.integers(0, 99))
def test_nearest_neighbour_equals_a_loop_over_pairs(grid, share, special, seed):
    features, index, _, at = tokens_on_a_grid(grid, share, special, seed)
    ordinary = torch.tensor([[i for i in range(index.shape[1]) if i not in row] for row in at.tolist()])
    order = torch.randperm(ordinary.shape[1], generator=torch.Generator().manual_seed(seed))
    source, target = ordinary[:, order[::3]], ordinary[:, order[1::3].sort().values]
    into, similarity = ops.nearest_neighbour(features, index, at, source, target, grid)
    for b in range(2):
        where = coordinates(index[b].tolist(), at[b].tolist(), grid)
        for a, i in enumerate(source[b].tolist()):
            arguments = features[b].double().numpy(), where, index[b].tolist(), i, target[b].tolist()
            expected, cosine = nearest(*arguments)
            assert into[b, a] == expected
            assert similarity[b, a].item() == pytest.approx(cosine, abs=1e-6)


def decided(features, index, size, special, weight, remove, by_size, grid):
    """For one image: the survivors, the merge target of each token, and its weight in the mean."""
    where = coordinates(index, special, grid)
    ordinary = sorted(where)
    costs = []
    for i in ordinary[::2]:
        into, cosine = nearest(features, where, index, i, ordinary[1::2])
        distance = math.inf if cosine == -math.inf else -cosine if weight is None else weight[i] * (1 - cosine)
        costs.append((distance, i, into))
    into = {i: i for i in range(len(index))} | {i: j for _, i, j in sorted(costs)[:remove]}
    mass = {i: size[i] if by_size else 1.0 for i in into}
    total = {j: sum(mass[i] for i in into if into[i] == j) for j in into.values()}
    return [i for i in into if into[i] == i], into, {i: mass[i] / total[into[i]] for i in into}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    grid=GRIDS, share=st.floats(0.3, 1), special=st.integers(0, 2), removed=st.floats(0, 1), by_size=st.booleans(),
    weighted=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_neighbour_plan_equals_a_loop_over_tokens(backend, grid, share, special, removed, by_size, weighted, seed):
    features, index, size, at = tokens_on_a_grid(grid, share, special, seed)
    length, sources = index.shape[1], (index.shape[1] - special + 1) // 2
    remove = max(1, round(removed * sources))
    hidden = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
    weight = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) if weighted else None
    inputs = ops.NeighbourInputs(index, size, at, weight, hidden, features - hidden, remove, by_size, grid)
    with ops.use_backend(backend):
        plan = ops.neighbour_plan(inputs)
    kept_index, kept_size, kept_at = plan.metadata
    for b in range(2):
        sizes, factors = size[b].tolist(), None if weight is None else weight[b].double().tolist()
        given_tokens = features[b].double().numpy(), index[b].tolist(), sizes, at[b].tolist()
        keep, into, share_of = decided(*given_tokens, factors, remove, by_size, grid)
        assert plan.keep[b].tolist() == keep
        assert plan.dest[b].tolist() == [keep.index(into[i]) for i in range(length)]
        assert plan.weight[b].tolist() == pytest.approx([share_of[i] for i in range(length)], rel=1e-6)
        merged = [[i for i in into if into[i] == j and i != j] for j in keep]
        bounds = plan.offsets[b].tolist()
        assert [sorted(plan.removed[b, i:j].tolist()) for i, j in pairwise(bounds)] == merged
        assert kept_index[b].tolist() == index[b][keep].tolist()
        assert kept_size[b].tolist() == [
            sizes[j] + sum(sizes[i] for i in group) for j, group in zip(keep, merged, strict=True)
        ]
        assert [keep[s] for s in kept_at[b].tolist()] == at[b].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_distances_go_in_their_order_and_to_the_first_neighbour(backend):
    features, index, at = torch.ones(1, 9, 3), torch.arange(9)[None], torch.zeros(1, 0, dtype=torch.int64)
    inputs = ops.NeighbourInputs(index, torch.ones(1, 9), at, None, None, features, 3, True, (3, 3))
    with ops.use_backend(backend):
        plan = ops.neighbour_plan(inputs)
    assert plan.keep.tolist() == [[1, 3, 5, 6, 7, 8]]
    assert plan.dest.tolist() == [[0, 0, 0, 1, 1 - 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(36,), (6, 6), (4, 3, 3)])
def test_flops_are_those_of_the_neighbours(backend, grid):
    features, index, size, at = tokens_on_a_grid(grid, 1, 1)
    with FlopCounterMode(display=False) as counter, ops.use_backend(backend):
        ops.neighbour_plan(ops.NeighbourInputs(index, size, at, size, None, features, 4, True, grid))
    neighbours = 2 if len(grid) == 1 else 8  # in the same frame
    assert counter.get_total_flops() == 2 * 2 * 18 * neighbours * 6
    with FlopCounterMode(display=False) as counter:
        ops.nearest_neighbour(features, index, at, index[:, ::2], index[:, 1::2], grid)
    assert counter.get_total_flops() == 2 * 2 * 19 * neighbours * 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    features, index, size, at = tokens_on_a_grid((5, 4), 0.8, 1)
    inputs = index, size, at, size, features, features, 4, True, [5, 4], backend
    torch.library.opcheck(
        torch.ops.mtr_lab.neighbour_plan.default, inputs, test_utils=("test_schema", "test_faketensor")
    )
    pairs = features, index, at, index[:, 1:4], index[:, 5:9], [5, 4], "reference"
    torch.library.opcheck(torch.ops.mtr_lab.nearest_neighbour.default, pairs)


def test_the_cpu_kernels_leave_double_precision_to_plain_pytorch():
    features, index, size, at = tokens_on_a_grid((5, 4), 0.8, 1)
    assert NEIGHBOUR_PLAN.pick(index, size, at, size, None, features, 4, True, (5, 4)).name == "cpu"
    assert NEIGHBOUR_PLAN.pick(index, size, at, size, None, features.double(), 4, True, (5, 4)).name == "reference"
