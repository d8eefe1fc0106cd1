"""Convolution with x_proj in one launch, against float64."""

import pytest
import torch

from mtr_lab import ops
from mtr_lab.ops.convolution import causal_conv1d_reference
from mtr_lab.ops.convolution_unmerged import causal_conv1d_unmerged_reference
from mtr_lab.ops.gpu import conv_project, conv_window, project

WIDTH = 4
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(directions, images, length, channels, rank, states, dtype):
    generator = torch.Generator(torch.get_default_device()).manual_seed(channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = ops.MambaWeights(
        normal(directions, channels, 1, WIDTH), normal(directions, channels),
        normal(directions, rank + 2 * states, channels) * channels**-0.5, normal(directions, channels, rank),
        normal(directions, channels) - 2, normal(directions, channels, states), normal(directions, channels),
    )  # fmt: skip
    index = torch.arange(length).expand(images, -1) * 2 + 1
    source = torch.randint(-1, length, (images, 2 * length + 3), generator=generator)
    xz = normal(images, length, 2 * channels).to(dtype)
    return xz, weights, index, source


@pytest.mark.parametrize(
    ("sizes", "reverse", "dtype"),
    [
        ((2, 7, 70, 3, 5), (False, True), torch.float32),
        ((1, 9, 40, 17, 16), (True, False, True), torch.float16),
        ((3, 65, 33, 33, 2), (True,), torch.float32),
        ((1, 1, 64, 4, 8), (False, True), torch.bfloat16),
        ((70, 1, 16, 2, 2), (False, True), torch.float32),  # tiles that span images
        ((23, 3, 16, 2, 2), (False, True), torch.float32),
    ],
)
def test_equals_the_composition(sizes, reverse, dtype):
    xz, weights, index, source = inputs(len(reverse), *sizes, dtype)
    packed = ops.pack(weights, dtype)
    x = xz.chunk(2, dim=-1)[0]
    u, projected = conv_project.convolve_project(x, packed, [int(r) for r in reverse], index, source)
    conv = packed.conv_weight.double().transpose(1, 2), packed.conv_bias.double()
    expected = causal_conv1d_unmerged_reference(x.double(), *conv, index, source, reverse)
    assert u.dtype == dtype
    assert (u - expected).norm() < TOLERANCE[dtype] * expected.norm()
    exact = torch.einsum("gble,ger->gblr", u.double(), packed.projection.double())
    assert projected.dtype == torch.float32
    assert (projected - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("sizes", "reverse", "dtype", "tile"),
    [
        ((2, 27, 70, 3, 5), (False, True), torch.float32, (2, 16)),  # runs that overlap
        ((1, 9, 40, 17, 16), (True, False, True), torch.float16, (1, 16)),
        ((3, 65, 33, 33, 2), (True,), torch.float32, (4, 32)),
        ((1, 1, 64, 4, 8), (False, True), torch.bfloat16, (4, 16)),
        ((2, 26, 150, 4, 8), (False, True), torch.float16, (2, 16)),  # runs as long as a window allows
        ((2, 2, 16, 2, 2), (False, True), torch.float32, (4, 32)),  # fewer tokens than runs
    ],
)
def test_of_neighbouring_tokens_equals_the_composition(sizes, reverse, dtype, tile, monkeypatch):
    monkeypatch.setitem(conv_window.TILES, sizes[2], conv_window.Tile(*tile, channels=32, warps=4, registers=128))
    xz, weights, *_ = inputs(len(reverse), *sizes, dtype)
    packed = ops.pack(weights, dtype)
    x = xz.chunk(2, dim=-1)[0]
    u, projected = conv_window.convolve_window(x, packed, [int(r) for r in reverse])
    conv = packed.conv_weight.double().transpose(1, 2), packed.conv_bias.double()
    expected = causal_conv1d_reference(x.double(), *conv, reverse)
    assert u.dtype == dtype
    assert (u - expected).norm() < TOLERANCE[dtype] * expected.norm()
    exact = torch.einsum("gble,ger->gblr", u.double(), packed.projection.double())
    assert projected.dtype == torch.float32
    assert (projected - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("channels", conv_window.TILES)
def test_tiles_in_use(channels):
    xz, weights, *_ = inputs(2, 1, 61, channels, channels // 32, 16, torch.float16)
    packed = ops.pack(weights, torch.float16)
    x = xz.chunk(2, dim=-1)[0]
    u, projected = conv_window.convolve_window(x, packed, [0, 1])
    expected = causal_conv1d_reference(
        x.double(), packed.conv_weight.double().transpose(1, 2), packed.conv_bias.double(), (False, True)
    )
    assert (u - expected).norm() < TOLERANCE[torch.float16] * expected.norm()
    exact = torch.einsum("gble,ger->gblr", u.double(), packed.projection.double())
    assert (projected - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("form", [conv_window, conv_project])
def test_where_it_is_used(form) -> None:
    assert form.fits(form.MIN_TOKENS, 768, torch.float16)
    assert not form.fits(form.MIN_TOKENS - 1, 768, torch.float16)
    assert not form.fits(form.MIN_TOKENS, 768, torch.float32)
    assert not form.fits(form.MIN_TOKENS, 770, torch.float16)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("extra", ["delta_scale", "repeats"])
def test_of_a_large_batch(extra, merged, monkeypatch):
    """The mixer with one launch equals the mixer with two."""
    xz, weights, index, source = inputs(2, 2, 7, 70, 3, 5, torch.float16)
    options = {"reverse": (False, True), "stats": ("write",)}
    if not merged:
        options |= {"index": index, "source": source}
    options[extra] = torch.randint(1, 4, index.shape).float()
    with torch.no_grad(), ops.use_backend("triton"):
        two, sums, *_ = ops.mamba_inner(xz, weights, **options)
        monkeypatch.setattr(conv_project, "MIN_TOKENS", 14)
        monkeypatch.setattr(conv_project, "WIDTHS", (70,))
        monkeypatch.setattr(conv_window, "MIN_TOKENS", 14)
        monkeypatch.setitem(conv_window.TILES, 70, conv_window.TILES[384])
        monkeypatch.setattr(project, "convolve_unmerged", None)
        monkeypatch.setattr(project, "_convolve", None)
        one, same, *_ = ops.mamba_inner(xz, weights, **options)
    assert (one.double() - two.double()).norm() < 2e-3 * two.double().norm()
    assert (sums - same).norm() < 2e-3 * same.norm()
