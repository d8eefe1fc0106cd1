"""Convolution and projections of few tokens in one launch, against plain PyTorch in float64."""

import pytest
import torch
from covering import parametrize_covering

from mtr_lab import ops
from mtr_lab.ops.convolution import causal_conv1d_reference
from mtr_lab.ops.convolution_unmerged import causal_conv1d_unmerged_reference
from mtr_lab.ops.gpu import project, project_few
from mtr_lab.ops.packed import PackedWeights

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def packed(directions, channels, rank, states, dtype, generator):
    shapes = (channels, 1, 4), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,)
    fields = (
        torch.randn(directions, *shape, generator=generator) for shape in (*shapes, (channels, states), (channels,))
    )
    return ops.pack(ops.MambaWeights(*(0.3 * field for field in fields)), dtype)


@parametrize_covering(
    sizes=[(1, 1, 20), (3, 7, 40), (1, 37, 300), (2, 17, 130)],  # images, tokens, channels
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    reverse=[(False, True), (True,), (True, False, False)],
    part=["plain", "delta_scale", "repeats", "unmerged"],
    stats=[(), ("delta",), ("write", "delta")],
    num_sms=[1, 200],  # with many, programs share channels
)
def test_equals_float64(sizes, dtype, reverse, part, stats, num_sms, monkeypatch):
    monkeypatch.setattr(project_few, "MAX_TOKENS", 10**6)
    monkeypatch.setattr(project_few, "CHANNELS", 64)
    monkeypatch.setattr(project_few, "num_sms", lambda device: num_sms)
    images, length, channels = sizes
    generator = torch.Generator(torch.get_default_device()).manual_seed(length)
    weights = packed(len(reverse), channels, 5, 3, dtype, generator)
    x = torch.randn(images, length, 2 * channels, generator=generator).to(dtype)[..., :channels]
    size = torch.randint(1, 4, (images, length), generator=generator).float()
    source = torch.arange(length).repeat_interleave(2)[None].repeat(images, 1)
    source[:, 5::7] = -1
    positions = {"index": torch.arange(0, 2 * length, 2)[None].repeat(images, 1), "source": source}
    options = {"repeats": {"repeats": size}, "unmerged": positions}.get(part, {})
    scale = size.sqrt() if part == "delta_scale" else None
    u, delta, projected, sums = project.project(x, weights, scale, reverse, stats, **options)

    exact = PackedWeights(*(field.double() for field in weights))
    conv = exact.conv_weight.mT, exact.conv_bias
    if part == "unmerged":
        expected = causal_conv1d_unmerged_reference(x.double(), *conv, *positions.values(), reverse)
    else:
        expected = causal_conv1d_reference(x.double(), *conv, reverse)
    assert relative(u, expected) < TOLERANCE[dtype]
    expected = torch.einsum("gble,gek->gblk", u.double(), exact.projection)
    assert relative(projected, expected) < 1e-5
    low_rank = projected[..., : exact.timescale.shape[1]].to(dtype).double()
    raw = torch.einsum("gblr,gre->gble", low_rank, exact.timescale) + exact.timescale_bias[:, None, None]
    expected = torch.nn.functional.softplus(raw)
    if scale is not None:
        expected = expected * scale.double()[..., None]
    assert relative(delta, expected) < TOLERANCE[dtype]
    whole = expected * size.double()[..., None] if part == "repeats" else expected
    terms = {"delta": whole.sum(-1), "write": (whole * u.double()).square().sum(-1)}
    assert sums.shape == (*u.shape[:3], len(stats))
    for i, name in enumerate(stats):
        assert relative(sums[..., i], terms[name]) < TOLERANCE[dtype]


def test_many_tokens_take_three_launches(monkeypatch):
    monkeypatch.setattr(project_few, "MAX_TOKENS", 16)
    monkeypatch.setattr(project_few, "project_few", lambda *_: pytest.fail("used"))
    weights = packed(1, 8, 2, 2, torch.float32, None)
    u, *_ = project.project(torch.randn(1, 17, 8), weights, None, (False,), ())
    assert u.shape == (1, 1, 17, 8)
