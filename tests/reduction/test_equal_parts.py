"""Parts of a policy that change its cost, not the output: gradients, compiled and exported models stay the same."""

from typing import Any

import pytest
import torch

import mtr_lab

COUNTS = [5, 0, 4, 0]
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "last_block": ({"last_block": "whole"}, {"last_block": "read"}),
    "merge_at": ({"features": "residual", "merge_at": "block"}, {"features": "residual", "merge_at": "scan"}),
}


def model() -> Any:
    torch.manual_seed(0)
    size = {"img_size": (16, 32), "patch_size": 4, "stride": 4, "depth": 4, "embed_dim": 16, "num_classes": 3}
    return mtr_lab.create_model("vim_ti", **size).eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("part", PARTS)
def test_gradients(part: str) -> None:
    made, grads = model(), []
    for settings in PARTS[part]:
        mtr_lab.patch(made, "write", schedule=COUNTS, **settings)
        made.zero_grad()
        made(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in made.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_compiled_and_exported(part: str) -> None:
    made = model()
    mtr_lab.patch(made, "write", schedule=COUNTS, **PARTS[part][1])
    expected = made(images())
    program = torch.export.export(made, (images(),)).run_decompositions(mtr_lab.ops.decompositions())
    torch.testing.assert_close(program.module()(images()), expected)
    torch.testing.assert_close(torch.compile(made, fullgraph=True)(images()), expected)
