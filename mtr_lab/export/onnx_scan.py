"""The scan and the convolution in operators of ONNX, in as few nodes as possible.

The scan has chunks as in ``mtr_lab.ops.scan_portable``, which run twice: from zero for their last states,
then from the states that these give. This moves a sixth less memory than correcting the states of the first run. The
decay of a chunk is the exponential of a sum, so the bound of the error that is derived there holds with ``STEPS`` · z
in the place of z.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
from onnx import TensorProto
from onnxscript import opset18

from mtr_lab.ops.scan_portable import UNROLLED

op: Any = opset18  # typed for values that are known, not for those of a graph that is being built
Value = Any
"""A value of that graph."""
STEPS = 10
"""Tokens of a chunk. ONNX Runtime is no faster with 16 or 28, which take more nodes; 8 take 4 % longer at batch 8."""


def selective_scan(
    u: Value,
    delta: Value,
    A: Value,
    B: Value,
    C: Value,
    D: Value,
    z: Value | None,
    delta_bias: Value | None,
    order: Value | None,
    gap: Value | None,
    delta_scale: Value | None,
    repeats: Value | None,
    reverse: Sequence[int],
    stats: str,
    implementation: str,
) -> tuple[Value, Value]:
    """Translates ``mtr_lab::selective_scan``; arguments and results as ``mtr_lab.ops.selective_scan``."""
    given, states = u, int(A.shape[2])
    directions, _, length, channels = (u.shape[axis] for axis in range(4))
    u, delta, A, B, C, D = (op.Cast(x, to=TensorProto.FLOAT) for x in (u, delta, A, B, C, D))
    if delta_bias is not None:
        delta_bias = op.Unsqueeze(op.Cast(delta_bias, to=TensorProto.FLOAT), [1, 2])  # (G, 1, 1, E)
        delta = op.Add(delta, delta_bias)
    delta = softplus(delta)
    if delta_scale is not None:
        delta = op.Mul(delta, _column(delta_scale))
    write = op.Mul(delta, u)
    times = None if repeats is None else _column(repeats)  # (B, L, 1)
    span = delta if times is None else op.Mul(delta, times)

    steps = min(STEPS, length)
    chunks = -(-length // steps)
    parts = [span, write, B, C]
    sizes = [channels, channels, states, states]
    if times is not None:
        parts += [delta, op.Expand(times, op.Concat(op.Shape(delta, end=3), [1], axis=0))]
        sizes += [channels, 1]
    read = _in_reading_order(op.Concat(*parts, axis=3), order, reverse, length, chunks * steps)
    if gap is not None:
        filled = _take(op.Transpose(op.Cast(gap, to=TensorProto.FLOAT), perm=[1, 0, 2]), length, chunks * steps)
        read, sizes = op.Concat(read, op.Unsqueeze(filled, [3]), axis=3), [*sizes, 1]
    read = op.Reshape(read, [directions, -1, chunks, steps, 1, sum(sizes)])
    ends = np.cumsum(sizes).tolist()
    span, write, B, C, *others = [
        op.Slice(read, [end - size], [end], [5]) for size, end in zip(sizes, ends, strict=True)
    ]
    column = op.Transpose(B, perm=[0, 1, 2, 3, 5, 4])  # (G, B, chunks, steps, N, 1)
    split = [_split(x, steps, 3) for x in (span, write, C, column, *others)]
    exponent = op.Unsqueeze(op.Transpose(A, perm=[0, 2, 1]), [1, 2, 3])  # (G, 1, 1, 1, N, E)
    idle = None
    if gap is not None:
        assert delta_bias is not None
        idle = op.Mul(op.Unsqueeze(softplus(delta_bias), [3, 4]), exponent)

    def decays_and_updates() -> Iterator[tuple[Value, Value]]:
        for span_t, write_t, _, B_t, *others_t in zip(*split, strict=True):
            logarithm, update = op.Mul(span_t, exponent), op.Mul(write_t, B_t)
            if idle is not None:
                logarithm = op.Add(logarithm, op.Mul(others_t.pop(), idle))
            if times is not None:
                update = op.Mul(update, _growth(op.Mul(others_t[0], exponent), others_t[1]))
            yield op.Exp(logarithm), update

    total_span = op.Mul(op.ReduceSum(span, [3]), exponent)
    if idle is not None:
        total_span = op.Add(total_span, op.Mul(op.ReduceSum(others[-1], [3]), idle))
    reached = _recurrence(decays_and_updates(), op.Exp(total_span), chunks, (directions, states, channels))
    outputs = [op.MatMul(C_t, state) for C_t, state in zip(split[2], reached, strict=True)]
    y = op.Reshape(op.Concat(*outputs, axis=3), [directions, -1, chunks * steps, channels])
    y = _in_token_order(y, order, reverse, length)
    y = op.Add(y, op.Mul(op.Unsqueeze(D, [1, 2]), u))

    sums = [op.ReduceSum(_term(name, span, delta, u, y, times), [3], keepdims=1) for name in stats.split()]
    emitted = op.Concat(*sums, axis=3) if sums else op.Slice(y, [0], [0], [3])
    total = reduce(op.Add, _split(y, directions, 0))  # ReduceSum over an outer axis takes three times as long
    total = op.Squeeze(total, [0])
    if z is not None:
        z = op.Cast(z, to=TensorProto.FLOAT)
        total = op.Mul(total, op.Mul(z, op.Sigmoid(z)))
    return op.CastLike(total, given), emitted


def causal_conv1d(x: Value, weight: Value, bias: Value, reverse: Sequence[int], implementation: str) -> Value:
    """Translates ``mtr_lab::causal_conv1d``: a sum of shifted products, whose shifts both directions share."""
    length, width = x.shape[1], weight.shape[2]
    weight, bias = (op.CastLike(op.Unsqueeze(t, [1, 2]), x) for t in (weight, bias))  # (G, 1, 1, E, W), (G, 1, 1, E)
    padded = op.Pad(x, [0, width - 1, 0, 0, width - 1, 0])
    shifted = [op.Slice(padded, [k], [k + length], [1]) for k in range(2 * width - 1)]
    outputs = []
    for g, backward in enumerate(reverse):
        first, taps = (width - 1, range(width)[::-1]) if backward else (0, range(width))
        products = [
            op.Mul(shifted[first + place], op.Squeeze(op.Slice(weight, [g, tap], [g + 1, tap + 1], [0, 4]), [4]))
            for place, tap in enumerate(taps)
        ]
        outputs.append(reduce(op.Add, products))
    y = op.Add(op.Concat(*outputs, axis=0) if len(outputs) > 1 else outputs[0], bias)
    return op.Mul(y, op.Sigmoid(y))


def _term(name: str, span: Value, delta: Value, u: Value, y: Value, times: Value | None) -> Value:
    """The term of a statistic, summed over channels."""
    whole = delta if times is None else op.Mul(delta, times)
    if name == "delta":
        return whole
    if name == "write":
        written = op.Mul(whole, u)
        return op.Mul(written, written)
    return op.Relu(y)  # output


def _column(x: Value) -> Value:
    """(B, L) -> (B, L, 1) in float32."""
    return op.Unsqueeze(op.Cast(x, to=TensorProto.FLOAT), [2])


def _in_reading_order(x: Value, order: Value | None, reverse: Sequence[int], tokens: int, length: int) -> Value:
    """(G, B, tokens, K) -> (G, B, length, K): filled up with the last token, whose states nobody reads."""
    if order is not None:
        return _take(op.GatherElements(x, _rows(order, x), axis=2), tokens, length)
    if not any(reverse):
        return _take(x, tokens, length)
    places = np.minimum(np.arange(length), tokens - 1)
    directions = _split(x, len(reverse), 0)
    read = [
        op.Gather(part, _integers(tokens - 1 - places if r else places), axis=2)
        for part, r in zip(directions, reverse, strict=True)
    ]
    return op.Concat(*read, axis=0) if len(read) > 1 else read[0]


def _in_token_order(y: Value, order: Value | None, reverse: Sequence[int], length: int) -> Value:
    """The inverse of ``_in_reading_order``."""
    if order is not None:
        places = op.Slice(y, [0], [length], [2])
        return op.ScatterElements(places, _rows(order, places), places, axis=2)
    if not any(reverse):
        return op.Slice(y, [0], [length], [2])
    places = np.arange(length)
    directions = _split(y, len(reverse), 0)
    back = [
        op.Gather(part, _integers(places[::-1] if r else places), axis=2)
        for part, r in zip(directions, reverse, strict=True)
    ]
    return op.Concat(*back, axis=0) if len(back) > 1 else back[0]


def _take(x: Value, tokens: int, length: int) -> Value:
    """(G, B, tokens, …) -> (G, B, length, …), filled up with the last token."""
    places = np.minimum(np.arange(length), tokens - 1)
    return x if tokens == length else op.Gather(x, _integers(places), axis=2)


def _rows(order: Value, x: Value) -> Value:
    """order (G, B, L) -> the same index for each channel of x (G, B, L, K)."""
    return op.Expand(op.Unsqueeze(order, [3]), op.Shape(x))


def _split(x: Value, count: int, axis: int) -> Sequence[Value]:
    """The slices of width 1 along an axis."""
    return [x] if count == 1 else op.Split(x, axis=axis, num_outputs=count)


def _growth(product: Value, times: Value) -> Value:
    """Σ_{k < times} exp(k · product), see ``mtr_lab.ops.scan_reference.growth``."""
    product = op.Min(product, _number(-float(np.finfo(np.float32).eps ** 2)))
    return op.Div(expm1(op.Mul(times, product)), expm1(product))


def softplus(x: Value) -> Value:
    """log(1 + exp(x)) = max(x, 0) + log(1 + t), t = exp(-|x|); ONNX Runtime computes Softplus itself four times slower.

    log(1 + t) is the logarithm of u = 1 + t rounded, and (t - (u - 1)) / u for what was rounded away; leaving out the
    division by u, which is 1 to 2, changes the sum by at most one more rounding.
    """
    t = op.Exp(op.Neg(op.Abs(x)))
    u = op.Add(t, _number(1))
    rest = op.Sub(t, op.Sub(u, _number(1)))
    return op.Add(op.Relu(x), op.Add(op.Log(u), rest))


def expm1(x: Value) -> Value:
    """exp(x) - 1 without cancellation: tanh(x / 2) · (exp(x) + 1)."""
    return op.Mul(op.Tanh(op.Mul(x, _number(0.5))), op.Add(op.Exp(x), _number(1)))


def _recurrence(
    steps: Iterable[tuple[Value, Value]], total: Value | None, chunks: int, sizes: tuple[int, int, int]
) -> list[Value]:
    """h = decay · h + update in every chunk, and on from chunk to chunk; (G, B, chunks, 1, N, E) for each step.

    The chunks' last states are computed from zero, then all states from the true ones before the chunks.

    Args:
        total: the product of the decays of all steps; ``None`` to compute it.
        sizes: G, N and E.
    """
    steps = list(steps)
    if chunks == 1:
        return _reached(steps, None)
    if total is None:
        total = reduce(op.Mul, (decay for decay, _ in steps))
    return _reached(steps, _before(total, _reached(steps, None)[-1], chunks - 1, sizes))


def _reached(steps: Iterable[tuple[Value, Value]], state: Value | None) -> list[Value]:
    """The state after each step; from zero if ``state`` is None."""
    states = []
    for decay, update in steps:
        state = update if state is None else op.Add(op.Mul(decay, state), update)
        states.append(state)
    return states


def _before(decay: Value, update: Value, chunks: int, sizes: tuple[int, int, int]) -> Value:
    """The state before each chunk, given what the tokens of all ``chunks`` but the last do to a state."""
    if chunks <= UNROLLED:
        states: list[Value] = []
        pairs = zip(_split(decay, chunks + 1, 2), _split(update, chunks + 1, 2), strict=True)
        for decay_c, update_c in list(pairs)[:chunks]:
            states.append(op.Add(op.Mul(decay_c, states[-1]), update_c) if states else update_c)
        before = op.Concat(*states, axis=2) if chunks > 1 else states[0]
    else:
        directions, *inner = sizes
        outer = -(-chunks // STEPS)
        steps = []
        places = _integers(np.minimum(np.arange(outer * STEPS), chunks - 1))  # the last of all chunks is left out
        for x in (decay, update):
            filled = op.Gather(x, places, axis=2)
            steps.append(_split(op.Reshape(filled, [directions, -1, outer, STEPS, *inner]), STEPS, 3))
        reached = op.Concat(*_recurrence(zip(*steps, strict=True), None, outer, sizes), axis=3)
        joined = op.Reshape(reached, [directions, -1, outer * STEPS, 1, *inner])
        before = op.Slice(joined, [0], [chunks], [2])
    return op.Pad(before, [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])


def _number(value: float) -> Value:
    return op.Constant(value_float=float(value))


def _integers(values: Any) -> Value:
    return op.Constant(value_ints=[int(value) for value in values])
