"""The scan of every implementation against a float64 loop over tokens in numpy."""

import dataclasses
import importlib.util
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import reading, some_cells
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.ops.scan_inputs import ScanInputs

CUDA_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("mamba_ssm") is None or not torch.cuda.is_available(),
        reason="needs mamba-ssm and a CUDA device",
    ),
]
IMPLEMENTATIONS = [
    pytest.param("reference", torch.float64, 1e-8, id="reference-float64"),
    pytest.param("reference", torch.float32, 2e-5, id="reference-float32"),
    pytest.param("portable", torch.float64, 1e-8, id="portable-float64"),
    pytest.param("portable", torch.float32, 2e-5, id="portable-float32"),
    pytest.param("cpu", torch.float32, 2e-5, id="cpu-float32"),
    pytest.param("mamba_ssm", torch.float32, 2e-3, id="mamba_ssm-float32", marks=CUDA_KERNELS),
]


FOUR = ("snake", "-snake", "columns", "-columns")


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes and options of one scan."""

    length: int = 7
    channels: int = 5
    states: int = 3
    paths: tuple[str, ...] = ("rows", "-rows")
    batch: int = 2
    spread: float = 1.0  # scale of delta before softplus
    gate: bool = True
    bias: bool = True
    gap: bool = False
    delta_scale: bool = False
    repeats: bool = False  # unless delta_scale

    def inputs(self, dtype=torch.float32, device="cpu"):
        """Keyword arguments of ``selective_scan``, random, and the same for equal cases."""
        generator = torch.Generator().manual_seed(self.length + 1000 * self.channels + 100_000 * self.states)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        lead = (len(self.paths), self.batch, self.length)
        cells = some_cells(self.batch, self.length, 2 * self.length + 3, generator)
        order, gap = (t.to(device) for t in reading(self.paths, cells, 2 * self.length + 3))
        delta_scale = (1 + 2 * torch.rand(lead[1:], generator=generator)).to(device, dtype)
        return {
            "u": normal(*lead, self.channels),
            "delta": normal(*lead, self.channels) * self.spread,
            "A": -torch.exp(normal(lead[0], self.channels, self.states)),
            "B": normal(*lead, self.states),
            "C": normal(*lead, self.states),
            "D": normal(lead[0], self.channels),
            "z": normal(*lead[1:], self.channels) if self.gate else None,
            "delta_bias": normal(lead[0], self.channels) - 2 if self.bias else None,
            "gap": gap if self.gap else None,
            "delta_scale": delta_scale if self.delta_scale else None,
            "repeats": delta_scale.round() if self.repeats and not self.delta_scale else None,
        } | ({"reverse": [p == "-rows" for p in self.paths]} if self.raster else {"order": order})

    @property
    def raster(self):
        """Whether all paths are rows or reversed rows, which need no order."""
        return {*self.paths} <= {"rows", "-rows"}


cases = st.builds(
    Case,
    length=st.integers(1, 300),
    channels=st.integers(1, 140),
    states=st.integers(1, 64),
    paths=st.sampled_from(
        [("rows",), ("-rows",), ("rows", "-rows"), ("-rows", "rows"), ("snake",), ("rows", "columns"), FOUR]
    ),
    batch=st.integers(1, 3),
    spread=st.sampled_from([1.0, 5.0, 50.0]),
    gate=st.booleans(),
    bias=st.booleans(),
    gap=st.booleans(),
    delta_scale=st.booleans(),
    repeats=st.booleans(),
)


def scan_loop(u, delta, A, B, C, D, z, delta_bias, gap, delta_scale, repeats, reverse=(), order=None):
    """The recurrence step by step and direction by direction in float64; a gap is that many tokens of zero input.

    A token is read as often as it is repeated; Δ is the sum over the times.

    Returns the gated sum (B, L, E), each direction's output (G, B, L, E) and Δ (G, B, L, E).
    """
    u, delta, A, B, C, D = (x.cpu().double().numpy() for x in (u, delta, A, B, C, D))
    bias = np.zeros_like(D) if delta_bias is None else delta_bias.cpu().double().numpy()
    if order is None:
        order = [[range(u.shape[2])[:: -1 if back else 1]] * u.shape[1] for back in reverse]
    delta = np.logaddexp(0, delta + bias[:, None, None])
    if delta_scale is not None:
        delta = delta * delta_scale.cpu().double().numpy()[..., None]
    y = np.zeros_like(u)
    for g, b in itertools.product(range(len(u)), range(u.shape[1])):
        idle = np.exp(np.logaddexp(0, bias[g])[:, None] * A[g])  # (E, N)
        state = np.zeros_like(A[g])
        for step, t in enumerate(order[g][b]):
            for _ in range(0 if gap is None else gap[b, g, step]):
                state = idle * state
            write = delta[g, b, t] * u[g, b, t]
            for _ in range(1 if repeats is None else int(repeats[b, t])):
                state = np.exp(delta[g, b, t][:, None] * A[g]) * state + write[:, None] * B[g, b, t]
            y[g, b, t] = state @ C[g, b, t] + D[g] * u[g, b, t]
    if repeats is not None:
        delta = delta * repeats.cpu().double().numpy()[..., None]
    total = y.sum(0)
    if z is not None:
        z = z.cpu().double().numpy()
        total = total * z * np.exp(-np.logaddexp(0, -z))
    return total, y, delta


def magnitudes(inputs):
    """The recurrence of absolute values, to which rounding errors are proportional."""
    positive = {k: inputs[k].abs() for k in ("u", "B", "C", "D")}
    total, y, _ = scan_loop(**inputs | positive)
    return np.abs(total), y


def assert_close(actual, expected, magnitude, tolerance):
    error = np.abs(actual.double().cpu().numpy() - expected)
    assert (error <= tolerance * magnitude + 1e-30).all(), f"{(error / (magnitude + 1e-30)).max():.2e} > {tolerance}"


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), IMPLEMENTATIONS)
@settings(max_examples=15)
@given(case=cases)
@example(case=Case(length=1, channels=1, states=1, paths=("rows",), batch=1))
@example(case=Case(length=1, channels=65, states=64, gap=True))
@example(case=Case(length=300, channels=63, states=1, spread=100.0, gap=True))
@example(case=Case(length=40, channels=64, paths=("-rows", "rows"), gate=False, bias=False))
@example(case=Case(length=13, channels=65, paths=FOUR, gap=True, delta_scale=True))
@example(case=Case(length=21, channels=65, gap=True, repeats=True))
@example(case=Case(length=9, channels=3, paths=FOUR, spread=50.0, repeats=True))
def test_scan_equals_the_loop_over_tokens(backend, dtype, tolerance, case):
    if backend == "mamba_ssm":
        inputs = dataclasses.replace(case, gap=False, repeats=False).inputs(dtype, "cuda")
    else:
        inputs = case.inputs(dtype)
    with ops.use_backend(backend):
        y, sums = ops.selective_scan(**inputs, stats=ops.STATS)

    total, per_direction, delta = scan_loop(**inputs)
    total_magnitude, magnitude = magnitudes(inputs)
    write = (delta * inputs["u"].double().cpu().numpy()) ** 2
    stats = np.stack([delta.sum(-1), write.sum(-1), np.maximum(per_direction, 0).sum(-1)], -1)
    stats_magnitude = np.stack([delta.sum(-1), write.sum(-1), magnitude.sum(-1)], -1)
    assert y.dtype == sums.dtype == dtype
    assert_close(y, total, total_magnitude, tolerance)
    assert_close(sums, stats, stats_magnitude, tolerance)


@pytest.mark.parametrize("value", [-100.0, -50.0, 50.0, 100.0, 1e30])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), IMPLEMENTATIONS[:3])
def test_extreme_timescales_neither_overflow_nor_lose_the_input(backend, dtype, tolerance, value):
    inputs = Case(length=5, channels=70, bias=False, gate=False).inputs(dtype)
    inputs["delta"] = torch.full_like(inputs["delta"], value)
    inputs["u"] = inputs["u"] / max(value, 1)
    with ops.use_backend(backend):
        y, sums = ops.selective_scan(**inputs, stats=("delta",))
    total, _, delta = scan_loop(**inputs)
    assert_close(y, total, magnitudes(inputs)[0], tolerance)
    assert_close(sums[..., 0], delta.sum(-1), delta.sum(-1), tolerance)


@pytest.mark.parametrize("value", [-1e30, -100.0, 100.0, 1e30])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), IMPLEMENTATIONS[:3])
def test_extreme_gates(backend, dtype, tolerance, value):
    inputs = Case(length=3).inputs(dtype)
    inputs["z"] = torch.full_like(inputs["z"], value)
    with ops.use_backend(backend):
        y, _ = ops.selective_scan(**inputs)
        ungated, _ = ops.selective_scan(**inputs | {"z": None})
    torch.testing.assert_close(y, ungated * max(value, 0.0), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", ["u", "delta", "B", "z"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_nan_stays_in_its_image(backend, name):
    inputs = Case(gap=True).inputs()
    inputs[name][..., 1, 3, :] = torch.nan  # token 3 of image 1
    with ops.use_backend(backend):
        y, _ = ops.selective_scan(**inputs)
    assert y[1, 3].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=15)
@given(case=cases)
def test_a_gap_decays_like_tokens_of_zero_input(backend, case):
    """Keep every token with probability one third of a sequence whose other tokens have u = delta = 0."""
    inputs = dataclasses.replace(case, gap=False, delta_scale=False, repeats=False).inputs(
        torch.float64 if backend == "reference" else torch.float32
    )
    survives = torch.rand(case.length, generator=torch.Generator().manual_seed(0)) < 1 / 3
    survives[case.length // 2] = True
    kept = survives.nonzero()[:, 0]
    for name in ("u", "delta"):
        inputs[name][:, :, ~survives] = 0

    cells = torch.arange(case.length).expand(case.batch, -1)
    (order, _), (short_order, gap) = (reading(case.paths, c, case.length) for c in (cells, cells[:, kept]))
    short = {name: inputs[name][:, :, kept] for name in ("u", "delta", "B", "C")} | {"gap": gap}
    if case.gate:
        short["z"] = inputs["z"][:, kept]
    if not case.raster:
        inputs["order"], short["order"] = order, short_order
    with ops.use_backend(backend):
        full, full_sums = ops.selective_scan(**inputs, stats=("output",))
        y, sums = ops.selective_scan(**inputs | short, stats=("output",))
    tolerance = 1e-9 if backend == "reference" else 3e-5
    total, per_direction = (each[..., kept.numpy(), :] for each in magnitudes(inputs))
    assert_close(y, full[:, kept].double().numpy(), total, tolerance)
    assert_close(sums[..., 0], full_sums[:, :, kept, 0].double().numpy(), per_direction.sum(-1), tolerance)


@pytest.mark.parametrize("delta", [-80.0, -14.0, -7.0, 0.0, 20.0])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), IMPLEMENTATIONS[:3])
def test_a_run_of_equal_tokens_in_one_step(backend, dtype, tolerance, delta):
    """As reading the token that often, for timescales from 0 to those that forget every token at once."""
    inputs = Case(length=5, channels=70, states=5, bias=False).inputs(dtype)
    inputs["delta"] = torch.full_like(inputs["delta"], delta)
    times = torch.tensor([[1, 2, 3, 30, 1], [4, 1, 1, 2, 60]])
    with ops.use_backend(backend):
        y, sums = ops.selective_scan(**inputs | {"repeats": times.to(dtype)}, stats=("delta", "write"))
    for b in range(2):
        run = {name: inputs[name][:, b : b + 1].repeat_interleave(times[b], 2) for name in ("u", "delta", "B", "C")}
        run["z"] = inputs["z"][b : b + 1].repeat_interleave(times[b], 1)
        first, last = times[b].cumsum(0) - times[b], times[b].cumsum(0) - 1  # read last in either direction
        _, per_direction, step = scan_loop(**inputs | run)
        _, magnitude = magnitudes(inputs | run)
        read = [np.stack([each[0, 0, last], each[1, 0, first]]).sum(0) for each in (per_direction, magnitude)]
        z = inputs["z"][b].double().numpy()
        total, total_magnitude = (each * z / (1 + np.exp(-z)) for each in read)
        assert_close(y[b], total, np.abs(total_magnitude), tolerance)
        whole = np.add.reduceat(step[:, 0], first.numpy(), axis=1)  # Δ of the run
        stats = np.stack([whole.sum(-1), ((whole * inputs["u"][:, b].double().numpy()) ** 2).sum(-1)], -1)
        assert_close(sums[:, b], stats, stats, tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_stats_come_in_the_order_asked(backend):
    inputs = Case().inputs()
    with ops.use_backend(backend):
        y, every = ops.selective_scan(**inputs, stats=("delta", "write", "output"))
        y_alone, two = ops.selective_scan(**inputs, stats=("output", "delta"))
        _, none = ops.selective_scan(**inputs)
    assert torch.equal(y, y_alone)
    assert torch.equal(two, every[..., [2, 0]])
    assert none.shape == (2, 2, 7, 0)


@pytest.mark.parametrize(
    "name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "order", "gap", "delta_scale", "repeats"]
)
def test_cpu_takes_any_strides(name):
    scaled = {"repeats": True} if name == "repeats" else {"delta_scale": True}
    inputs = Case(length=9, channels=70, paths=("snake", "rows"), gap=True, **scaled).inputs()
    with ops.use_backend("cpu"):
        expected, sums = ops.selective_scan(**inputs, stats=ops.STATS)
        half = torch.cat([torch.zeros_like(inputs[name]), inputs[name]], dim=-1).chunk(2, dim=-1)[1]
        transposed = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
        for view in (half, transposed):
            assert not view.is_contiguous()
            y, view_sums = ops.selective_scan(**inputs | {name: view}, stats=ops.STATS)
            assert torch.equal(y, expected)
            assert torch.equal(view_sums, sums)


def test_an_image_does_not_depend_on_its_batch_mates_or_the_threads():
    inputs = Case(50, 130, 16, batch=5, paths=("snake", "-columns"), gap=True, delta_scale=True).inputs()
    threads = torch.get_num_threads()
    with ops.use_backend("cpu"):
        y, sums = ops.selective_scan(**inputs, stats=ops.STATS)
        try:
            torch.set_num_threads(1)
            for b in range(5):
                alone = {k: inputs[k][:, b : b + 1] for k in ("u", "delta", "B", "C", "order")}
                alone |= {k: inputs[k][b : b + 1] for k in ("z", "gap", "delta_scale")}
                y_alone, sums_alone = ops.selective_scan(**inputs | alone, stats=ops.STATS)
                assert torch.equal(y_alone[0], y[b])
                assert torch.equal(sums_alone[:, 0], sums[:, b])
        finally:
            torch.set_num_threads(threads)


def test_concurrent_callers_get_their_own_results():
    inputs = [Case(length=length, channels=130).inputs() for length in (40, 50, 60, 70)]
    with ops.use_backend("cpu"):
        expected = [ops.selective_scan(**one)[0] for one in inputs]
        equal = [False] * len(inputs)

        def repeat(i):
            equal[i] = all(torch.equal(ops.selective_scan(**inputs[i])[0], expected[i]) for _ in range(20))

        threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(equal)


@pytest.mark.parametrize(
    "case", [Case(length=4, gap=True, delta_scale=True), Case(length=3, gate=False, bias=False, paths=("-rows",))]
)
def test_gradients(case):
    inputs = case.inputs(torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and k not in ("gap", "delta_scale")]

    def scan(*tensors):
        return ops.selective_scan(**inputs | dict(zip(names, tensors, strict=True)))[0]

    assert torch.autograd.gradcheck(scan, [inputs[k].requires_grad_() for k in names])


def test_gradients_of_the_cpu_forward_equal_float64():
    grads = {}
    for dtype in (torch.float32, torch.float64):
        inputs = Case(channels=70, gap=True).inputs()
        inputs = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and k not in ("gap", "delta_scale") else v
            for k, v in inputs.items()
        }
        leaves = [
            v.requires_grad_()
            for k, v in inputs.items()
            if isinstance(v, torch.Tensor) and k not in ("gap", "delta_scale")
        ]
        with ops.use_backend("cpu" if dtype == torch.float32 else "reference"):
            y, sums = ops.selective_scan(**inputs, stats=("delta",))
        assert not sums.requires_grad
        grads[dtype] = torch.autograd.grad(y.square().sum(), leaves)
    for single, double in zip(grads[torch.float32], grads[torch.float64], strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4 * double.abs().max().item())


def test_half_precision_input_keeps_a_wide_state():
    inputs = Case(length=50, gap=True).inputs()
    narrow = {k: inputs[k].bfloat16() for k in ("u", "delta", "B", "C", "z")}
    y, sums = ops.selective_scan(**inputs | narrow, stats=ops.STATS)
    expected, _, delta = scan_loop(**inputs | narrow)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, magnitudes(inputs | narrow)[0], 2**-8)
    assert sums.dtype == torch.float32
    assert_close(sums[..., 0], delta.sum(-1), delta.sum(-1), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes_change_nothing(backend, mode):
    inputs = Case(gap=True).inputs()
    with ops.use_backend(backend):
        expected = ops.selective_scan(**inputs, stats=ops.STATS)
        with mode():
            result = ops.selective_scan(**inputs, stats=ops.STATS)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_without_graph_break(backend):
    inputs = Case(gap=True).inputs()

    def doubled(u):
        y, sums = ops.selective_scan(**inputs | {"u": 2 * u}, stats=("write", "delta"))
        return y + 1, sums

    with ops.use_backend(backend):
        expected = doubled(inputs["u"])
        result = torch.compile(doubled, backend="eager", fullgraph=True)(inputs["u"])
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "stats"), [("reference", "delta output"), ("cpu", "")])
def test_registration(backend, stats):
    inputs = ScanInputs(**Case(length=3, gap=True, delta_scale=True).inputs())
    for tensor in inputs[:8]:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.mtr_lab.selective_scan.default, (*inputs, stats, backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_flops(backend):
    inputs = Case(length=7, channels=5, states=3, batch=2).inputs()
    for repeats, each_state in ((None, 9), (torch.ones(2, 7), 13)):
        with ops.use_backend(backend), FlopCounterMode(display=False) as counter:
            ops.selective_scan(**inputs | {"repeats": repeats}, stats=ops.STATS)
        assert counter.get_total_flops() == 2 * 2 * (each_state * 7 * 5 * 3 + 2 * 7 * 5)


def test_unknown_statistic_names_the_nearest():
    with pytest.raises(UserError, match=r"'deltas'.*'delta'.*write"):
        ops.selective_scan(**Case().inputs(), stats=("deltas",))
