"""The patch embedding in one launch against the reference in float64."""

import pytest
import torch

from mtr_lab.ops.gpu.patch_tokens import patch_tokens
from mtr_lab.ops.patch_tokens import patch_tokens_reference

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def random_inputs(batch, chans, size, rows, columns, channels, dtype):
    generator = torch.Generator(torch.get_default_device()).manual_seed(rows + 100 * channels)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    images, weight = normal(batch, chans, rows * size, columns * size), normal(channels, chans, size, size) / size
    return images, weight, normal(channels), normal(1, 1, channels), normal(1, rows * columns + 1, channels)


def assert_equal_reference(inputs, place):
    tokens = patch_tokens(*inputs, place)
    expected = patch_tokens_reference(*(t.double() for t in inputs), place)
    assert tokens.dtype == inputs[0].dtype
    assert tokens.is_contiguous()
    torch.testing.assert_close(tokens.double(), expected, rtol=torch.finfo(tokens.dtype).eps, atol=1e-5)


@HALF
@pytest.mark.parametrize(
    ("geometry", "place"),
    [
        ((1, 3, 16, 2, 3, 24), 3),
        ((3, 3, 14, 3, 1, 200), 0),  # more channels than a program's, pixels that fill no whole step
        ((3, 1, 8, 5, 9, 24), 45),  # a program whose tokens are of three images, another with few
        ((2, 4, 5, 3, 7, 384), 1),
        ((1, 2, 3, 1, 1, 1), 1),
        ((0, 3, 8, 2, 2, 16), 2),
    ],
)
def test_shapes(geometry, place, dtype):
    assert_equal_reference(random_inputs(*geometry, dtype), place)


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


def test_registration():
    inputs = random_inputs(2, 3, 8, 2, 3, 24, torch.float16)
    torch.library.opcheck(
        torch.ops.mtr_lab.patch_tokens.default, (*inputs, 3), test_utils=("test_schema", "test_faketensor")
    )
