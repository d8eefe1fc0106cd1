"""Numba kernels for the CPU, float32, compiled on first use and cached on disk.

* The innermost loop is always over neighbouring channels, without sums across them, and with polynomials instead of
  calls to a maths library, so that the compiler vectorises it.
* The state (N, BLOCK) stays in the L1 cache. The rows of later tokens are prefetched explicitly, since they lie too far
  apart in memory for the hardware prefetcher.
* One thread runs all directions of an image and a block of channels: there are no races, and the result of an image
  depends neither on the rest of the batch nor on the number of threads.

All kernels are in this file because numba's cache does not detect changes in other files. The terms of the statistics
are defined elsewhere; their hash is part of the kernel's name.
"""

import functools
import hashlib
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic

BLOCK = 64
CACHE_LINE = 16  # floats
AHEAD = 4  # tokens between prefetching a row and using it
GROUP = 16  # tokens whose statistics are summed in parallel: each addition to one sum waits for the one before

# OpenMP supports callers in several threads, and wakes faster than numba's own pool beside PyTorch's OpenMP threads.
# It must not run in a process that was forked after its first use; data loading workers run no kernel.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]
# The last choice, workqueue, does not support concurrent callers.
_one_at_a_time = threading.Lock()


def run(kernel: Callable[..., None], *args: Any) -> None:
    """Call a kernel on as many threads as PyTorch uses."""
    threads = torch.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    with _one_at_a_time:
        before = numba.get_num_threads()
        if torch.get_num_threads() != threads:
            # Numba resets the thread count of the shared OpenMP runtime on first use.
            torch.set_num_threads(threads)
        numba.set_num_threads(min(threads, most))
        try:
            kernel(*args)
        finally:
            numba.set_num_threads(before)


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    # nsz and contract allow max and fused multiply-add instructions, and do not affect infinities, NaN or order.
    options = {"error_model": "numpy", "fastmath": {"nsz", "contract"}} | options

    def compile_lazily(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no cache directory is writable
            return numba.njit(**options)(function)

    return compile_lazily


f32 = np.float32
LOG2E = f32(1.4426950408889634)
LN2 = f32(0.6931471805599453)
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)
# Adding it rounds a small float to an integer, in the lowest bits of the sum; subtracting it gives the rounded float.
ROUND = f32(1.5 * 2**23)
# 2^f = 1 + f·P(f) on [-½, ½], relative error 9e-8; 2·atanh(s) = s·Q(s²) on [0, ⅓], 4e-9. Minimax fits.
P0, P1, P2, P3, P4 = map(f32, (0.6931469776, 0.2402224208, 0.0555073375, 0.0096715127, 0.0013264726))
Q0, Q1, Q2, Q3, Q4 = map(f32, (2.0, 0.66666315, 0.4002491, 0.27960605, 0.28178326))


@intrinsic
def _as_float(typing_context, bits):
    return numba.float32(numba.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _as_bits(typing_context, x):
    return numba.int32(numba.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _prefetch(typing_context, x, index):
    def generate(context, builder, signature, args):
        start = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(start, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), signature)
        builder.call(prefetch, [pointer, number(0), number(3), number(1)])  # read, into the L1 cache, data
        return context.get_dummy_value()

    return numba.none(x, index), generate


@_jit()
def _row(x, step, g, image, t, later, first, width):
    """The channels from ``first`` to ``first + width`` of token t; those of token ``later`` are prefetched."""
    start = g * step[0] + image * step[1] + first
    for j in range(0, width, CACHE_LINE):
        _prefetch(x, start + later * step[2] + j)  # type: ignore[call-arg]
    at = start + t * step[2]
    return x[at : at + width]


@_jit()
def _scaled_exp2(fraction, rounded):
    """2^(fraction + n) for ``rounded`` = ROUND + n: the polynomial with n added to the exponent bits."""
    p = f32(1) + fraction * (P0 + fraction * (P1 + fraction * (P2 + fraction * (P3 + fraction * P4))))
    return _as_float(_as_bits(p) + (_as_bits(rounded) << numba.int32(23)))  # type: ignore[call-arg]


@_jit()
def _exp2(x):
    """2^x for x ≤ 0; the result does not go below 2^-126."""
    x = f32(-126) if x < f32(-126) else x
    rounded = x + ROUND
    return _scaled_exp2(x - (rounded - ROUND), rounded)


@_jit()
def _exp2_minus_1(x):
    """2^x - 1 for x ≤ 0, without cancellation near 0."""
    near, far = x * (P0 + x * (P1 + x * (P2 + x * (P3 + x * P4)))), _exp2(x) - f32(1)
    return near if x > f32(-0.5) else far


@_jit()
def _growth(x, times):
    """Σ 2^(k x) over k < ``times``, for x ≤ 0."""
    x = f32(-1e-30) if x > f32(-1e-30) else x  # the limit at 0 is ``times``
    return _exp2_minus_1(times * x) / _exp2_minus_1(x)


@_jit()
def _exp(x):
    """e^x for x ≤ 0, with the argument reduced in two steps so that the relative error does not grow with x."""
    x = f32(-87) if x < f32(-87) else x
    rounded = x * LOG2E + ROUND
    n = rounded - ROUND
    return _scaled_exp2(LOG2E * ((x - n * LN2_HIGH) - n * LN2_LOW), rounded)


@_jit()
def _softplus(x):
    """max(0, x) + log(1 + e^-|x|), the logarithm as 2·atanh(e / (2 + e))."""
    e = _exp(-abs(x))
    s = e / (f32(2) + e)
    q = s * s
    return (f32(0) if x < f32(0) else x) + s * (Q0 + q * (Q1 + q * (Q2 + q * (Q3 + q * Q4))))


@_jit()
def _silu(x):
    e = _exp(-abs(x))
    return (x * e if x < f32(0) else x) / (f32(1) + e)


@_jit()
def _sigmoid(x):
    e = _exp(-abs(x))
    return (e if x < f32(0) else f32(1)) / (f32(1) + e)


@_jit()
def _maximum(x, floor):
    floor = f32(floor)
    return floor if x < floor else x


def _add_up_one_of(terms: tuple[Callable[..., Any], ...], first: int = 0) -> Any:
    """A function that sums ``terms[which]`` over a block of channels; ``rows`` are Δ, u and y of a group of tokens."""
    if not terms:
        return _jit()(lambda which, rows, total: None)
    term, otherwise = _jit()(terms[0]), _add_up_one_of(terms[1:], first + 1)

    @_jit()
    def add_up(which, rows, total):
        if which == first:
            total[:] = 0
            for j in range(BLOCK):
                for k in range(GROUP):
                    total[k] += term(rows[0, k, j], rows[1, k, j], rows[2, k, j], _maximum)
        else:
            otherwise(which, rows, total)

    return add_up


@functools.cache
def scan(terms: tuple[Callable[..., Any], ...], *, by_step: bool = False) -> Any:
    """The scan kernel with the terms of all statistics compiled into it; ``by_step``: that of ``scan_by_step``.

    A kernel for each selection of statistics would take seconds to compile for each of them.
    """
    body = _scan_by_step if by_step else _scan
    code = [(term.__code__.co_code, term.__code__.co_consts, term.__code__.co_names) for term in terms]
    kernel = FunctionType(body.__code__, globals() | {"_add_up": _add_up_one_of(terms)})
    kernel.__qualname__ = f"{body.__name__[1:]}_{hashlib.sha256(repr(code).encode()).hexdigest()[:16]}"
    return _jit(parallel=True)(kernel)


_add_up: Any = None  # replaced in the kernels that ``scan`` makes


def _scan(
    u, u_step, delta, delta_step, B, B_step, C, C_step, z, z_step, A, D, bias, order, gap, delta_scale, repeats, gated,
    y, stats, sums,
):  # fmt: skip
    """``stats``: the numbers of the terms that fill the last dimension of ``sums``."""
    directions, channels, states = A.shape
    images, length, _ = y.shape
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        row = image if order.shape[1] > 1 else 0  # one order may serve all images
        # Lanes beyond the last channel stay zero.
        exponent = np.zeros((states, BLOCK), f32)
        state = np.zeros((states, BLOCK), f32)
        skip, shift, idle, dt, once, decay, write, out = np.zeros((8, BLOCK), f32)
        rows, total = np.zeros((3, GROUP, BLOCK), f32), np.zeros(GROUP, f32)

        for g in range(directions):
            state[:] = 0
            for j in range(width):
                skip[j] = D[g, first + j]
                shift[j] = bias[g, first + j]
                idle[j] = _softplus(shift[j])
                for n in range(states):
                    exponent[n, j] = A[g, first + j, n] * LOG2E

            for step in range(length):
                t = order[g, row, step]
                later = order[g, row, min(step + AHEAD, length - 1)]
                u_t = _row(u, u_step, g, image, t, later, first, width)
                delta_t = _row(delta, delta_step, g, image, t, later, first, width)
                B_t = _row(B, B_step, g, image, t, later, 0, states)
                C_t = _row(C, C_step, g, image, t, later, 0, states)
                y_t = y[image, t, first : first + width]

                scale_t = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                times = repeats[image, t] if repeats.shape[0] > 0 else f32(1)
                gap_t = gap[image, g, step] if gap.shape[0] > 0 else f32(0)

                # Several short loops: the compiler does not vectorise one over all these arrays.
                for j in range(width):
                    dt[j] = _softplus(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    decay[j] = dt[j] + gap_t * idle[j]
                for j in range(width):
                    write[j] = dt[j] * u_t[j]
                    out[j] = skip[j] * u_t[j]
                if times == f32(1):
                    for n in range(states):
                        for j in range(BLOCK):
                            state[n, j] = _exp2(decay[j] * exponent[n, j]) * state[n, j] + write[j] * B_t[n]
                            out[j] += state[n, j] * C_t[n]
                else:
                    for j in range(BLOCK):
                        once[j] = dt[j]
                        dt[j] *= times
                        decay[j] += dt[j] - once[j]
                    for n in range(states):
                        for j in range(BLOCK):
                            growth = _growth(once[j] * exponent[n, j], times)
                            state[n, j] = _exp2(decay[j] * exponent[n, j]) * state[n, j] + write[j] * growth * B_t[n]
                            out[j] += state[n, j] * C_t[n]
                for j in range(width):
                    y_t[j] = out[j] if g == 0 else y_t[j] + out[j]
                if gated and g == directions - 1:
                    z_t = _row(z, z_step, 0, image, t, later, first, width)
                    for j in range(width):
                        y_t[j] *= _silu(z_t[j])
                if len(stats) > 0:
                    place = step % GROUP
                    for j in range(width):
                        rows[0, place, j] = dt[j]
                    for j in range(width):
                        rows[1, place, j] = u_t[j]
                    for j in range(width):
                        rows[2, place, j] = out[j]
                    if place == GROUP - 1 or step == length - 1:
                        for i in range(len(stats)):
                            _add_up(stats[i], rows, total)
                            for k in range(place + 1):
                                sums[block, g, image, order[g, row, step - place + k], i] = total[k]


@_jit(fastmath={"nsz", "contract", "reassoc"})
def _lane_sum(x, y):
    """Σ x y over a block of channels, in the order that vectorises."""
    total = f32(0)
    for j in range(BLOCK):
        total += x[j] * y[j]
    return total


@_jit(parallel=True)
def scan_gradient(
    u, u_step, delta, delta_step, B, B_step, C, C_step, z, z_step, grad, grad_step, A, D, bias, order, gap, delta_scale,
    gated, du, ddelta, dA, dB, dC, dD, dz, dbias,
):  # fmt: skip
    """The gradients of ``_scan`` without repeats: the states once more, kept, then their adjoints from the last step.

    ``dA`` (images, G, N, E), ``dD`` and ``dbias`` (images, G, E), ``dB`` and ``dC`` (blocks, G, B, L, N) are parts of
    sums over images or blocks.
    """
    directions, channels, states = A.shape
    images, length = du.shape[1:3]
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        row = image if order.shape[1] > 1 else 0
        # Lanes beyond the last channel stay zero.
        exponent, slope, adjoint = np.zeros((3, states, BLOCK), f32)
        history = np.zeros((length + 1, states, BLOCK), f32)  # the state before each step
        out = np.zeros((length, BLOCK), f32)  # before the gate, summed over directions
        skip, shift, idle, idle_slope, into, dt, span, write, g_t, of_write, of_span = np.zeros((11, BLOCK), f32)
        sum_bias, sum_idle, sum_skip = np.zeros((3, BLOCK), f32)

        for g in range(directions):
            adjoint[:], slope[:], sum_bias[:], sum_idle[:], sum_skip[:] = f32(0), f32(0), f32(0), f32(0), f32(0)
            for j in range(width):
                skip[j] = D[g, first + j]
                shift[j] = bias[g, first + j]
                idle[j] = _softplus(shift[j])
                idle_slope[j] = _sigmoid(shift[j])
                for n in range(states):
                    exponent[n, j] = A[g, first + j, n] * LOG2E

            for step in range(length):
                t = order[g, row, step]
                later = order[g, row, min(step + AHEAD, length - 1)]
                u_t = _row(u, u_step, g, image, t, later, first, width)
                delta_t = _row(delta, delta_step, g, image, t, later, first, width)
                B_t = _row(B, B_step, g, image, t, later, 0, states)
                C_t = _row(C, C_step, g, image, t, later, 0, states)
                scale_t = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                gap_t = gap[image, g, step] if gap.shape[0] > 0 else f32(0)
                before, after, out_t = history[step], history[step + 1], out[t]
                for j in range(width):
                    dt[j] = _softplus(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    span[j] = dt[j] + gap_t * idle[j]
                for j in range(width):
                    write[j] = dt[j] * u_t[j]
                    out_t[j] += skip[j] * u_t[j]
                for n in range(states):
                    for j in range(BLOCK):
                        after[n, j] = _exp2(span[j] * exponent[n, j]) * before[n, j] + write[j] * B_t[n]
                        out_t[j] += after[n, j] * C_t[n]

            for step in range(length - 1, -1, -1):
                t = order[g, row, step]
                later = order[g, row, max(step - AHEAD, 0)]
                u_t = _row(u, u_step, g, image, t, later, first, width)
                delta_t = _row(delta, delta_step, g, image, t, later, first, width)
                B_t = _row(B, B_step, g, image, t, later, 0, states)
                C_t = _row(C, C_step, g, image, t, later, 0, states)
                y_t = _row(grad, grad_step, 0, image, t, later, first, width)
                scale_t = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                gap_t = gap[image, g, step] if gap.shape[0] > 0 else f32(0)
                before, after = history[step], history[step + 1]
                for j in range(width):
                    g_t[j] = y_t[j]
                if gated:
                    z_t = _row(z, z_step, 0, image, t, later, first, width)
                    for j in range(width):
                        g_t[j] *= _silu(z_t[j])
                for j in range(width):
                    into[j] = _sigmoid(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    dt[j] = _softplus(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    span[j] = dt[j] + gap_t * idle[j]
                    write[j] = dt[j] * u_t[j]
                of_write[:], of_span[:] = f32(0), f32(0)
                for n in range(states):
                    for j in range(BLOCK):
                        adjoint[n, j] += g_t[j] * C_t[n]
                        of_write[j] += adjoint[n, j] * B_t[n]
                    dB[block, g, image, t, n] = _lane_sum(adjoint[n], write)
                    dC[block, g, image, t, n] = _lane_sum(after[n], g_t)
                    for j in range(BLOCK):
                        adjoint[n, j] *= _exp2(span[j] * exponent[n, j])  # now of the state before this step
                        of_product = adjoint[n, j] * before[n, j]
                        of_span[j] += of_product * exponent[n, j]
                        slope[n, j] += of_product * span[j]
                du_t = du[g, image, t, first : first + width]
                ddelta_t = ddelta[g, image, t, first : first + width]
                for j in range(width):
                    du_t[j] = of_write[j] * dt[j] + g_t[j] * skip[j]
                    sum_skip[j] += g_t[j] * u_t[j]
                    of_span[j] *= LN2
                    ddelta_t[j] = (of_write[j] * u_t[j] + of_span[j]) * into[j]
                    sum_bias[j] += ddelta_t[j]
                    sum_idle[j] += of_span[j] * gap_t
            for j in range(width):
                dD[image, g, first + j] = sum_skip[j]
                dbias[image, g, first + j] = sum_bias[j] + sum_idle[j] * idle_slope[j]
                for n in range(states):
                    dA[image, g, n, first + j] = slope[n, j]

        if gated:
            for t in range(length):
                z_t = _row(z, z_step, 0, image, t, t, first, width)
                y_t = _row(grad, grad_step, 0, image, t, t, first, width)
                dz_t, out_t = dz[image, t, first : first + width], out[t]
                for j in range(width):
                    gate = _sigmoid(z_t[j])
                    dz_t[j] = y_t[j] * out_t[j] * gate * (f32(1) + z_t[j] * (f32(1) - gate))


def _scan_by_step(
    u, u_step, delta, delta_step, B, B_step, C, C_step, z, z_step, A, D, bias, order, moves, gated, y, stats, sums,
):  # fmt: skip
    """All paths read Δ, B and C of the same token at a step, so one exponential serves them all.

    A is (E, N), D and bias are (E,), order is (G, L), moves (G, L, N). The results have the same bits as ``_scan``'s.
    """
    paths, states, channels = order.shape[0], A.shape[1], A.shape[0]
    images, length, _ = y.shape
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        # Lanes beyond the last channel stay zero.
        exponent = np.zeros((states, BLOCK), f32)
        state = np.zeros((paths, states, BLOCK), f32)
        skip, shift, dt, decay = np.zeros((4, BLOCK), f32)
        write, out = np.zeros((paths, BLOCK), f32), np.zeros((paths, BLOCK), f32)
        outputs = np.empty((paths, length, BLOCK), f32)  # added up at the end, in the order of the paths
        rows, total = np.zeros((paths, 3, GROUP, BLOCK), f32), np.zeros(GROUP, f32)
        for j in range(width):
            skip[j] = D[first + j]
            shift[j] = bias[first + j]
            for n in range(states):
                exponent[n, j] = A[first + j, n] * LOG2E

        for step in range(length):
            ahead = min(step + AHEAD, length - 1)
            delta_t = _row(delta, delta_step, 0, image, step, ahead, first, width)
            B_t = _row(B, B_step, 0, image, step, ahead, 0, states)
            C_t = _row(C, C_step, 0, image, step, ahead, 0, states)
            for j in range(width):
                dt[j] = _softplus(delta_t[j] + shift[j])
            for g in range(paths):
                u_t = _row(u, u_step, 0, image, order[g, step], order[g, ahead], first, width)
                for j in range(width):
                    write[g, j] = dt[j] * u_t[j]
                    out[g, j] = skip[j] * u_t[j]
                if len(stats) > 0:
                    for j in range(width):
                        rows[g, 1, step % GROUP, j] = u_t[j]
            for n in range(states):
                for j in range(BLOCK):
                    decay[j] = _exp2(dt[j] * exponent[n, j])
                for g in range(paths):
                    b = B_t[n] + moves[g, step, n]
                    for j in range(BLOCK):
                        state[g, n, j] = write[g, j] * b + decay[j] * state[g, n, j]
                        out[g, j] += state[g, n, j] * C_t[n]
            for g in range(paths):
                for j in range(BLOCK):
                    outputs[g, order[g, step], j] = out[g, j]
            if len(stats) > 0:
                place = step % GROUP
                for g in range(paths):
                    for j in range(width):
                        rows[g, 0, place, j] = dt[j]
                    for j in range(width):
                        rows[g, 2, place, j] = out[g, j]
                    if place == GROUP - 1 or step == length - 1:
                        for i in range(len(stats)):
                            _add_up(stats[i], rows[g], total)
                            for k in range(place + 1):
                                sums[block, g, image, order[g, step - place + k], i] = total[k]

        for t in range(length):
            y_t = y[image, t, first : first + width]
            for j in range(width):
                y_t[j] = outputs[0, t, j]
            for g in range(1, paths):
                for j in range(width):
                    y_t[j] += outputs[g, t, j]
            if gated:
                z_t = _row(z, z_step, 0, image, t, min(t + AHEAD, length - 1), first, width)
                for j in range(width):
                    y_t[j] *= _silu(z_t[j])


@_jit(parallel=True)
def conv(x, x_step, weight, bias, index, source, reverse, length, begin, end, start, y):
    """``causal_conv1d`` for some of ``length`` tokens: from ``begin`` to before ``end`` of each direction and image.

    They are written to ``y`` (rows, E) from row ``start`` on; all three are (G, B).

    ``x`` and ``x_step`` are the flat memory and the strides of (1, B, L, E); weight is (G, E, W), bias (G, E).
    ``index`` and ``source`` are empty for a convolution over the tokens.
    """
    directions, channels, taps = weight.shape
    images, unmerged = begin.shape[1], index.shape[0] > 0
    positions = source.shape[1] if unmerged else length
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        tap = np.zeros((taps, BLOCK), f32)
        total = np.zeros(BLOCK, f32)
        for g in range(directions):
            for k in range(taps):
                for j in range(width):
                    tap[k, j] = weight[g, first + j, k]
            for t in range(begin[g, image], end[g, image]):
                position = index[image, t] if unmerged else t
                for j in range(width):
                    total[j] = bias[g, first + j]
                for k in range(taps):
                    back = taps - 1 - k
                    near = position + back if reverse[g] else position - back
                    if 0 <= near < positions:
                        token = source[image, near] if unmerged else near
                        if token < 0:
                            continue
                        x_s = _row(x, x_step, 0, image, token, token + AHEAD, first, width)
                        for j in range(width):
                            total[j] += tap[k, j] * x_s[j]
                y_t = y[start[g, image] + t - begin[g, image], first : first + width]
                for j in range(width):
                    y_t[j] = _silu(total[j])


@_jit(parallel=True)
def read(
    u, delta, bc, bc_step, z, a, D, bias, begin, end, start, gap, delta_scale, repeats, scale, y,
):  # fmt: skip
    """The output of the token that ends the forward window of an image and begins the backward one, written to ``y``.

    Not by a recurrence: what each token writes into the state decays by the sum of Δ from there on. ``u``, ``delta``
    and ``bc`` (B and C side by side) are rows of the windows, which are as in ``conv``; ``z`` and ``y`` are (B, E), and
    ``a`` is A, (G, N, E).
    """
    directions, states, channels = a.shape
    images, length = y.shape[0], end[1, 0]
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        exponent = np.zeros((states, BLOCK), f32)
        state = np.zeros((states, BLOCK), f32)
        span, shift, idle, dt, once, write, out = np.zeros((7, BLOCK), f32)
        for g in range(directions):
            state[:] = 0
            span[:] = 0
            for j in range(width):
                shift[j] = bias[g, first + j]
                idle[j] = _softplus(shift[j])
                for n in range(states):
                    exponent[n, j] = a[g, n, first + j] * LOG2E
            tokens = end[g, image] - begin[g, image]
            at = start[g, image] if g else start[g, image] + tokens - 1
            for k in range(tokens):
                row, t = (at + k, begin[g, image] + k) if g else (at - k, end[g, image] - 1 - k)
                u_t, delta_t = u[row, first : first + width], delta[row, first : first + width]
                B_t = bc[row * bc_step : row * bc_step + states]
                scale_t = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                times = repeats[image, t] if repeats.shape[0] > 0 else f32(1)
                step = length - 1 - t if g else t
                gap_t = gap[image, g, step] if gap.shape[0] > 0 else f32(0)
                for j in range(width):
                    dt[j] = _softplus(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    write[j] = dt[j] * u_t[j]
                if times == f32(1):
                    for n in range(states):
                        for j in range(BLOCK):
                            state[n, j] += _exp2(span[j] * exponent[n, j]) * write[j] * B_t[n]
                else:
                    for j in range(BLOCK):
                        once[j] = dt[j]
                        dt[j] *= times
                    for n in range(states):
                        for j in range(BLOCK):
                            growth = _growth(once[j] * exponent[n, j], times)
                            state[n, j] += _exp2(span[j] * exponent[n, j]) * write[j] * growth * B_t[n]
                for j in range(BLOCK):
                    span[j] += dt[j] + gap_t * idle[j]
            C_t = bc[at * bc_step + states : at * bc_step + 2 * states]
            for n in range(states):
                for j in range(BLOCK):
                    out[j] += state[n, j] * C_t[n]
            for j in range(width):
                out[j] += D[g, first + j] * u[at, first + j]
        for j in range(width):
            y[image, first + j] = out[j] * _silu(z[image, first + j]) * scale


@_jit(parallel=True)
def neighbour_plan(index, size, special, weight, features, by_size, axes,
                   dest, share, keep, removed, offsets, survivors, sizes, places):  # fmt: skip
    """``neighbour_plan``: the results are written to the arrays of the second line.

    ``features`` are (B, L, C). ``weight`` is empty for the most similar tokens first.
    """
    images, length, _ = features.shape
    for image in numba.prange(images):
        turn, place = _turns(index[image], special[image])
        norm = np.empty(length, f32)
        for i in range(length):
            norm[i] = max(np.sqrt(_dot(features[image, i], features[image, i])), f32(1e-12))
        token = np.full(place[length - 1] + 2, -1, np.int64)  # at each place of the grid: the target there
        sources = 0
        for i in range(length):
            sources += turn[i] >= 0 and turn[i] % 2 == 0
            if turn[i] >= 0 and turn[i] % 2 == 1:
                token[place[i]] = i
        source, into, cost = np.empty(sources, np.int64), np.empty(sources, np.int64), np.empty(sources, f32)
        first = last = -1  # the next targets before and behind
        for i in range(length):
            if turn[i] < 0:
                continue
            if turn[i] % 2 == 1:
                first = i
                continue
            k = turn[i] // 2
            best, similarity = _nearest_neighbour(features[image], norm, i, place[i], token, axes)
            distance = f32(np.inf) if best < 0 else -similarity
            if best >= 0 and weight.shape[0] > 0:
                distance = weight[image, i] * (f32(1) - similarity)
            if best < 0:
                last = i + 1
                while last < length and (turn[last] < 0 or turn[last] % 2 == 0):
                    last += 1
                best = (
                    first
                    if last == length or (first >= 0 and place[i] - place[first] <= place[last] - place[i])
                    else last
                )
            source[k], into[k], cost[k] = i, best, distance if distance == distance else f32(np.inf)
        _least_first(cost, source, into)
        _write_plan(source[: removed.shape[1]], into, index[image], size[image], special[image], by_size, dest[image],
                    share[image], keep[image], removed[image], offsets[image], survivors[image], sizes[image],
                    places[image])  # fmt: skip


@_jit()
def _least_first(cost, source, into):
    """Sort tokens and their targets by cost, of equal costs the earlier first."""
    sources, targets = source.copy(), into.copy()
    for k in range(len(cost)):
        rank = 0
        for j in range(len(cost)):
            rank += cost[j] < cost[k] or (cost[j] == cost[k] and j < k)
        source[rank], into[rank] = sources[k], targets[k]


@_jit()
def _turns(index, special):
    """Of each token of an image: its number among the ordinary tokens, -1 if special, and its place on the grid."""
    turn, place = np.zeros(len(index), np.int64), np.empty(len(index), np.int64)
    for s in special:
        turn[s] = -1
    before = 0
    for i in range(len(index)):
        place[i] = index[i] - before
        if turn[i] < 0:
            before += 1
        else:
            turn[i] = i - before
    return turn, place


@_jit()
def _nearest_neighbour(features, norm, i, place, token, axes):
    """The most similar target within one place of the grid, -1 for none, and its similarity."""
    best, similarity = np.int64(-1), f32(-np.inf)
    for neighbour in range(3 ** len(axes)):
        step, rest, stride, to, on_grid = neighbour, place, 1, place, True
        for a in range(len(axes) - 1, -1, -1):
            move = step % 3 - 1
            at = rest % axes[a] + move
            on_grid = on_grid and (0 <= at < axes[a] or a == 0)
            to += move * stride
            step, rest, stride = step // 3, rest // axes[a], stride * axes[a]
        if on_grid and 0 <= to < len(token) and token[to] >= 0:
            j = token[to]
            near = _dot(features[i], features[j]) / (norm[i] * norm[j])
            if best < 0 or near > similarity:
                best, similarity = j, near
    return best, similarity


@_jit()
def _dot(x, y):
    """x · y, summed in as many parts as a cache line has floats, so that the compiler vectorises it."""
    parts = np.zeros(CACHE_LINE, f32)
    whole = len(x) // CACHE_LINE * CACHE_LINE
    for c in range(0, whole, CACHE_LINE):
        for j in range(CACHE_LINE):
            parts[j] += x[c + j] * y[c + j]
    total = f32(0)
    for j in range(CACHE_LINE):
        total += parts[j]
    for c in range(whole, len(x)):
        total += x[c] * y[c]
    return total


@_jit()
def _write_plan(
    source, into, index, size, special, by_size, dest, share, keep, removed, offsets, survivors, sizes, places
):
    """The plan that merges tokens ``source`` into survivors ``into``, and the metadata of the survivors."""
    dest[:] = 0
    for i in source:
        dest[i] = -1
    slot = 0
    for i in range(len(dest)):
        if dest[i] == 0:
            dest[i], keep[slot] = slot, i
            slot += 1
    total, count = np.zeros(slot, f32), np.zeros(slot + 1, np.int64)
    for j in range(slot):
        survivors[j], sizes[j] = index[keep[j]], size[keep[j]]
        total[j] = size[keep[j]] if by_size else f32(1)
    for k in range(len(source)):
        j = dest[into[k]]
        dest[source[k]] = j
        sizes[j] += size[source[k]]
        total[j] += size[source[k]] if by_size else f32(1)
        count[j + 1] += 1
    offsets[0] = 0
    for j in range(slot):
        offsets[j + 1] = offsets[j] + count[j + 1]
    for k in range(len(source)):  # sorted by destination
        j = dest[source[k]]
        removed[offsets[j + 1] - count[j + 1]] = source[k]
        count[j + 1] -= 1
    for i in range(len(dest)):
        share[i] = (size[i] if by_size else f32(1)) / total[dest[i]]
    for s in range(len(special)):
        places[s] = dest[special[s]]


@_jit(parallel=True, fastmath=False)
def apply_plan(x, weight, dest, keep, removed, y):
    """``apply_plan``, written to ``y`` (B, M, E)."""
    images, kept, channels = y.shape
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        for j in range(kept):
            token = keep[image, j]
            share = weight[image, token]
            x_t, y_j = x[image, token, first : first + width], y[image, j, first : first + width]
            for e in range(width):
                y_j[e] = share * x_t[e]
        for k in range(removed.shape[1]):
            token = removed[image, k]
            share, j = weight[image, token], dest[image, token]
            if j >= 0:
                x_t, y_j = x[image, token, first : first + width], y[image, j, first : first + width]
                for e in range(width):
                    y_j[e] += share * x_t[e]
