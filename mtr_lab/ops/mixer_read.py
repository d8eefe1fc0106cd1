"""The Mamba mixer without in_proj and out_proj, for a few tokens whose output is read: those before a head.

For one such token the scans run up to it: forwards from the first token, backwards from the last. Of a sequence of L
tokens the two directions read L + 1 together, wherever the token is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.convolution import causal_conv1d
from mtr_lab.ops.convolution_unmerged import take_rows
from mtr_lab.ops.mixer import project
from mtr_lab.ops.packed import MambaWeights, PackedCache, PackedWeights, pack, stacked
from mtr_lab.ops.registry import Implementation, Operation, operator
from mtr_lab.ops.scan import REPEAT_FLOPS, selective_scan

STATE_FLOPS, OUTPUT_FLOPS = 7, 2
"""Of the 9 FLOPs of a scan for each token, channel and state: those of the state, and those of the product with C."""


def mamba_inner_read(
    x: Tensor,
    z: Tensor,
    read: Tensor,
    weights: MambaWeights,
    *,
    reverse: Sequence[bool],
    order: Tensor | None = None,
    gap: Tensor | None = None,
    delta_scale: Tensor | None = None,
    repeats: Tensor | None = None,
    index: Tensor | None = None,
    source: Tensor | None = None,
    scale: float = 1.0,
    packed: PackedCache | None = None,
) -> Tensor:
    """``mamba_inner`` for the output of some tokens alone. Differentiable in ``x``, ``z`` and ``weights``.

    Kernels compute what one token needs of a forward and a backward direction. With gradients, for several tokens, with
    an order and in exported graphs, all tokens are scanned.

    Args:
        x: (B, L, E), the first half of the output of in_proj.
        z: (B, S, E), the second half for the tokens that are read.
        read: (B, S) int64, their positions. They are not checked: wrong ones would be read out of bounds.
        weights, reverse, order, gap, delta_scale, repeats, index, source, scale, packed: as in ``mamba_inner``.

    Returns:
        (B, S, E) in the dtype of ``x``.

    Raises:
        UserError: as ``selective_scan``.
    """
    tokens = {"gap": gap, "delta_scale": delta_scale, "repeats": repeats, "index": index, "source": source}
    return MAMBA_INNER_READ(x, z, read, weights, packed, scale, reverse=reverse, order=order, **tokens)


def reads_one_token(tokens: int, reverse: Sequence[bool]) -> bool:
    """Whether kernels can read this number of tokens: one, of a forward and a backward direction, in this order."""
    return tokens == 1 and [bool(r) for r in reverse] == [False, True]


def gated(y: Tensor, z: Tensor, read: Tensor, scale: float) -> Tensor:
    """The output y (B, L, E) of a scan without a gate, at positions ``read`` (B, S), gated by z (B, S, E)."""
    return take_rows(y, read) * F.silu(z) * scale


def _composed(
    x: Tensor,
    z: Tensor,
    read: Tensor,
    weights: MambaWeights,
    packed: PackedCache | None,
    scale: float,
    *,
    reverse: Sequence[bool],
    index: Tensor | None,
    source: Tensor | None,
    **options: Any,
) -> Tensor:
    """All tokens, one operation after the other."""
    if packed is not None:
        packed.clear()
    conv = stacked(weights.conv_weight).squeeze(2), stacked(weights.conv_bias)
    u = causal_conv1d(x, *conv, reverse=reverse, index=index, source=source)
    x_proj, dt_proj = stacked(weights.x_proj).transpose(1, 2), stacked(weights.dt_proj).transpose(1, 2)
    delta, _, b, c = project(u, x_proj, dt_proj, weights.states)
    bias = stacked(weights.dt_bias)
    y, _ = selective_scan(u, delta, weights.A, b, c, stacked(weights.D), delta_bias=bias, reverse=reverse, **options)
    return gated(y, z, read, scale)


def _by_kernels(
    x: Tensor,
    z: Tensor,
    read: Tensor,
    weights: MambaWeights,
    packed: PackedCache | None,
    scale: float,
    *,
    implementation: str,
    reverse: Sequence[bool],
    order: None,
    **tokens: Tensor | None,
) -> Tensor:
    kernel_weights = pack(weights, x.dtype) if packed is None else packed.get(weights, x.dtype)
    return _mamba_inner_read(
        x, z, read, *kernel_weights, *tokens.values(), weights.rank, weights.states, scale, implementation
    )


def _unfit(
    x: Tensor,
    z: Tensor,
    read: Tensor,
    *inputs: Any,
    reverse: Sequence[bool],
    order: Tensor | None,
    **tokens: Tensor | None,
) -> str:
    if order is not None or not reads_one_token(read.shape[1], reverse):
        return "reads one token, forwards and backwards"
    return "has no gradient of the mixer that is read" if torch.is_grad_enabled() else ""


MAMBA_INNER_READ = Operation(
    "mamba_inner_read",
    [
        Implementation("triton", partial(_by_kernels, implementation="triton"), unfit=_unfit, package="triton"),
        Implementation("cpu", partial(_by_kernels, implementation="cpu"), unfit=_unfit, more=(torch.bfloat16,)),
        Implementation("reference", _composed),
    ],
)


def _run(*arguments: Any) -> Tensor:
    if arguments[-1] == "cpu":
        from mtr_lab.ops.cpu import mixer_read as on_cpu

        return on_cpu.mamba_inner_read(*_unpack(*arguments))
    from mtr_lab.ops.gpu import mixer_read

    return mixer_read.mamba_inner_read(*_unpack(*arguments))


def _unpack(*arguments: Any) -> tuple[Any, ...]:
    """x, z, read, packed weights, the arguments from gap to source, scale."""
    x, z, read, *rest = arguments
    return x, z, read, PackedWeights(*rest[:7]), *rest[7:12], rest[14]


def _in_plain_pytorch(*arguments: Any) -> Tensor:
    """The kernels' function on packed weights, for all tokens; padded states stay zero."""
    x, z, read, weights, gap, delta_scale, repeats, index, source, scale = _unpack(*arguments)
    reverse = False, True
    u = causal_conv1d(x, weights.conv_weight.mT, weights.conv_bias, reverse=reverse, index=index, source=source)
    delta, _, b, c = project(u, weights.projection, weights.timescale, weights.a.shape[1])
    a, options = weights.a.mT, {"gap": gap, "delta_scale": delta_scale, "repeats": repeats}
    y, _ = selective_scan(u, delta, a, b, c, weights.d, delta_bias=weights.timescale_bias, reverse=reverse, **options)
    return gated(y, z, read, scale)


_mamba_inner_read = operator(
    "mamba_inner_read",
    "(Tensor x, Tensor z, Tensor read, Tensor conv_weight, Tensor conv_bias, Tensor projection, Tensor timescale, "
    "Tensor timescale_bias, Tensor a, Tensor d, Tensor? gap, Tensor? delta_scale, Tensor? repeats, Tensor? index, "
    "Tensor? source, int rank, int states, float scale, str implementation) -> Tensor",
    run=_run,
    fake=lambda x, z, *rest: z.new_empty(z.shape),
    decomposition=_in_plain_pytorch,
)


@register_flop_formula(torch.ops.mtr_lab.mamba_inner_read)
def mamba_inner_read_flops(  # type: ignore[no-untyped-def]
    x_shape, z_shape, read_shape, conv_shape, conv_bias, projection, timescale, timescale_bias, a, d, gap, delta_scale,
    repeats, index, source, rank, states, *args, out_shape=None, **kwargs
) -> int:  # fmt: skip
    """L + 1 tokens in convolution, projections and state, and one token in each direction for output and skip."""
    _, width, channels = conv_shape
    images, length, _ = x_shape
    products = 2 * (width + rank + 2 * states + rank)
    each_state = STATE_FLOPS + (REPEAT_FLOPS if repeats else 0)
    output = 2 * (OUTPUT_FLOPS * states + 2)
    return images * channels * ((length + 1) * (products + each_state * states) + output)
