"""Numba kernels for the CPU, in float32, compiled on first use and cached on disk.

* Scan and convolution run on vectors of BLOCK neighbouring channels, without sums across them, and with polynomials
  instead of calls to a maths library. Other loops over channels are vectorised by the compiler.
* Innermost loops call no function with an array as an argument: numba would count references there, atomically.
* The state (N, BLOCK) stays in the L1 cache, and what a step adds to y in registers. The rows of later tokens are
  prefetched explicitly, since they lie too far apart in memory for the hardware prefetcher.
* One thread runs all directions of an image and a block of channels: there are no races, and the result of an image
  depends neither on the rest of the batch nor on the number of threads.

All kernels are in this file because numba's cache does not detect changes in other files. The terms of the statistics
are defined elsewhere; their hash is part of the kernel's name.
"""

import functools
import hashlib
import operator
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, overload, register_model

_intrinsic: Any = intrinsic  # its calls have other arguments than its definition

BLOCK = 64
CACHE_LINE = 16  # floats
AHEAD = 4  # tokens between prefetching a row and using it
TOKENS = 64  # of a convolution in one piece of work
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
        before, wanted = numba.get_num_threads(), min(threads, most)
        if torch.get_num_threads() != threads:
            # Numba resets the thread count of the shared OpenMP runtime on first use.
            torch.set_num_threads(threads)
        if before == wanted:
            kernel(*args)
            return
        numba.set_num_threads(wanted)
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


class _Vector(numba.types.Type):
    """BLOCK neighbouring channels, the operands of vector instructions of the machine's width."""

    def __init__(self) -> None:
        super().__init__("Vector")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), BLOCK))


VECTOR = _Vector()
FLAGS = ("nsz", "contract")  # allow max and fused multiply-add, do not affect infinities, NaN or order


def _lanes(builder: Any, kind: Any, value: Any) -> Any:
    """A vector, or a scalar in all lanes."""
    if kind is VECTOR:
        return value
    vector = ir.VectorType(ir.FloatType(), BLOCK)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), None))


def _operands(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Floats; if one of them is a vector, all are."""
    if VECTOR in signature.args:
        return [_lanes(builder, kind, value) for kind, value in zip(signature.args, args, strict=True)]
    return list(args)


def _result(*kinds: Any) -> Any:
    return VECTOR if VECTOR in kinds else numba.float32


def _operator(operation: Any, name: str) -> None:
    """Overload an operation of scalars for vectors."""

    @_intrinsic
    def of_vectors(typing_context, x, y):
        def generate(context, builder, signature, args):
            return getattr(builder, name)(*_operands(context, builder, signature, args), flags=FLAGS)

        return VECTOR(x, y), generate

    @overload(operation)
    def choose(x, y):
        return (lambda x, y: of_vectors(x, y)) if VECTOR in (x, y) else None


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """To the vector that begins at a place of contiguous memory, of floats or of the bits of bfloat16."""
    start = context.make_array(kind)(context, builder, array).data
    element = ir.FloatType() if kind.dtype == numba.float32 else ir.IntType(16)
    return builder.bitcast(builder.gep(start, [at]), ir.VectorType(element, BLOCK).as_pointer())


def _integers(number: int) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [number] * BLOCK)


def _from_bfloat16(builder: Any, bits: Any) -> Any:
    """Floats whose upper half these bits are."""
    whole = builder.shl(builder.zext(bits, _integers(0).type), _integers(16))
    return builder.bitcast(whole, ir.VectorType(ir.FloatType(), BLOCK))


def _to_bfloat16(builder: Any, x: Any) -> Any:
    """The bits of floats rounded to the nearest, of two equally near ones to the even."""
    bits = builder.bitcast(x, _integers(0).type)
    odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
    rounded = builder.add(builder.add(bits, _integers(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _integers(16)), ir.VectorType(ir.IntType(16), BLOCK))


def _first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first ``count`` lanes."""
    number = ir.IntType(64)
    lanes = ir.Constant(ir.VectorType(number, BLOCK), list(range(BLOCK)))
    one = builder.insert_element(ir.Constant(lanes.type, ir.Undefined), count, ir.IntType(32)(0))
    counts = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), None))
    return builder.icmp_signed("<", lanes, counts)


@_intrinsic
def _load(typing_context, array, at, count):
    """The vector of the channels from ``at`` on, float32 or bits of bfloat16; zero behind the first ``count``."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        vector, align = pointer.type.pointee, ir.IntType(32)(2)
        whole = builder.icmp_signed(">=", args[2], args[2].type(BLOCK))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                plain, plain_block = builder.load(pointer, align=2), builder.block
            with otherwise:
                mask = _first_lanes(builder, args[2])
                kind = ir.FunctionType(vector, (pointer.type, align.type, mask.type, vector))
                name = f"llvm.masked.load.v{BLOCK}{vector.element.intrinsic_name}.p0"
                load = get_or_insert_function(builder.module, kind, name)
                masked = builder.call(load, [pointer, align, mask, ir.Constant(vector, None)])
                masked_block = builder.block
        result = builder.phi(vector)
        result.add_incoming(plain, plain_block)
        result.add_incoming(masked, masked_block)
        return result if vector.element == ir.FloatType() else _from_bfloat16(builder, result)

    return VECTOR(array, at, numba.int64), generate


@_intrinsic
def _store(typing_context, array, at, value, count):
    """Write the first ``count`` channels of a vector, as float32 or the bits of bfloat16."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        vector, align = pointer.type.pointee, ir.IntType(32)(2)
        value = args[2] if vector.element == ir.FloatType() else _to_bfloat16(builder, args[2])
        whole = builder.icmp_signed(">=", args[3], args[3].type(BLOCK))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                builder.store(value, pointer, align=2)
            with otherwise:
                mask = _first_lanes(builder, args[3])
                kind = ir.FunctionType(ir.VoidType(), (vector, pointer.type, align.type, mask.type))
                name = f"llvm.masked.store.v{BLOCK}{vector.element.intrinsic_name}.p0"
                builder.call(get_or_insert_function(builder.module, kind, name), [value, pointer, align, mask])
        return context.get_dummy_value()

    return numba.none(array, at, value, numba.int64), generate


@_intrinsic
def _choose_below(typing_context, x, limit, below, otherwise):
    """``below if x < limit else otherwise``, of scalars and vectors."""

    def generate(context, builder, signature, args):
        x, limit, below, otherwise = _operands(context, builder, signature, args)
        return builder.select(builder.fcmp_ordered("<", x, limit), below, otherwise)

    return _result(x, limit, below, otherwise)(x, limit, below, otherwise), generate


@_intrinsic
def _multiply_add(typing_context, x, y, z):
    """x · y + z, in one instruction if the machine has it, so that kernels with the same operations have equal bits."""

    def generate(context, builder, signature, args):
        x, y, z = _operands(context, builder, signature, args)
        kind = ir.FunctionType(x.type, (x.type,) * 3)
        return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{BLOCK}f32"), [x, y, z])

    return VECTOR(x, y, z), generate


@_intrinsic
def _sum(typing_context, x):
    """The sum of all lanes, in the order that vectorises."""

    def generate(context, builder, signature, args):
        start = ir.Constant(ir.FloatType(), 0.0)
        kind = ir.FunctionType(start.type, (start.type, args[0].type))
        add = get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{BLOCK}f32")
        return builder.call(add, [start, args[0]], fastmath=("reassoc",))

    return numba.float32(x), generate


@_intrinsic
def _times_power_of_2(typing_context, x, rounded):
    """x · 2^n for ``rounded`` = ROUND + n: n is added to the exponent bits."""

    def generate(context, builder, signature, args):
        float_kind = args[0].type
        bits = ir.IntType(32)
        bits = ir.VectorType(bits, BLOCK) if signature.args[0] is VECTOR else bits
        shift = ir.Constant(bits, [23] * BLOCK if signature.args[0] is VECTOR else 23)
        n = builder.shl(builder.bitcast(args[1], bits), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[0], bits), n), float_kind)

    return _result(x, rounded)(x, rounded), generate


@_intrinsic
def _prefetch(typing_context, x, at):
    """Fetch a block of channels from ``at`` on into the L1 cache."""

    def generate(context, builder, signature, args):
        start = context.make_array(signature.args[0])(context, builder, args[0]).data
        number = ir.IntType(32)
        pointer = builder.bitcast(builder.gep(start, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        for line in range(0, BLOCK, CACHE_LINE):  # lines behind the last channel may be fetched, too: it does no harm
            address = builder.gep(pointer, [ir.IntType(64)(4 * line)])
            builder.call(prefetch, [address, number(0), number(3), number(1)])  # read, into the L1 cache, data
        return context.get_dummy_value()

    return numba.none(x, at), generate


@_jit(forceinline=True)
def _row(x, step, g, image, t, later, first, width):
    """The channels from ``first`` to ``first + width`` of token t; those of token ``later`` are prefetched."""
    start = g * step[0] + image * step[1] + first
    _prefetch(x, start + later * step[2])
    at = start + t * step[2]
    return x[at : at + width]


@_jit(forceinline=True)
def _scaled_exp2(fraction, rounded):
    """2^(fraction + n) for ``rounded`` = ROUND + n."""
    p = f32(1) + fraction * (P0 + fraction * (P1 + fraction * (P2 + fraction * (P3 + fraction * P4))))
    return _times_power_of_2(p, rounded)


@_jit(forceinline=True)
def _exp2(x):
    """2^x for x ≤ 0; the result does not go below 2^-126."""
    x = _maximum(x, f32(-126))
    rounded = x + ROUND
    return _scaled_exp2(x - (rounded - ROUND), rounded)


@_jit(forceinline=True)
def _exp2_minus_1(x):
    """2^x - 1 for x ≤ 0, without cancellation near 0."""
    near, far = x * (P0 + x * (P1 + x * (P2 + x * (P3 + x * P4)))), _exp2(x) - f32(1)
    return _choose_below(f32(-0.5), x, near, far)


@_jit(forceinline=True)
def _growth(x, times):
    """Σ 2^(k x) over k < ``times``, for x ≤ 0."""
    x = _choose_below(f32(-1e-30), x, f32(-1e-30), x)  # the limit at 0 is ``times``
    return _exp2_minus_1(times * x) / _exp2_minus_1(x)


@_jit(forceinline=True)
def _exp(x):
    """e^x for x ≤ 0, with the argument reduced in two steps so that the relative error does not grow with x."""
    x = _maximum(x, f32(-87))
    rounded = x * LOG2E + ROUND
    n = rounded - ROUND
    return _scaled_exp2(LOG2E * ((x - n * LN2_HIGH) - n * LN2_LOW), rounded)


@_jit(forceinline=True)
def _softplus(x):
    """max(0, x) + log(1 + e^-|x|), the logarithm as 2·atanh(e / (2 + e))."""
    e = _exp(_choose_below(x, f32(0), x, f32(0) - x))
    s = e / (f32(2) + e)
    q = s * s
    return _maximum(x, f32(0)) + s * (Q0 + q * (Q1 + q * (Q2 + q * (Q3 + q * Q4))))


@_jit(forceinline=True)
def _silu(x):
    e = _exp(_choose_below(x, f32(0), x, f32(0) - x))
    return _choose_below(x, f32(0), x * e, x) / (f32(1) + e)


@_jit(forceinline=True)
def _sigmoid(x):
    e = _exp(-abs(x))
    return (e if x < f32(0) else f32(1)) / (f32(1) + e)


@_jit(forceinline=True)
def _maximum(x, floor):
    return _choose_below(x, f32(floor), f32(floor), x)


@_jit()
def _scratch(size):
    """Zeros that begin at a cache line: a vector that crosses one takes two accesses."""
    memory = np.zeros(size + CACHE_LINE, f32)
    first = -(memory.ctypes.data // 4) % CACHE_LINE
    return memory[first : first + size]


def _add_up_one_of(terms: tuple[Callable[..., Any], ...], first: int = 0) -> Any:
    """A function that sums ``terms[which]`` over a block of channels, from Δ, u and y of a group of tokens."""
    if not terms:
        return _jit()(lambda which, dts, inputs, outputs, total: None)
    term, otherwise = _jit()(terms[0]), _add_up_one_of(terms[1:], first + 1)

    @_jit()
    def add_up(which, dts, inputs, outputs, total):
        if which == first:
            total[:] = 0
            for j in range(BLOCK):
                for k in range(GROUP):
                    at = k * BLOCK + j
                    total[k] += term(dts[at], inputs[at], outputs[at], _maximum)
        else:
            otherwise(which, dts, inputs, outputs, total)

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
    u, u_step, delta, delta_step, B, B_step, C, C_step, z, z_step, rank, timescale, A, D, bias, order, gap, delta_scale,
    repeats, gated, scale, y, stats, sums,
):  # fmt: skip
    """``delta`` are Δ (E), or with a ``rank`` R > 0 the inputs (R) of their projection by ``timescale`` (G, ≥ R, E).

    A is (G, N, E). ``scale`` is a factor of the gate. ``stats``: the numbers of the terms that fill the last dimension
    of ``sums``.
    """
    directions, states, channels = A.shape
    images, length, _ = y.shape
    blocks, result = -(-channels // BLOCK), y.reshape(-1)
    exponents, projections, skips, shifts = A.reshape(-1), timescale.reshape(-1), D.reshape(-1), bias.reshape(-1)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        row = image if order.shape[1] > 1 else 0  # one order may serve all images
        # Lanes beyond the last channel stay zero.
        exponent, state, projection = _scratch(states * BLOCK), _scratch(states * BLOCK), _scratch(rank * BLOCK)
        skip, shift, idle, total = _scratch(BLOCK), _scratch(BLOCK), _scratch(BLOCK), _scratch(GROUP)
        dts, inputs, outputs = _scratch(GROUP * BLOCK), _scratch(GROUP * BLOCK), _scratch(GROUP * BLOCK)

        for g in range(directions):
            state[:] = 0
            gates = gated and g == directions - 1
            _store(skip, 0, _load(skips, g * channels + first, width), BLOCK)
            _store(shift, 0, _load(shifts, g * channels + first, width), BLOCK)
            _store(idle, 0, _softplus(_load(shift, 0, BLOCK)), width)
            for n in range(states):
                at = (g * states + n) * channels + first
                _store(exponent, n * BLOCK, _load(exponents, at, width) * LOG2E, BLOCK)
            for r in range(rank):
                at = (g * timescale.shape[1] + r) * channels + first
                _store(projection, r * BLOCK, _load(projections, at, width), BLOCK)
            first_u = g * u_step[0] + image * u_step[1] + first
            first_delta = g * delta_step[0] + image * delta_step[1] + (0 if rank > 0 else first)
            first_B, first_C = g * B_step[0] + image * B_step[1], g * C_step[0] + image * C_step[1]
            first_y, first_z = image * length * channels + first, image * z_step[1] + first

            # By groups of tokens, so that neither Δ nor the gate of a token waits for the state of the one before.
            for begin in range(0, length, GROUP):
                group = min(GROUP, length - begin)
                for k in range(group):
                    t = order[g, row, begin + k]
                    later = order[g, row, min(begin + k + AHEAD, length - 1)]
                    _prefetch(u, first_u + later * u_step[2])
                    _prefetch(delta, first_delta + later * delta_step[2])
                    factor = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                    factor *= repeats[image, t] if repeats.shape[0] > 0 else f32(1)
                    raw = _load(shift, 0, BLOCK)
                    if rank == 0:
                        raw = raw + _load(delta, first_delta + t * delta_step[2], width)
                    for r in range(rank):
                        raw = _multiply_add(
                            _load(projection, r * BLOCK, BLOCK), delta[first_delta + t * delta_step[2] + r], raw
                        )
                    _store(dts, k * BLOCK, _softplus(raw) * factor, width)
                    _store(inputs, k * BLOCK, _load(u, first_u + t * u_step[2], width), BLOCK)

                for k in range(group):
                    t = order[g, row, begin + k]
                    B_t, C_t = first_B + t * B_step[2], first_C + t * C_step[2]
                    times = repeats[image, t] if repeats.shape[0] > 0 else f32(1)
                    gap_t = gap[image, g, begin + k] if gap.shape[0] > 0 else f32(0)
                    dt, u_t = _load(dts, k * BLOCK, BLOCK), _load(inputs, k * BLOCK, BLOCK)
                    decay = dt + gap_t * _load(idle, 0, BLOCK)
                    out = _load(skip, 0, BLOCK) * u_t
                    if times == f32(1):
                        write = dt * u_t
                        for n in range(states):
                            at = n * BLOCK
                            kept = _exp2(decay * _load(exponent, at, BLOCK)) * _load(state, at, BLOCK)
                            h = _multiply_add(write, B[B_t + n], kept)
                            _store(state, n * BLOCK, h, BLOCK)
                            out = _multiply_add(h, C[C_t + n], out)
                    else:
                        once = dt / times
                        write = once * u_t
                        for n in range(states):
                            growth = _growth(once * _load(exponent, n * BLOCK, BLOCK), times)
                            kept = _exp2(decay * _load(exponent, n * BLOCK, BLOCK)) * _load(state, n * BLOCK, BLOCK)
                            h = _multiply_add(write * growth, B[B_t + n], kept)
                            _store(state, n * BLOCK, h, BLOCK)
                            out = _multiply_add(h, C[C_t + n], out)
                    _store(outputs, k * BLOCK, out, BLOCK)

                for k in range(group):
                    t = order[g, row, begin + k]
                    out = _load(outputs, k * BLOCK, BLOCK)
                    if g > 0:
                        out = _load(result, first_y + t * channels, width) + out
                    if gates:
                        out = out * (_silu(_load(z, first_z + t * z_step[2], width)) * scale)
                    _store(result, first_y + t * channels, out, width)

                for i in range(len(stats)):
                    _add_up(stats[i], dts, inputs, outputs, total)
                    for k in range(group):
                        sums[block, g, image, order[g, row, begin + k], i] = total[k]


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
    blocks, result = -(-channels // BLOCK), y.reshape(-1)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        # Lanes beyond the last channel stay zero.
        exponent, state = _scratch(states * BLOCK), _scratch(paths * states * BLOCK)
        skip, shift, total = _scratch(BLOCK), _scratch(BLOCK), _scratch(GROUP)
        write, out = _scratch(paths * BLOCK), _scratch(paths * BLOCK)
        outputs = _scratch(paths * length * BLOCK)  # added up at the end, in the order of the paths
        collected = _scratch(paths * 3 * GROUP * BLOCK)
        rows = collected.reshape(paths, 3, GROUP * BLOCK)
        for j in range(width):
            skip[j] = D[first + j]
            shift[j] = bias[first + j]
            for n in range(states):
                exponent[n * BLOCK + j] = A[first + j, n] * LOG2E
        first_u, first_delta = image * u_step[1] + first, image * delta_step[1] + first
        first_B, first_C = image * B_step[1], image * C_step[1]

        for step in range(length):
            ahead, place = min(step + AHEAD, length - 1), step % GROUP
            _prefetch(delta, first_delta + ahead * delta_step[2])
            dt = _softplus(_load(delta, first_delta + step * delta_step[2], width) + _load(shift, 0, BLOCK))
            for g in range(paths):
                _prefetch(u, first_u + order[g, ahead] * u_step[2])
                u_t = _load(u, first_u + order[g, step] * u_step[2], width)
                _store(write, g * BLOCK, dt * u_t, BLOCK)
                _store(out, g * BLOCK, _load(skip, 0, BLOCK) * u_t, BLOCK)
                if len(stats) > 0:
                    _store(collected, (3 * g * GROUP + place) * BLOCK, dt, width)
                    _store(collected, ((3 * g + 1) * GROUP + place) * BLOCK, u_t, BLOCK)
            B_t, C_t = first_B + step * B_step[2], first_C + step * C_step[2]
            for n in range(states):
                decay = _exp2(dt * _load(exponent, n * BLOCK, BLOCK))
                for g in range(paths):
                    at = (g * states + n) * BLOCK
                    kept = decay * _load(state, at, BLOCK)
                    h = _multiply_add(_load(write, g * BLOCK, BLOCK), B[B_t + n] + moves[g, step, n], kept)
                    _store(state, at, h, BLOCK)
                    _store(out, g * BLOCK, _multiply_add(h, C[C_t + n], _load(out, g * BLOCK, BLOCK)), BLOCK)
            for g in range(paths):
                y_t = _load(out, g * BLOCK, BLOCK)
                _store(outputs, (g * length + order[g, step]) * BLOCK, y_t, BLOCK)
                if len(stats) > 0:
                    _store(collected, ((3 * g + 2) * GROUP + place) * BLOCK, y_t, BLOCK)
            if len(stats) > 0 and (place == GROUP - 1 or step == length - 1):
                for g in range(paths):
                    for i in range(len(stats)):
                        _add_up(stats[i], rows[g, 0], rows[g, 1], rows[g, 2], total)
                        for k in range(place + 1):
                            sums[block, g, image, order[g, step - place + k], i] = total[k]

        for t in range(length):
            y_t = _load(outputs, t * BLOCK, BLOCK)
            for g in range(1, paths):
                y_t = y_t + _load(outputs, (g * length + t) * BLOCK, BLOCK)
            if gated:
                y_t = y_t * _silu(_load(z, image * z_step[1] + t * z_step[2] + first, width))
            _store(result, (image * length + t) * channels + first, y_t, width)


@_jit(parallel=True)
def conv(x, x_step, weight, bias, index, source, reverse, length, begin, end, start, y):
    """``causal_conv1d`` for some of ``length`` tokens: from ``begin`` to before ``end`` of each direction and image.

    They are written to ``y`` (rows, E) from row ``start`` on; all three are (G, B). All channels of a token follow each
    other, so that memory is read in its order.

    ``x`` and ``x_step`` are the flat memory and the strides of (1, B, L, E); weight is (G, W, E), bias (G, E).
    ``index`` and ``source`` are empty for a convolution over the tokens.
    """
    directions, taps, channels = weight.shape
    images, unmerged = begin.shape[1], index.shape[0] > 0
    positions = source.shape[1] if unmerged else length
    parts = -(-length // TOKENS)
    kernel, shift, result = weight.reshape(-1), bias.reshape(-1), y.reshape(-1)
    for unit in numba.prange(images * parts):
        image, part = divmod(np.int64(unit), parts)
        for t in range(part * TOKENS, min(part * TOKENS + TOKENS, length)):
            position = index[image, t] if unmerged else t
            for g in range(directions):
                if not begin[g, image] <= t < end[g, image]:
                    continue
                row = start[g, image] + t - begin[g, image]
                for first in range(0, channels, BLOCK):
                    width = min(BLOCK, channels - first)
                    total = _load(shift, g * channels + first, width)
                    for k in range(taps):
                        back = taps - 1 - k
                        near = position + back if reverse[g] else position - back
                        if 0 <= near < positions:
                            token = source[image, near] if unmerged else near
                            if token >= 0:
                                x_t = _load(x, image * x_step[1] + token * x_step[2] + first, width)
                                total = _multiply_add(
                                    _load(kernel, (g * taps + k) * channels + first, width), x_t, total
                                )
                    _store(result, row * channels + first, _silu(total), width)


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
    images, length, channels = features.shape
    memory = features.reshape(-1)
    for image in numba.prange(images):
        turn, place = _turns(index[image], special[image])
        norm = np.empty(length, f32)
        row = image * length * channels
        for i in range(length):
            at = row + i * channels
            norm[i] = max(np.sqrt(_dot(memory, at, at, channels)), f32(1e-12))
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
            best, similarity = _nearest_neighbour(memory, row, channels, norm, i, place[i], token, axes)
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


@_jit(parallel=True)
def asymmetric_plan(terms, scale, index, size, special, features, targets, by_size,
                    dest, share, keep, removed, offsets, survivors, sizes, places):  # fmt: skip
    """``asymmetric_plan``, for features (B, L, C): the results are written to the arrays of the second line."""
    images, length, channels = features.shape
    remove, memory, most = removed.shape[1], features.reshape(-1), np.finfo(f32).max
    for image in numba.prange(images):
        score = np.zeros(length, f32)
        for i in range(length):
            for k in range(terms.shape[1]):
                score[i] += terms[image, k, i]
            score[i] /= scale
            score[i] = min(max(score[i], -most), most) if score[i] == score[i] else f32(0)
        for s in special[image]:
            score[s] = np.inf
        rank = np.argsort(score, kind="mergesort")[: remove + targets]
        norm = np.empty(len(rank), f32)
        for k in range(len(rank)):
            at = (image * length + rank[k]) * channels
            norm[k] = max(np.sqrt(_dot(memory, at, at, channels)), f32(1e-12))
        into = np.empty(remove, np.int64)
        for k in range(remove):
            similarity, at = f32(-np.inf), (image * length + rank[k]) * channels
            into[k] = rank[remove]
            for j in range(remove, len(rank)):
                near = _dot(memory, at, (image * length + rank[j]) * channels, channels) / (norm[k] * norm[j])
                if near > similarity:
                    similarity, into[k] = near, rank[j]
        _write_plan(rank[:remove], into, index[image], size[image], special[image], by_size, dest[image],
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
def _nearest_neighbour(features, row, channels, norm, i, place, token, axes):
    """The most similar target within one row and column of a frame, -1 for none, and its similarity."""
    best, similarity = np.int64(-1), f32(-np.inf)
    for neighbour in range(3 ** min(len(axes), 2)):
        step, rest, stride, to, on_grid = neighbour, place, 1, place, True
        for a in range(len(axes) - 1, max(len(axes) - 3, -1), -1):
            move = step % 3 - 1
            at = rest % axes[a] + move
            on_grid = on_grid and (0 <= at < axes[a] or a == 0)
            to += move * stride
            step, rest, stride = step // 3, rest // axes[a], stride * axes[a]
        if on_grid and 0 <= to < len(token) and token[to] >= 0:
            j = token[to]
            near = _dot(features, row + i * channels, row + j * channels, channels) / (norm[i] * norm[j])
            if best < 0 or near > similarity:
                best, similarity = j, near
    return best, similarity


@_jit(forceinline=True)
def _dot(x, i, j, count):
    """The product of two vectors of ``count`` channels that begin at ``i`` and ``j``."""
    total = _load(x, i, min(BLOCK, count)) * _load(x, j, min(BLOCK, count))
    for c in range(BLOCK, count, BLOCK):
        width = min(BLOCK, count - c)
        total = total + _load(x, i + c, width) * _load(x, j + c, width)
    return _sum(total)


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


@_jit(parallel=True)
def norm_add(
    hidden, hidden_share, hidden_removed, hidden_offsets, residual, share, removed, offsets, keep, weight, bias, eps,
    normed, total,
):  # fmt: skip
    """``norm_add`` of two streams (B, L, C) with a plan for each, written to ``normed`` and ``total`` (B, M, C).

    ``keep`` is empty without a plan, ``hidden_removed`` if ``hidden`` has M tokens already, ``residual`` before the
    first block, and ``bias`` for RMSNorm.
    """
    images, kept, channels = total.shape
    parts, planned, merges = -(-kept // TOKENS), keep.shape[0] > 0, hidden_removed.shape[0] > 0
    first_stream, second_stream = hidden.reshape(-1), residual.reshape(-1)
    streams, norms = total.reshape(-1), normed.reshape(-1)
    for unit in numba.prange(images * parts):
        image, part = divmod(np.int64(unit), parts)
        row = _scratch(-(-channels // BLOCK) * BLOCK)  # lanes beyond the last channel stay zero
        for j in range(part * TOKENS, min(part * TOKENS + TOKENS, kept)):
            token, to = keep[image, j] if planned else j, (image * kept + j) * channels
            mean = square = f32(0)
            for c in range(0, channels, BLOCK):
                width = min(BLOCK, channels - c)
                if merges:
                    at = image * hidden.shape[1] * channels + c
                    value = _load(first_stream, at + token * channels, width) * hidden_share[image, token]
                    for k in range(hidden_offsets[image, j], hidden_offsets[image, j + 1]):
                        t = hidden_removed[image, k]
                        value = _multiply_add(
                            _load(first_stream, at + t * channels, width), hidden_share[image, t], value
                        )
                else:
                    value = _load(first_stream, to + c, width)
                if planned and residual.shape[0] > 0:
                    at = image * residual.shape[1] * channels + c
                    value = _multiply_add(
                        _load(second_stream, at + token * channels, width), share[image, token], value
                    )
                    for k in range(offsets[image, j], offsets[image, j + 1]):
                        t = removed[image, k]
                        value = _multiply_add(_load(second_stream, at + t * channels, width), share[image, t], value)
                elif residual.shape[0] > 0:
                    value = value + _load(second_stream, to + c, width)
                _store(streams, to + c, value, width)
                _store(row, c, value, BLOCK)
                mean += _sum(value)
            mean = mean / f32(channels) if bias.shape[0] > 0 else f32(0)
            for c in range(0, channels, BLOCK):
                _store(row, c, _load(row, c, BLOCK) - mean, min(BLOCK, channels - c))
                square += _dot(row, c, c, BLOCK)
            factor = f32(1) / np.sqrt(square / f32(channels) + eps)
            for c in range(0, channels, BLOCK):
                width = min(BLOCK, channels - c)
                value = _load(row, c, BLOCK) * factor * _load(weight, c, width)
                if bias.shape[0] > 0:
                    value = value + _load(bias, c, width)
                _store(norms, to + c, value, width)


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
