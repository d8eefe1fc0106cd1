"""The mixer for one token that is read, against the whole mixer in float64."""

import torch
from covering import parametrize_covering

from mtr_lab import ops
from mtr_lab.ops.gpu import mixer_read

BOTH = (False, True)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def inputs(images, length, channels, states, dtype, part):
    generator = torch.Generator(torch.get_default_device()).manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).double()

    rank = 5
    shapes = (channels, 1, 4), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,)
    shapes = *shapes, (channels, states), (channels,)
    weights = ops.MambaWeights(*(0.3 * normal(2, *shape).to(dtype).double() for shape in shapes))
    size = torch.randint(1, 4, (images, length), generator=generator).float()
    gap = torch.randint(0, 3, (images, 2, length), generator=generator)
    source = torch.arange(length).repeat_interleave(2)[None].repeat(images, 1)
    source[:, 5::7] = -1
    options = {
        "plain": {},
        "scaled": {"delta_scale": size.sqrt()},
        "runs": {"repeats": size},
        "aligned": {"gap": gap},
        "unmerged": {"index": torch.arange(0, 2 * length, 2)[None].repeat(images, 1), "source": source},
    }[part]
    read = torch.linspace(0, length - 1, images).long()[:, None]
    return normal(images, length, channels), normal(images, 1, channels), read, weights, options


@parametrize_covering(
    length=[1, 7, 33, 70],
    channels=[24, 130],
    states=[3, 16],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    part=["plain", "scaled", "runs", "aligned", "unmerged"],
    few=[True, False],
)
@torch.no_grad()
def test_equals_the_whole_mixer(length, channels, states, dtype, part, few, monkeypatch):
    monkeypatch.setattr(mixer_read, "FEW", 3 if few else 0)
    check(length, channels, states, dtype, part)


@torch.no_grad()
def test_more_states_than_a_program_of_few_images_has_threads_for():
    check(2, 8, 300, torch.float32, "plain")


def check(length, channels, states, dtype, part):
    x, z, read, weights, options = inputs(3, length, channels, states, dtype, part)
    with ops.use_backend("reference"):
        wide = {name: t.double() if t.is_floating_point() else t for name, t in options.items()}
        expected = ops.mamba_inner_read(x, z, read, weights, reverse=BOTH, scale=0.5, **wide)
    narrow = ops.MambaWeights(*(field.to(dtype) for field in weights))
    with ops.use_backend("triton"):
        y = ops.mamba_inner_read(x.to(dtype), z.to(dtype), read, narrow, reverse=BOTH, scale=0.5, **options)
    assert y.dtype == dtype
    assert (y - expected).norm() / expected.norm() < TOLERANCES[dtype]
