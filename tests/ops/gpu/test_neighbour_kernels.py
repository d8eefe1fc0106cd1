"""The decision among neighbours in kernels against plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtr_lab import ops
from mtr_lab.ops.gpu import decision, neighbours
from mtr_lab.ops.neighbours import NEIGHBOUR_PLAN

NAMES = ("dest", "weight", "keep", "removed", "offsets", "index", "size", "special")


def on_a_grid(patches, length, special, channels=12, batch=2, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rank = torch.rand(batch, patches + special, generator=generator)
    rank[:, torch.arange(special) * 3 % (patches + special)] = -1  # special tokens stay
    index = rank.argsort(dim=1, stable=True)[:, :length].sort(1).values
    at = (index[..., None] == torch.arange(special) * 3 % (patches + special)).int().argmax(1)
    size = torch.randint(1, 5, (batch, length), generator=generator).float()
    hidden, residual = (torch.randn(batch, length, channels, generator=generator) for _ in range(2))
    return index, size, at, hidden, residual


def check(*arguments):
    for load in (0, neighbours.LOAD):  # programs for many images and for few
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neighbours, "LOAD", load)
            equals_reference(ops.NeighbourInputs(*arguments))


def equals_reference(inputs):
    with ops.use_backend("triton"):
        assert NEIGHBOUR_PLAN.pick(*inputs).name == "triton"
        actual = ops.neighbour_plan(inputs)
    with ops.use_backend("reference"):
        expected = ops.neighbour_plan(inputs)
    for name, mine, right in zip(
        NAMES, (*actual[:5], *actual.metadata), (*expected[:5], *expected.metadata), strict=True
    ):
        if name == "weight":
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=0)
        else:
            assert torch.equal(mine, right), name


GRIDS = [(23,), (5, 6), (3, 4, 3)]


@pytest.mark.slow
@settings(max_examples=15 if torch.cuda.is_available() else 5, deadline=None)
@given(share=st.floats(0.3, 1), special=st.integers(0, 3), removed=st.floats(0, 1), seed=st.integers(0, 99))
@pytest.mark.parametrize("axes", GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_plain_pytorch(axes, weighted, share, special, removed, seed):
    patches = torch.Size(axes).numel()
    length = special + max(3, round(share * patches))
    index, size, at, *streams = on_a_grid(patches, length, special, seed=seed)
    remove = max(1, round(removed * ((length - special + 1) // 2)))
    check(index, size, at, size if weighted else None, *streams, remove, bool(seed % 2), axes)


@pytest.mark.parametrize("axes", GRIDS)
@pytest.mark.parametrize("streams", [(True, True), (True, False), (False, True)])
def test_streams(axes, streams):
    index, size, at, *both = on_a_grid(torch.Size(axes).numel(), 20, 1, channels=70)
    chosen = (stream if wanted else None for stream, wanted in zip(both, streams, strict=True))
    check(index, size, at, size, *chosen, 6, True, axes)


def test_several_programs_an_image():
    index, size, at, *streams = on_a_grid(14 * 14, 160, 1)
    check(index, size, at, size.exp(), *streams, 70, True, (14, 14))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_of_a_half_precision_model(dtype):
    index, size, at, hidden, residual = on_a_grid(30, 25, 1, channels=40)
    check(index, size, at, size, hidden.to(dtype), residual, 7, True, (5, 6))


def test_rows_that_images_share():
    index, size, at, *streams = on_a_grid(30, 31, 1, batch=1)
    shared = (t.expand(3, -1) for t in (index, size, at))
    check(*shared, size.expand(3, -1), *(t.expand(3, -1, -1) for t in streams), 7, True, (5, 6))


def test_equal_distances_go_in_their_order():
    index, size, at, hidden, _ = on_a_grid(30, 25, 1)
    check(index, size, at, None, torch.ones_like(hidden), None, 7, False, (5, 6))


def test_tokens_without_a_number():
    index, size, at, hidden, residual = on_a_grid(30, 31, 1)
    hidden[0, 2::7] = float("nan")
    inputs = ops.NeighbourInputs(index, size, at, size, hidden, residual, 15, True, (5, 6))
    with ops.use_backend("triton"):
        plan = ops.neighbour_plan(inputs)
    assert torch.equal(torch.cat([plan.keep, plan.removed], 1).sort(1).values, torch.arange(31).expand(2, -1))


@pytest.mark.parametrize(
    ("length", "removed", "dtype", "expected"),
    [
        (30, 4, torch.float32, "triton"),
        (decision.MAX_LENGTH + 1, 4, torch.float32, "reference"),
        (decision.MAX_REMOVED * 3, decision.MAX_REMOVED + 1, torch.float32, "reference"),
        (30, 4, torch.float64, "reference"),
    ],
)
def test_larger_decisions_run_in_plain_pytorch(length, removed, dtype, expected):
    index, hidden = torch.empty(1, length, dtype=torch.int64), torch.empty(1, length, 8, dtype=dtype)
    with ops.use_backend("triton"):
        inputs = index, index.float(), index[:, :1], None, hidden, None, removed, False, (length,)
        assert NEIGHBOUR_PLAN.pick(*inputs).name == expected
