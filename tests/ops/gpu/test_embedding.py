"""The fused patch embedding against the reference in float64, and the models that use it."""

import copy

import pytest
import torch
from covering import parametrize_covering
from torch.utils.flop_counter import FlopCounterMode

import mtr_lab
from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.ops.embedding import patch_tokens_reference
from mtr_lab.ops.gpu import embedding as kernels

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def random_inputs(batch, chans, size, rows, columns, channels, dtype):
    generator = torch.Generator(torch.get_default_device()).manual_seed(rows + 100 * channels)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    images, weight = normal(batch, chans, rows * size, columns * size), normal(channels, chans, size, size) / size
    return images, weight, normal(channels), normal(1, 1, channels), normal(1, rows * columns + 1, channels)


def assert_equal_reference(inputs, place):
    tokens = kernels.patch_tokens(*inputs, place)
    expected = patch_tokens_reference(*(t.double() for t in inputs), place)
    assert tokens.dtype == inputs[0].dtype
    assert tokens.is_contiguous()
    torch.testing.assert_close(tokens.double(), expected, rtol=torch.finfo(tokens.dtype).eps, atol=1e-5)


@parametrize_covering(
    geometry_and_place=[
        ((1, 3, 16, 2, 3, 24), 3),
        ((3, 3, 14, 3, 1, 200), 0),  # channels for two programs, pixels for a part of a step
        ((3, 1, 8, 5, 9, 24), 45),  # one program has tokens of three images, the other few tokens
        ((2, 4, 5, 3, 7, 384), 1),
        ((1, 2, 3, 1, 1, 1), 1),
        ((0, 3, 8, 2, 2, 16), 2),
    ],
    num_sms=[0, 10**6],  # small and large programs
    dtype=[torch.float16, torch.bfloat16],
)
def test_shapes(geometry_and_place, num_sms, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "num_sms", lambda device: num_sms)
    geometry, place = geometry_and_place
    assert_equal_reference(random_inputs(*geometry, dtype), place)


@pytest.mark.parametrize(("tokens", "expected"), [(197, 2), (43 * 128, 2), (44 * 128, 1), (256 * 197, 1)])
def test_few_tokens_run_in_smaller_programs(tokens, expected, monkeypatch):
    monkeypatch.setattr(kernels, "num_sms", lambda device: 132)
    assert kernels.divisor(tokens, 384, torch.device("cpu")) == expected


def test_strides():
    images, *parameters = random_inputs(3, 3, 8, 2, 3, 24, torch.float16)
    larger = torch.full((3, 5, 21, 40), torch.nan, dtype=torch.float16)
    crop = larger[:, 1:4, 2:18, 9:33]
    crop.copy_(images)
    upright = images.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (images.to(memory_format=torch.channels_last), crop, upright, images[:1].expand(3, -1, -1, -1)):
        assert_equal_reference((view, *parameters), 2)
    weight = parameters[0].to(memory_format=torch.channels_last)
    assert_equal_reference((images, weight, *parameters[1:]), 2)


def small_model(name="vim_ti", stride=8):
    torch.manual_seed(0)
    geometry = {"img_size": (16, 24), "patch_size": 8, "depth": 1, "embed_dim": 24, "d_state": 4, "num_classes": 3}
    made = mtr_lab.create_model(name, **geometry, stride=stride).eval()
    for parameter in (made.patch_embed.proj.bias, made.cls_token):
        torch.nn.init.normal_(parameter)
    return made


def counted(run, images, backend="triton"):
    """The result, its FLOPs, and whether the patch embedding was fused."""
    with ops.use_backend(backend), FlopCounterMode(display=False) as counter:
        result = run(images)
    return result, counter.get_total_flops(), torch.ops.mtr_lab.patch_tokens in counter.get_flop_counts()["Global"]


@HALF
@pytest.mark.parametrize(("name", "size"), [("vim_ti", (24, 16)), ("videomamba_ti", (16, 24))])
@torch.no_grad()
def test_models(name, size, dtype):
    made, images = small_model(name).to(dtype), torch.randn(2, 3, *size).to(dtype)
    actual, flops, fused = counted(made, images)
    expected, expected_flops, _ = counted(made, images, "reference")
    assert fused
    assert flops == expected_flops
    torch.testing.assert_close(actual, expected, rtol=0, atol=16 * torch.finfo(dtype).eps * expected.abs().max().item())


def test_other_models_are_not_fused():
    made, images = small_model(), torch.randn(1, 3, 16, 24)
    half, half_images = copy.deepcopy(made).half(), images.half()

    def fused(model, images):
        return counted(model.embed, images)[2]

    assert not fused(half, half_images)  # gradients may be needed
    with torch.no_grad():
        assert fused(half, half_images)
        assert not fused(made, images)
        with torch.autocast(images.device.type, torch.bfloat16):
            assert not fused(made, images)
        assert not fused(small_model(stride=4).half(), half_images)
        with pytest.raises(UserError, match="of the model's 3 channels"):
            fused(half, half_images[:, :2])
        half.pos_embed.data = half.pos_embed.float()
        assert not fused(half, half_images)


def test_registration():
    inputs = random_inputs(2, 3, 8, 2, 3, 24, torch.float16)
    operator = torch.ops.mtr_lab.patch_tokens.default
    torch.library.opcheck(operator, (*inputs, 3), test_utils=("test_schema", "test_faketensor"))
    actual, expected = ops.decompositions()[operator](*inputs, 3), operator(*inputs, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
