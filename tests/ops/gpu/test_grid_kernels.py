"""The kernels of mixers over a grid against float64: scans in tiles and by steps, depthwise convolutions."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import parametrize_covering

from mtr_lab import UserError, ops
from mtr_lab.ops.depthwise import DEPTHWISE_CONV2D
from mtr_lab.ops.gpu import scan_tiles
from mtr_lab.ops.layer_norm import LAYER_NORM
from mtr_lab.ops.scan_by_step import SCAN_BY_STEP
from mtr_lab.ops.scan_low_rank import SCAN_LOW_RANK

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    global generator
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in a short sequence: the interpreter takes seconds for a long one."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(scan_tiles, "TOKENS", 4)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def exactly(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }


def orders(paths: int, images: int, length: int, shared: bool) -> torch.Tensor:
    """Random paths, of all images or of each."""
    rows = [torch.randperm(length, generator=generator) for _ in range(paths * (1 if shared else images))]
    return torch.stack(rows).unflatten(0, (paths, -1)).expand(-1, images, -1)


def low_rank_inputs(
    batch: int, length: int, channels: int, states: int, rank: int, paths: int, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "u": normal(batch, length, channels, dtype=dtype),
        # all paths are one product, so that a token's rows of different paths are side by side
        "low_rank": normal(batch, length, paths, rank + 2 * states, dtype=dtype).permute(2, 0, 1, 3),
        "timescale": normal(paths, channels, rank, dtype=dtype) * rank**-0.5,
        "A": -normal(paths, channels, states).exp(),
        "D": normal(paths, channels),
        "delta_bias": normal(paths, channels) - 1,
    }


@parametrize_covering(
    shape=[(1, 1, 5, 1, 2, 1), (2, 11, 33, 1, 3, 4), (1, 8, 64, 2, 17, 2), (3, 6, 40, 2, 20, 3)],
    dtype=DTYPES,
    paths=["raster", "shared", "each"],
    factor=[None, "delta_scale", "repeats"],
    gap=[False, True],
    norm=[None, "weight", "weight and bias"],
    stats=[(), ("write",), ops.STATS],
)
@torch.no_grad()
def test_a_scan_in_tiles(shape, dtype, paths, factor, gap, norm, stats) -> None:
    inputs = low_rank_inputs(*shape, dtype)
    (batch, length), directions = shape[:2], shape[-1]
    inputs["reverse"] = [paths == "raster" and bool(g % 2) for g in range(directions)]
    inputs["stats"] = stats
    if paths != "raster":
        inputs["order"] = orders(directions, batch, length, paths == "shared")
    if factor:
        inputs[factor] = torch.randint(1, 5, (batch, length), generator=generator).float()
    if gap:
        inputs["gap"] = torch.randint(0, 3, (batch, directions, length), generator=generator)
        inputs["gap"][..., 0] = 0
    if norm:
        inputs |= {"norm_weight": normal(shape[2], dtype=dtype), "eps": 1e-3}
    if norm == "weight and bias":
        inputs["norm_bias"] = normal(shape[2], dtype=dtype)
    with ops.use_backend("reference"):
        expected, expected_sums = ops.scan_low_rank(**exactly(inputs))
    with ops.use_backend("triton"):
        actual, sums = ops.scan_low_rank(**inputs)
    assert actual.dtype == dtype
    assert relative(actual, expected) < TOLERANCE[dtype]
    assert sums.dtype == torch.float32
    assert sums.shape == expected_sums.shape
    for i in range(len(stats)):
        assert relative(sums[..., i], expected_sums[..., i]) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("states", "gradient", "expected"), [(2, False, "triton"), (3, False, "portable"), (1, True, "portable")]
)
def test_other_scans_run_token_by_token(states: int, gradient: bool, expected: str) -> None:
    inputs = low_rank_inputs(1, 4, 6, states, 2, 2, torch.float32)
    inputs["u"].requires_grad_(gradient)
    with ops.use_backend("triton"):
        assert (
            SCAN_LOW_RANK.pick(*inputs.values(), None, None, None, None, None, None, 0.0, [0, 0], "").name == expected
        )
        y, _ = ops.scan_low_rank(**inputs, reverse=[False, True])
    assert y.requires_grad == gradient


@pytest.mark.parametrize("implementation", ["triton", "portable"])
@torch.no_grad()
def test_a_scan_in_tiles_of_a_transposed_input(implementation: str) -> None:
    inputs = low_rank_inputs(2, 5, 6, 1, 2, 2, torch.float32)
    inputs["u"] = inputs["u"].mT.contiguous().mT
    arguments = *inputs.values(), None, None, None, None, normal(6), None, 1e-5, [0, 1], "delta", implementation
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.mtr_lab.scan_low_rank.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.Size([2, 4])}, "expected u"),
        ({"u": torch.Size([1, 0, 6])}, "at least one token"),
        ({"timescale": torch.Size([2, 5, 2])}, "timescale has shape"),
        ({"low_rank": torch.Size([1, 1, 4, 6])}, "low_rank has shape"),
        ({"D": torch.Size([6])}, "D has shape"),
        ({"norm_weight": torch.Size([5])}, "norm_weight has shape"),
        ({"norm_bias": torch.Size([6])}, "norm_bias without norm_weight"),
        ({"reverse": [False]}, "reverse=.*each of the 2 directions"),
        ({"order": torch.int32}, "order has dtype torch.int32, expected torch.int64"),
        ({"order": torch.int64, "reverse": [True, True]}, "reverse=.*with an order"),
        ({"repeats": torch.Size([1, 4]), "delta_scale": torch.Size([1, 4])}, "got repeats and delta_scale"),
        ({"stats": ["deltas"]}, "unknown scan statistic 'deltas'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "portable"])
@torch.no_grad()
def test_a_scan_in_tiles_refuses(backend: str, changes: dict[str, Any], message: str) -> None:
    """A size stands for ones of this shape, a dtype for an order of this dtype."""
    inputs = low_rank_inputs(1, 4, 6, 1, 2, 2, torch.float32) | {"reverse": [False, False]}
    for name, change in changes.items():
        if isinstance(change, torch.Size):
            inputs[name] = torch.ones(change)
        elif isinstance(change, torch.dtype):
            inputs[name] = torch.arange(4, dtype=change).expand(2, 1, 4)
        else:
            inputs[name] = change
    with ops.use_backend(backend), pytest.raises(UserError, match=message):
        ops.scan_low_rank(**inputs)


@parametrize_covering(
    shape=[(2, 15, 70, 3, 4), (1, 9, 32, 16, 3), (3, 1, 5, 16, 1), (1, 6, 64, 2, 2)],
    dtype=DTYPES,
    gated=[False, True],
    stats=[(), ("write",), ops.STATS],
)
@torch.no_grad()
def test_a_scan_by_steps(shape, dtype, gated, stats) -> None:
    batch, length, channels, states, paths = shape
    order = orders(paths, 1, length, shared=True)[:, 0]
    inputs = {
        "u": normal(batch, length, channels, dtype=dtype),
        "delta": normal(batch, length, channels, dtype=dtype),
        "A": -normal(channels, states).exp(),
        **dict(zip("BC", normal(batch, length, 2 * states + 3, dtype=dtype)[..., 3:].chunk(2, dim=-1), strict=True)),
        "D": normal(channels),
        "order": order,
        "steps": order.argsort(1),
        "moves": normal(paths, length, states, dtype=dtype),
        "delta_bias": normal(channels),
        "z": normal(batch, length, 2 * channels, dtype=dtype)[..., channels:] if gated else None,
    }
    with ops.use_backend("reference"):
        expected, expected_sums = ops.scan_by_step(**exactly(inputs), stats=stats)
    with ops.use_backend("triton"):
        actual, sums = ops.scan_by_step(**inputs, stats=stats)
    assert actual.dtype == dtype
    assert relative(actual, expected) < TOLERANCE[dtype]
    assert sums.shape == expected_sums.shape
    for i in range(len(stats)):
        assert relative(sums[..., i], expected_sums[..., i]) < TOLERANCE[dtype]


def test_a_scan_by_steps_with_gradients_reads_copies() -> None:
    data = [normal(1, 4, 6, dtype=torch.float32) for _ in range(2)]
    order = torch.arange(4)[None].repeat(5, 1)
    rest = normal(6, 2), normal(1, 4, 2), normal(1, 4, 2), normal(6)
    with ops.use_backend("triton"):
        arguments = [*data, *rest, order, order, normal(5, 4, 2), None, normal(6), ""]
        assert SCAN_BY_STEP.pick(*arguments).name == "portable"  # five paths
        arguments[6:9] = order[:4], order[:4], normal(4, 4, 2)
        assert SCAN_BY_STEP.pick(*arguments).name == "triton"
        data[0].requires_grad_()
        assert SCAN_BY_STEP.pick(*arguments).name == "portable"


@parametrize_covering(
    grid=[(1, 1), (5, 3), (4, 9), (14, 2)],
    channels=[1, 40, 70],
    width=[1, 3, 7],
    dtype=DTYPES,
    biased=[False, True],
    silu=[False, True],
    layout=["tokens", "half", "maps"],
)
@torch.no_grad()
def test_a_depthwise_convolution(grid, channels, width, dtype, biased, silu, layout) -> None:
    if layout == "maps":
        maps = normal(2, channels, *grid, dtype=dtype)
    else:
        tokens = normal(2, grid[0] * grid[1], channels * (2 if layout == "half" else 1), dtype=dtype)
        maps = tokens[..., :channels].transpose(1, 2).unflatten(2, grid)
    weight, bias = normal(channels, 1, width, width, dtype=dtype), normal(channels, dtype=dtype) if biased else None
    exact = None if bias is None else bias.double()
    expected = F.conv2d(maps.double(), weight.double(), exact, padding=width // 2, groups=channels)
    expected = F.silu(expected) if silu else expected
    with ops.use_backend("triton"):
        assert DEPTHWISE_CONV2D.pick(maps, weight, bias, silu).name == "triton"
        actual = ops.depthwise_conv2d(maps, weight, bias, silu=silu)
    assert actual.dtype == dtype
    assert actual.permute(0, 2, 3, 1).is_contiguous()
    assert relative(actual, expected) < TOLERANCE[dtype]


@parametrize_covering(shape=[(1, 1, 5), (2, 11, 96), (3, 7, 700)], dtype=DTYPES, biased=[False, True])
@torch.no_grad()
def test_a_norm_of_tokens(shape, dtype, biased) -> None:
    x, weight = normal(*shape, dtype=dtype) + 3, normal(shape[2], dtype=dtype)
    bias = normal(shape[2], dtype=dtype) if biased else None
    exact = None if bias is None else bias.double()
    expected = F.layer_norm(x.double(), weight.shape, weight.double(), exact, 1e-3)
    with ops.use_backend("triton"):
        assert LAYER_NORM.pick(x, weight, bias, 1e-3).name == "triton"
        actual = ops.layer_norm(x, weight, bias, 1e-3)
    assert actual.dtype == dtype
    assert relative(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("maps", "weight", "bias", "message"),
    [
        ((1, 64, 3, 3), (32, 1, 3, 3), None, r"weight has shape \(32, 1, 3, 3\), expected \(64, 1, 3, 3\)"),
        ((1, 8, 3, 3), (8, 1, 3, 5), None, r"weight has shape .* expected \(8, 1, 3, 3\)"),
        ((1, 8, 3, 3), (8, 1, 3, 3), (4,), r"bias has shape \(4,\), expected \(8,\)"),
        ((1, 8, 3, 3), (8, 1, 2, 2), None, "odd K"),
        ((8, 3, 3), (8, 1, 3, 3), None, "expected maps"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "portable"])
@torch.no_grad()
def test_a_depthwise_convolution_refuses(backend, maps, weight, bias, message) -> None:
    with ops.use_backend(backend), pytest.raises(UserError, match=message):
        ops.depthwise_conv2d(normal(*maps), normal(*weight), None if bias is None else normal(*bias))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 3, 32), (16,), None, r"weight has shape \(16,\), expected \(32,\) for x of shape \(2, 3, 32\)"),
        ((2, 3, 32), (32,), (16,), r"bias has shape \(16,\), expected \(32,\)"),
        ((3, 32), (32,), None, "expected x"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "portable"])
@torch.no_grad()
def test_a_norm_of_tokens_refuses(backend, x, weight, bias, message) -> None:
    with ops.use_backend(backend), pytest.raises(UserError, match=message):
        ops.layer_norm(normal(*x), normal(*weight), None if bias is None else normal(*bias))


@pytest.mark.parametrize("backend", ["triton", "portable"])
@torch.no_grad()
def test_an_empty_batch_has_an_empty_result(backend) -> None:
    order = torch.arange(5).expand(2, 5)
    tokens, states = normal(0, 5, 6), normal(0, 5, 2)
    steps = {"order": order, "steps": order, "moves": normal(2, 5, 2), "delta_bias": normal(6)}
    with ops.use_backend(backend):
        y, sums = ops.scan_low_rank(**low_rank_inputs(0, 5, 6, 1, 2, 2, torch.float32), reverse=[0, 1], stats=["delta"])
        assert (y.shape, sums.shape) == ((0, 5, 6), (2, 0, 5, 1))
        y, sums = ops.scan_by_step(tokens, tokens, normal(6, 2), states, states, normal(6), **steps, stats=["delta"])
        assert (y.shape, sums.shape) == ((0, 5, 6), (2, 0, 5, 1))
        assert ops.layer_norm(tokens, normal(6), None).shape == (0, 5, 6)
        assert ops.depthwise_conv2d(normal(0, 6, 3, 4), normal(6, 1, 3, 3), silu=True).shape == (0, 6, 3, 4)


@pytest.mark.parametrize("operation", ["low_rank", "by_step", "selective", "depthwise"])
@torch.no_grad()
def test_more_images_than_a_launch_takes_are_refused_before_it(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr_lab.ops.gpu.occupancy.MOST_PROGRAMS", 3)
    count = 4
    tokens, states, order = torch.zeros(count, 1, 2), torch.zeros(count, 1, 1), torch.zeros(1, 1, dtype=torch.int64)
    steps = {"order": order, "steps": order, "moves": normal(1, 1, 1), "delta_bias": normal(2)}
    low_rank = low_rank_inputs(count, 1, 2, 1, 1, 1, torch.float32)
    run = {
        "low_rank": lambda: ops.scan_low_rank(**low_rank, reverse=[0]),
        "by_step": lambda: ops.scan_by_step(tokens, tokens, normal(2, 1), states, states, normal(2), **steps),
        "selective": lambda: ops.selective_scan(
            tokens[None], tokens[None], normal(1, 2, 1), states[None], states[None], normal(1, 2)
        ),
        "depthwise": lambda: ops.depthwise_conv2d(tokens.view(count, 2, 1, 1), normal(2, 1, 3, 3)),
    }[operation]
    with (
        ops.use_backend("triton"),
        pytest.raises(UserError, match="4 sequences.* at most 3. Use smaller batch"),
    ):
        run()


@pytest.fixture
def autocast() -> Iterator[None]:
    """As ``torch.autocast("cuda", torch.bfloat16)``, which does nothing on a machine without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize(("dtype", "convolution"), [(torch.float32, "reference"), (torch.bfloat16, "triton")])
@pytest.mark.usefixtures("autocast")
@torch.no_grad()
def test_autocast_chooses_the_dtype(dtype: torch.dtype, convolution: str) -> None:
    """Norms in float32, convolutions in its own dtype: kernels that keep another dtype do not run."""
    with ops.use_backend("triton"):
        assert LAYER_NORM.pick(normal(1, 4, 6, dtype=dtype), normal(6), None, 1e-5).name == "portable"
        maps, weight = normal(1, 6, 3, 3, dtype=dtype), normal(6, 1, 3, 3)
        assert DEPTHWISE_CONV2D.pick(maps, weight, None, True).name == convolution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("autocast")
@torch.no_grad()
def test_autocast_normalises_a_scan_after_the_kernel(dtype: torch.dtype) -> None:
    inputs, weight = low_rank_inputs(2, 7, 40, 1, 3, 2, dtype), normal(40)
    with ops.use_backend("triton"):
        y, _ = ops.scan_low_rank(**inputs, reverse=[0, 1])
        actual, _ = ops.scan_low_rank(**inputs, reverse=[0, 1], norm_weight=weight, eps=1e-3)
    assert torch.equal(actual, F.layer_norm(y, (40,), weight, None, 1e-3))


def test_a_norm_of_tokens_with_gradients_is_the_librarys() -> None:
    x, weight = normal(2, 3, 4).requires_grad_(), normal(4)
    with ops.use_backend("triton"):
        actual = ops.layer_norm(x, weight, None)
    assert torch.equal(actual, F.layer_norm(x, (4,), weight))
    actual.sum().backward()
    assert x.grad is not None


def test_a_depthwise_convolution_with_gradients_is_the_librarys() -> None:
    maps, weight = normal(1, 3, 4, 4).requires_grad_(), normal(3, 1, 3, 3)
    with ops.use_backend("triton"):
        actual = ops.depthwise_conv2d(maps, weight, silu=True)
    assert torch.equal(actual, F.silu(F.conv2d(maps, weight, padding=1, groups=3)))
    actual.sum().backward()
    assert maps.grad is not None
