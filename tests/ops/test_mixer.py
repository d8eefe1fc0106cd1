"""The mixer's inner operation without fused kernels, and the cache of its packed parameters."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops

G, E, W, R, N = 2, 3, 4, 2, 2
SHAPES = ops.MambaWeights((E, 1, W), (E,), (R + 2 * N, E), (E, R), (E,), (E, N), (E,))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stacked_weights() -> list[torch.Tensor]:
    return [0.5 * normal(G, *shape, seed=seed) for seed, shape in enumerate(SHAPES)]


def test_equals_the_composed_operations():
    xz, weights = normal(2, 5, 2 * E), ops.MambaWeights(*stacked_weights())
    y, sums, b, c = ops.mamba_inner(xz, weights, reverse=(False, True), stats=("write",), scale=0.5)
    x, z = xz.chunk(2, dim=-1)
    u = ops.causal_conv1d(x, weights.conv_weight[:, :, 0], weights.conv_bias, reverse=(False, True))
    low_rank, *expected = (u @ weights.x_proj.mT[:, None]).split([R, N, N], dim=-1)
    delta, A = low_rank @ weights.dt_proj.mT[:, None], -weights.A_log.exp()
    options = {"z": z, "delta_bias": weights.dt_bias, "reverse": (False, True), "stats": ("write",)}
    total, expected_sums = ops.selective_scan(u, delta, A, *expected, weights.D, **options)
    for one, other in zip((y, sums, b, c), (total / 2, expected_sums, *expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("recorded", [False, True])
def test_convolves_over_the_original_positions(recorded):
    """As scanning every original position, with inputs that only the convolution sees."""
    xz, weights = normal(2, 5, 2 * E), ops.MambaWeights(*stacked_weights())
    index = torch.tensor([[0, 2, 3, 6, 8], [1, 2, 4, 5, 7]])
    source = torch.tensor([[0, 0, 1, 2, 1, 1, 3, 3, 4], [0, 0, 1, 1, 2, 3, 4, 4, 2]])
    options = {"reverse": (False, True), "stats": ("delta",)}
    with torch.set_grad_enabled(recorded):
        y, sums, b, _ = ops.mamba_inner(xz, weights, index=index, source=source, **options)
    x = torch.stack([row[s] for row, s in zip(xz[..., :E], source, strict=True)])
    u = ops.causal_conv1d(x, weights.conv_weight[:, :, 0], weights.conv_bias, reverse=(False, True))
    u = torch.stack([u[:, i, index[i]] for i in range(2)], dim=1)
    low_rank, *projected = (u @ weights.x_proj.mT[:, None]).split([R, N, N], dim=-1)
    delta, A = low_rank @ weights.dt_proj.mT[:, None], -weights.A_log.exp()
    scanned = ops.selective_scan(
        u, delta, A, *projected, weights.D, z=xz[..., E:], delta_bias=weights.dt_bias, **options
    )
    for one, other in zip((y, sums, b), (*scanned, projected[0]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("channels", "rank", "states"), [(70, 3, 5), (3, 17, 16), (128, 2, 1)])
@pytest.mark.parametrize("extra", [(), ("gap", "delta_scale"), ("repeats", "index", "source")])
@pytest.mark.parametrize("reverse", [(False, True), (True,)])
def test_kernels_equal_float64(channels, rank, states, extra, reverse):
    images, length, directions = 3, 21, len(reverse)
    matrices = (rank + 2 * states, channels), (channels, rank), (channels,), (channels, states)
    shapes = (channels, 1, W), (channels,), *matrices, (channels,)
    weights = [0.3 * normal(directions, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    xz, positions = normal(images, length, 2 * channels), torch.arange(length).expand(images, -1)
    gap = (normal(images, directions, length) > 0.5) * 2.0
    tokens = {
        "gap": gap.index_fill(2, torch.tensor(0), 0.0),
        "delta_scale": 1 + normal(images, length).abs(),
        "repeats": 1 + (normal(images, length) > 0).double(),
        "index": 2 * positions,
        "source": torch.stack([positions, positions], dim=2).flatten(1).masked_fill(torch.arange(2 * length) == 7, -1),
    }
    options = {"reverse": reverse, "stats": ("write", "delta"), "scale": 0.5} | {name: tokens[name] for name in extra}

    def run(dtype):
        inputs = {name: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                  for name, t in options.items()}  # fmt: skip
        return ops.mamba_inner(xz.to(dtype), ops.MambaWeights(*(t.to(dtype) for t in weights)), **inputs)

    with torch.inference_mode():
        exact = run(torch.float64)
        for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 0.1)):
            results = run(dtype)
            assert results[0].dtype == dtype
            for result, expected in zip(results, exact, strict=True):
                error = (result.double() - expected).abs().max() / expected.abs().max()
                assert error < tolerance


def test_gradients_of_every_parameter():
    def run(xz, *weights):
        y, _, b, c = ops.mamba_inner(xz, ops.MambaWeights(*weights), reverse=(False, True))
        return y, b, c

    inputs = [t.requires_grad_() for t in (normal(1, 3, 2 * E), *stacked_weights())]
    assert torch.autograd.gradcheck(run, inputs)


def test_one_tensor_a_direction_is_the_same():
    xz, weights = normal(2, 5, 2 * E), ops.MambaWeights(*stacked_weights())
    apart = ops.MambaWeights(*(tuple(field) for field in weights))
    for one, other in zip(*(ops.mamba_inner(xz, w, reverse=(False, True)) for w in (weights, apart)), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(ops.pack(weights, torch.float16), ops.pack(apart, torch.float16), strict=True):
        assert torch.equal(one, other)


def test_packed_weights_are_kept_until_a_parameter_changes():
    weights, cache = ops.MambaWeights(*(tuple(field) for field in stacked_weights())), ops.PackedCache()
    kept = cache.get(weights, torch.float32)
    assert cache.get(weights, torch.float32) is kept
    assert cache.get(weights, torch.float16).projection.dtype == torch.float16
    for field in weights:
        before = cache.get(weights, torch.float32)
        field[1].mul_(2)
        after = cache.get(weights, torch.float32)
        assert after is not before
        assert all(map(torch.equal, after, ops.pack(weights, torch.float32)))
    weights.D[0].data.mul_(2)  # does not bump the version
    assert cache.get(weights, torch.float32) is after
    cache.clear()
    assert torch.equal(cache.get(weights, torch.float32).d[0], weights.D[0].float())
    assert copy.deepcopy(cache).entry is None


def test_a_pass_that_does_not_read_the_packed_weights_drops_them():
    weights, cache = ops.MambaWeights(*stacked_weights()), ops.PackedCache()
    cache.get(weights, torch.float64)
    ops.mamba_inner(normal(1, 3, 2 * E), weights, reverse=(False, True), packed=cache)
    assert cache.entry is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_packed_weights_are_padded_with_zeros(dtype):
    weights = ops.MambaWeights(*stacked_weights())
    packed = ops.pack(weights, dtype)
    low_rank, b, c = packed.split(packed.projection)
    assert (low_rank.shape[-1], b.shape[-1], c.shape[-1]) == (16, 8, 8)
    actual = torch.cat([low_rank[..., :R], b[..., :N], c[..., :N]], dim=-1)
    assert torch.equal(actual, weights.x_proj.mT.to(dtype))
    assert not any(
        t.any() for t in (low_rank[..., R:], b[..., N:], c[..., N:], packed.a[:, N:], packed.timescale[:, R:])
    )


def test_flops_of_its_parts():
    with FlopCounterMode(display=False) as counter:
        ops.mamba_inner(normal(3, 5, 2 * E), ops.MambaWeights(*stacked_weights()), reverse=(False, True))
    rows = 3 * 5 * G
    assert counter.get_total_flops() == rows * E * (2 * W + 2 * (R + 2 * N) + 2 * R + 9 * N + 2)


@pytest.mark.parametrize("channels", [64, 70])
def test_directions_in_bfloat16_are_rounded_once(channels):
    """Skips that differ by 2^-9 leave u · 2^-9, which is lost if a direction is rounded before they are added."""
    skip = torch.ones(2, channels)
    skip[0] += 2**-9
    skip[1] *= -1
    taps = torch.zeros(2, channels, 1, W)
    taps[..., -1] = 1
    zeros = torch.zeros(2, channels)
    weights = ops.MambaWeights(
        taps, zeros, torch.zeros(2, 3, channels), torch.zeros(2, channels, 1), zeros - 60, torch.zeros(2, channels, 1),
        skip,
    )  # fmt: skip
    xz = normal(2, 5, 2 * channels).bfloat16()
    with torch.no_grad():
        y, *_ = ops.mamba_inner(xz, weights, reverse=(False, True))
    u, z = (torch.nn.functional.silu(t.float()) for t in xz.chunk(2, dim=-1))
    exact = u.bfloat16().double() * 2**-9 * z.double()
    assert torch.all((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-12)
