"""Compile every kernel without a GPU: ``python compile_kernels.py cuda 90`` or ``hip gfx942``.

The interpreter accepts programs that the compiler rejects. Here the callers of kernels run on CPU tensors, and every
launch is replaced by a compilation. Prints the names of the kernels.
"""

import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mtr_lab import ops
from mtr_lab.ops.scan_inputs import ScanInputs

BOTH = (False, True)
compiled: set[str] = set()
launch = JITFunction.run


def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
    compiled.add(kernel.__name__)
    return launch(kernel, *args, grid=grid, warmup=True, **options)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def main(backend: str, arch: str) -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    JITFunction.run = compile_only
    if backend == "hip":
        torch.version.hip = "of a ROCm build"  # tells the kernels that the backend is HIP
    from mtr_lab.ops.gpu import (
        conv,
        conv_grid,
        conv_project,
        conv_window,
        decision,
        embedding,
        metadata,
        mixer_read,
        mixer_training,
        mixer_weights,
        neighbours,
        norm,
        norm_backward,
        project,
        scan,
        scan_backward,
        scan_by_step,
        scan_chunks,
        scan_tiles,
    )

    scan.fits_together = lambda *_: False
    mixer_read.FEW = 0
    # Unrolling twice as much takes the compiler four times as long, for the same code.
    scan.UNROLL = scan.UNROLL_HALF = scan_chunks.UNROLL = scan_backward.FORWARDS = 2
    vectors = [normal(2, 64) for _ in range(3)]
    weights = ops.MambaWeights(
        normal(2, 64, 1, 4), vectors[0], normal(2, 36, 64), normal(2, 64, 4), vectors[1], normal(2, 64, 16), vectors[2]
    )
    packed = ops.pack(weights, torch.bfloat16)
    tuned = project._convolve, project._timescales
    choices = [kernel.configs for kernel in tuned]
    for i in range(max(map(len, choices))):  # one configuration at a time: they cannot be timed here
        for kernel, configs in zip(tuned, choices, strict=True):
            kernel.configs = [configs[i % len(configs)]]
        torch.ops.mtr_lab.mamba_inner(normal(1, 8, 128), *packed, *(None,) * 5, [0, 1], 4, 16, "", 1.0, "triton")
        project.project(normal(1, 8, 64), packed, torch.ones(1, 8), BOTH, ("delta", "write"))

    positions = torch.arange(8)[None], torch.zeros(1, 16, dtype=torch.int64)
    project.project(normal(1, 8, 64), packed, None, BOTH, ("delta",), repeats=torch.ones(1, 8))
    project.project(normal(1, 8, 64), packed, None, BOTH, (), index=positions[0], source=positions[1])
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, 8, 64, dtype=dtype)
        conv_project.convolve_project(x, ops.pack(weights, dtype), BOTH, *positions)
        conv_window.TILES[64] = conv_window.TILES[384]
        conv_window.convolve_window(x, ops.pack(weights, dtype), BOTH)
        x, read, kept = (
            torch.randn(1, 8, 64, dtype=dtype),
            torch.zeros(1, 1, dtype=torch.int64),
            ops.pack(weights, dtype),
        )
        for scale, repeats in ((torch.ones(1, 8), None), (None, torch.ones(1, 8))):
            gap, places = (None, (None, None)) if scale is None else (torch.zeros(1, 2, 8), positions)
            mixer_read.mamba_inner_read(x, x[:, :1], read, kept, gap, scale, repeats, *places, 0.5)
    mixer_read.FEW = 1  # the kernels for few images, with x, read and kept of float32
    mixer_read.mamba_inner_read(x, x[:, :1], read, kept, None, None, repeats, *positions, 0.5)
    mixer_read.mamba_inner_read(x, x[:, :1], read, kept, torch.zeros(1, 2, 8), torch.ones(1, 8), None, None, None, 0.5)
    for xz in (normal(1, 9, 128), torch.randn(1, 9, 128)):
        packed = ops.pack(weights, xz.dtype)
        y, _, projected, saved = mixer_training.forward(xz, packed, BOTH, ("output",), 0.5)
        mixer_training.backward(xz, packed, projected, saved, BOTH, 4, 16, 0.5, y, projected)
        mixer_weights.pack(xz, weights)

    length = 512  # chunks and segments
    data = [normal(2, 1, length, 64), normal(2, 1, length, 64), -normal(2, 64, 16).exp()]
    data += [normal(2, 1, length, 16), normal(2, 1, length, 16), normal(2, 64), normal(1, length, 64)]
    inputs = ScanInputs(*data, normal(2, 64), None, torch.zeros(1, 2, length), torch.ones(1, length), None, BOTH)
    for width in (32, None):  # None stays set for the calls below
        scan.half_width = lambda *_, width=width: width
        scan.selective_scan(inputs, ops.STATS)
        scan.selective_scan(inputs._replace(delta_scale=None, repeats=torch.ones(1, length)), ())
    scan_backward.selective_scan_backward(inputs, normal(1, length, 64))
    scan.fits_together = lambda *_: True
    scan.selective_scan(inputs, ())
    scan.selective_scan(inputs._replace(delta_scale=None, repeats=torch.ones(1, length), gap=None), ())
    scan.fits_together = lambda *_: False
    ordered = inputs._replace(order=torch.zeros(2, 1, length, dtype=torch.int64), reverse=(0, 0))
    scan.selective_scan(ordered, ops.STATS)
    scan_backward.selective_scan_backward(ordered, normal(1, length, 64))
    for length in (8, 512):  # one direction, no optional input, threads without a channel
        single = torch.randn(1, 1, length, 33)
        b_and_c = torch.randn(2, 1, 1, length, 5)
        plain = ScanInputs(single, single, -torch.ones(1, 33, 5), *b_and_c, torch.ones(1, 33), reverse=(1,))
        scan.selective_scan(plain, ())
        scan_backward.selective_scan_backward(plain, single[0])

    x, weight, bias = normal(1, 8, 64), normal(2, 64, 4), normal(2, 64)
    conv.causal_conv1d(x, weight, bias, BOTH)
    conv.causal_conv1d_backward(x, weight, bias, BOTH, normal(2, 1, 8, 64))

    for width in (3, 7):
        conv_grid.convolve(
            normal(1, 16, 64).mT.unflatten(2, (4, 4)), normal(64, 1, width, width), normal(64), silu=True
        )
    paths, scale = torch.zeros(4, 1, 8, dtype=torch.int64), torch.ones(1, 8)
    rows, vector = normal(1, 8, 64), torch.randn(4, 64)
    for dtype, states, rank, gap, factor in ((torch.bfloat16, 1, 6, None, None), (torch.float32, 2, 20, paths, scale)):
        low, weight = torch.randn(4, 1, 8, rank + 2 * states, dtype=dtype), torch.randn(4, 64, rank, dtype=dtype)
        a, missing = torch.randn(4, 64, states), None if gap is None else gap.view(1, 4, 8)
        for stats in ((), ops.STATS):
            after = (None, None) if gap is None else (vector[0], vector[0])
            options = {"eps": 1e-5, "repeats": True, "stats": stats}
            scan_tiles.scan(rows.to(dtype), low, weight, a, vector, vector, paths, missing, factor, *after, **options)
    for dtype, channels in ((torch.bfloat16, 64), (torch.float32, 40)):
        u, bc = torch.randn(1, 8, channels, dtype=dtype), torch.randn(1, 8, 4, 16, dtype=dtype)
        d = torch.randn(channels)
        scan_by_step.scan(u, u, torch.randn(16, channels), bc, bc[:, :, 0], d, d, paths[:, 0], u, ops.STATS)

    for size, width in ((16, 384), (14, 24)):
        parameters = normal(width, 3, size, size), normal(width), normal(1, 1, width), normal(1, 5, width)
        embedding.patch_tokens(normal(1, 3, 2 * size, 2 * size), *parameters, 2)

    for length, remove, merge in ((5, 1, True), (32, 3, True), (32, 3, False), (1200, 100, True)):
        hidden, residual, size = normal(1, length, 64), torch.randn(1, length, 64), torch.ones(1, length)
        index, special = torch.arange(length)[None], torch.zeros(1, 1, dtype=torch.int64)
        features = (hidden, residual) if merge else (None, None)
        dest, share, keep, removed, offsets, *_ = decision.asymmetric_plan(
            ops.DecisionInputs(
                torch.rand(1, 2, length), 2.0, index, size, special, *features, remove, length // 2, merge
            )
        )
        for axes, weight in (((length,), None), ((8, length // 8), size), ((2, 4, length // 8), size)):
            neighbours.neighbour_plan(
                ops.NeighbourInputs(
                    index, size, special, weight, hidden if merge else None, residual, remove, merge, axes
                )
            )
        norm.norm_add(hidden, residual, torch.ones(64), None, 1e-5, keep, *(share, removed, offsets) * 2)
        norm.norm_add(hidden[:, remove:], residual, torch.ones(64), None, 1e-5, keep, *(share, removed, offsets) * 2)
        norm.apply_plan(hidden, share, keep, removed, offsets)
        metadata.update_metadata(index, size, special, dest, keep, removed)
        metadata.follow(dest, index)
    norm.norm_add(hidden, None, torch.ones(64), None, 1e-5, *(None,) * 7)
    norm.norm_add(hidden, None, torch.ones(64), torch.zeros(64), 1e-5, *(None,) * 7)
    for bias in (None, torch.zeros(64)):
        total = torch.randn(hidden.shape)
        norm_backward.norm_add_backward(total, torch.ones(64), bias, 1e-5, hidden, total, residual=True)
    print(triton.__version__, *sorted(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
