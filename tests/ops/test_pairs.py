"""The similarity of given pairs of tokens, against its formulas."""

import pytest
import torch

from mtr_lab import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_similarity_of_pairs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 7, 5, dtype=dtype, requires_grad=True)
    first, second = torch.randint(7, (2, 2, 4)).unbind()
    for cosine in (True, False):
        actual = ops.pair_similarity(features, first, second, cosine=cosine)
        assert not actual.requires_grad
        for b in range(2):
            for p in range(4):
                one, other = features[b, first[b, p]].float(), features[b, second[b, p]].float()
                value = torch.dot(one, other) / (one.norm() * other.norm()) if cosine else -(one - other).abs().sum()
                torch.testing.assert_close(actual[b, p], value.detach())
