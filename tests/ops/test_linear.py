"""``mtr_lab.ops.linear``: the product of oneDNN and PyTorch's give the same."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.ops import onednn


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("shape", [(5, 33), (2, 7, 33), (2, 0, 33), (1, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_float64(shape, with_bias, transposed):
    x, weight, bias = normal(*shape), normal(19, 33), normal(19) if with_bias else None
    expected = F.linear(x, weight, bias)
    weight = weight.float().mT.contiguous().mT if transposed else weight.float()
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        y = ops.linear(x.float(), weight, None if bias is None else bias.float())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert flops.get_total_flops() == 2 * expected.numel() * 33


def test_parameters_get_their_gradients():
    x, weight = normal(2, 3, 5).float(), normal(4, 5).float().requires_grad_()
    ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(4, -1))


def test_views_of_larger_tensors():
    x, weight = normal(2, 6, 8).float(), normal(4, 8).float()
    with torch.no_grad():
        torch.testing.assert_close(ops.linear(x[:, 1:4, :5], weight[:, :5]), F.linear(x[:, 1:4, :5], weight[:, :5]))


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_goes_to_onednn_only_where_the_cpu_multiplies_it(supported, monkeypatch):
    product, products = torch.ops.mkldnn._linear_pointwise, []

    def counted(x, *arguments):
        products.append(x.dtype)
        return product(x.float(), *(t.float() if isinstance(t, torch.Tensor) else t for t in arguments)).to(x.dtype)

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    x, weight = normal(2, 3, 5).bfloat16(), normal(4, 5).bfloat16()
    onednn._multiplies.cache_clear()
    try:
        with torch.no_grad():
            y = onednn.linear(x, weight)
    finally:
        onednn._multiplies.cache_clear()
    assert products == ([torch.bfloat16] if supported and onednn.has_onednn() else [])
    torch.testing.assert_close(y.double(), F.linear(x.double(), weight.double()), rtol=2e-2, atol=2e-2)
