"""Addition and normalisation, with and without a plan, against the reference."""

import pytest
import torch
from covering import parametrize_covering

from mtr_lab import ops
from mtr_lab.reduction.plan import make_plan


def plans(batch, length, removed, shared_residual=True):
    """A random plan: some tokens are merged, several of them into one, and some are dropped."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(length)
    order = torch.rand(batch, length, generator=generator).argsort(1)
    source, target = order[:, :removed], order[:, removed : removed + 3]
    into = target.gather(1, torch.randint(0, 3, (batch, removed), generator=generator))
    into[:, ::4] = -1
    key = torch.arange(length).double().expand(batch, -1)
    mass = torch.rand(batch, length, generator=generator) + 0.5
    plan = make_plan(source, into, key, mass)
    if shared_residual:
        return plan
    return make_plan(source, torch.full_like(into, -1), key, mass)._replace(residual=plan)


def both(run):
    with torch.no_grad():
        with ops.use_backend("reference"):
            expected = run()
        with ops.use_backend("triton"):
            return run(), expected


def add_norm(layer, hidden, residual, weight, **plan):
    """LayerNorm or RMSNorm."""
    bias = (weight.flip(0),) if layer else ()
    return (ops.layer_norm_add if layer else ops.rms_norm_add)(hidden, residual, weight, *bias, **plan)


@parametrize_covering(
    channels=[1, 24, 192, 600],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    first=[True, False],
    layer=[True, False],
)
def test_add_and_normalise(channels, dtype, first, layer):
    hidden, weight = torch.randn(2, 3, channels).to(dtype), torch.rand(channels)
    residual = None if first else torch.randn(2, 3, channels)
    (normed, total), (expected, expected_total) = both(lambda: add_norm(layer, hidden, residual, weight))
    assert normed.dtype == dtype
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize("shared_residual", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("removed", "layer"), [(9, False), (40, False), (9, True)])
def test_a_plan_is_fused(removed, layer, shared_residual, first):
    length = removed + 11
    hidden, weight = torch.randn(2, length, 24), torch.rand(24)
    residual = None if first else torch.randn(2, length, 24)
    plan = plans(2, length, removed, shared_residual)
    (normed, total), expected = both(lambda: add_norm(layer, hidden, residual, weight, plan=plan))
    assert normed.shape == (2, 11, 24)
    torch.testing.assert_close((normed, total), expected)


@pytest.mark.parametrize("shared_residual", [True, False])
def test_a_plan_that_is_applied_to_hidden_before(shared_residual):
    hidden, residual, weight = torch.randn(2, 11, 24), torch.randn(2, 20, 24), torch.rand(24)
    plan = plans(2, 20, 9, shared_residual)
    (normed, total), expected = both(lambda: ops.rms_norm_add(hidden, residual, weight, plan=plan))
    assert normed.shape == (2, 11, 24)
    torch.testing.assert_close((normed, total), expected)


@pytest.mark.parametrize("removed", [9, 40])
def test_apply_plan(removed):
    x, plan = torch.randn(3, removed + 11, 40).half(), plans(3, removed + 11, removed)
    actual, expected = both(lambda: ops.apply_plan(x, *plan[:4]))
    torch.testing.assert_close(actual, expected)


def test_registration():
    plan, checks = plans(2, 20, 9), ("test_schema", "test_faketensor")
    hidden, residual, weight = torch.randn(2, 20, 8).half(), torch.randn(2, 20, 8), torch.rand(8)
    lists = (plan.weight, *plan.with_offsets()[3:5])
    for arguments in (
        (hidden, None, weight, None, 1e-5, *[None] * 7, "triton"),
        (hidden, residual, weight, weight, 1e-5, plan.keep, *lists * 2, "triton"),
        (hidden[:, :11], residual, weight, None, 1e-5, plan.keep, *lists * 2, "triton"),
    ):
        operator = torch.ops.mtr_lab.norm_add.default
        torch.library.opcheck(operator, arguments, test_utils=checks)
        actual, expected = ops.decompositions()[operator](*arguments), operator(*arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)  # the decomposition rounds between its steps
    metadata = (torch.arange(20).expand(2, -1), torch.ones(2, 20), plan.keep[:, :1])
    arguments = (*metadata, plan.dest, plan.keep, plan.removed, "triton")
    torch.library.opcheck(torch.ops.mtr_lab.update_metadata.default, arguments, test_utils=checks)
    arguments = (plan.dest, plan.weight, plan.keep, "triton")
    torch.library.opcheck(torch.ops.mtr_lab.follow.default, arguments, test_utils=checks)


def test_metadata():
    plan = plans(3, 20, 9)
    index = torch.arange(20).mul(3).expand(3, -1)
    size = torch.randint(1, 5, (3, 20)).float()
    special = plan.keep[:, 2:4]
    actual, expected = both(lambda: ops.update_metadata(plan, index, size, special))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_sources_follow_a_plan():
    plan = plans(3, 20, 9)
    source = torch.randint(-1, 20, (3, 300))  # more than a program's
    actual, expected = both(lambda: ops.follow(plan, source))
    assert torch.equal(actual, expected)
    assert (actual == -1).any()


@pytest.mark.parametrize("reduced", [False, True])
def test_gradients(reduced):
    inputs = [torch.randn(2, 20, 8), torch.randn(2, 20, 8), torch.rand(8)]
    plan = plans(2, 20, 9) if reduced else None
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        with ops.use_backend(backend):
            normed, total = ops.rms_norm_add(*leaves, plan=plan)
        gradients.append(torch.autograd.grad(normed.square().sum() + total.sin().sum(), leaves))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
