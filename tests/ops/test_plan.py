import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops


def random_plan(seed, batch, length, kept, drop=0.3):
    """Survivors in random order; of the removed tokens, a share is dropped and the rest merged at random."""
    rng = np.random.default_rng(seed)
    dest, keep = np.zeros((batch, length), int), np.zeros((batch, kept), int)
    for b in range(batch):
        keep[b] = rng.permutation(length)[:kept]
        dest[b] = np.where(rng.random(length) < drop, -1, rng.integers(kept, size=length))
        dest[b, keep[b]] = np.arange(kept)
    weight = torch.from_numpy(rng.uniform(0.1, 1, (batch, length)))
    return torch.from_numpy(dest), weight, torch.from_numpy(keep), not_in(torch.from_numpy(keep), length)


def not_in(keep, length):
    removed = [[i for i in range(length) if i not in row] for row in keep.tolist()]
    return torch.tensor(removed, dtype=torch.int64).view(len(keep), -1)


def apply_loop(x, dest, weight, keep, removed):
    x, dest, weight = x.double().numpy(), dest.numpy(), weight.double().numpy()
    out = np.zeros((x.shape[0], keep.shape[1], x.shape[2]))
    for b, i in np.ndindex(dest.shape):
        if dest[b, i] >= 0:
            out[b, dest[b, i]] += weight[b, i] * x[b, i]
    return out


def tokens(batch, length, channels, dtype=torch.float32):
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(length)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half precision is rounded once, at the end.
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1.01 * 2**-8), (torch.float16, 1.01 * 2**-11)],
)
@settings(max_examples=50)
@given(data=st.data(), length=st.integers(1, 60), channels=st.integers(1, 9), batch=st.integers(1, 3))
def test_equals_the_loop_over_tokens(dtype, tolerance, data, length, channels, batch):
    kept = data.draw(st.integers(1, length))
    plan = random_plan(data.draw(st.integers(0, 2**32)), batch, length, kept)
    x = tokens(batch, length, channels, dtype)
    out = ops.apply_plan(x, *plan)
    assert out.dtype == dtype
    scale = apply_loop(x.abs(), *plan)
    assert (np.abs(out.double().numpy() - apply_loop(x, *plan)) <= tolerance * scale + tolerance * 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(length=st.integers(1, 60), remove=st.integers(0, 59), seed=st.integers(0, 2**32))
@example(length=5, remove=0, seed=0)
def test_survivors_alone_are_copied_bit_for_bit(dtype, length, remove, seed):
    dest, weight, keep, removed = random_plan(seed, 2, length, max(length - remove, 1), drop=1)
    x = tokens(2, length, 7, dtype)
    out = ops.apply_plan(x, dest, torch.ones_like(weight), keep, removed)
    assert torch.equal(out, x.gather(1, keep[..., None].expand(-1, -1, 7)))


def test_a_dropped_token_leaves_no_trace():
    dest, weight, keep = torch.tensor([[0, -1, 1]]), torch.ones(1, 3), torch.tensor([[0, 2]])
    x = torch.tensor([1.0, torch.nan, 2.0])[None, :, None].requires_grad_()
    out = ops.apply_plan(x, dest, weight, keep, torch.tensor([[1]]))
    assert out.flatten().tolist() == [1, 2]
    out.sum().backward()
    assert x.grad.flatten().tolist() == [1, 0, 1]


def test_gradients():
    plan = random_plan(0, 2, 9, 5)
    x = tokens(2, 9, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.apply_plan(x, *plan), x)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_registration(backend):
    plan = random_plan(0, 2, 9, 5)
    inputs = tokens(2, 9, 3).requires_grad_(), *plan, None, backend
    torch.library.opcheck(torch.ops.mtr_lab.apply_plan.default, inputs)


def test_compiles_without_graph_break():
    x, plan = tokens(2, 9, 3), random_plan(0, 2, 9, 5)
    compiled = torch.compile(ops.apply_plan, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, *plan), ops.apply_plan(x, *plan))


def test_flops():
    with FlopCounterMode(display=False) as counter:
        ops.apply_plan(tokens(2, 9, 3), *random_plan(0, 2, 9, 5))
    assert counter.get_total_flops() == 2 * 2 * (9 - 5) * 3


@pytest.mark.parametrize(("batch", "length", "kept", "channels"), [(1, 9, 1, 3), (2, 40, 30, 64), (3, 40, 7, 150)])
def test_the_kernel_gives_the_bits_of_plain_pytorch(batch, length, kept, channels):
    dest, weight, keep, removed = random_plan(0, batch, length, kept)
    inputs = tokens(batch, length, 2 * channels)[..., :channels], dest, weight.float(), keep, removed
    with ops.use_backend("cpu"):
        out = ops.apply_plan(*inputs)
    with ops.use_backend("reference"):
        assert torch.equal(out, ops.apply_plan(*inputs))
