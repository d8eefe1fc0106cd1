"""Exported models run without the library: their operators are decomposed into plain PyTorch."""

import importlib.util

import pytest
import torch
from torch.export import Dim

import mtr_lab
from mtr_lab import ops

SLOW = pytest.mark.slow
GEOMETRY = {"img_size": 24, "patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 20, "d_state": 5, "num_classes": 3}


@pytest.mark.parametrize(
    ("policy", "backend"),
    [
        pytest.param(None, "auto", marks=SLOW),  # its blocks are in the next
        ("mtr", "auto"),
        pytest.param("fovea", "auto", marks=SLOW),
        pytest.param("utr", "triton", marks=SLOW),  # fused operators; a separate plan for the residual stream
        pytest.param("hsa", "auto", marks=SLOW),
        pytest.param("tome", "auto", marks=SLOW),
        pytest.param("mtr", "triton", marks=SLOW),
    ],
)
@torch.no_grad()
def test_models_of_any_batch_size(policy: str | None, backend: str) -> None:
    if backend == "triton" and (torch.cuda.is_available() or importlib.util.find_spec("triton") is None):
        pytest.skip("needs Triton's interpreter")
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", **GEOMETRY).eval()
    if policy:
        mtr_lab.patch(model, policy, schedule=[3, 2])
    with ops.use_backend(backend):
        program = torch.export.export(model, (torch.randn(2, 3, 24, 24),), dynamic_shapes=({0: Dim("batch")},))
        assert "mtr_lab" in str(program.graph)
        program = program.run_decompositions(ops.decompositions())
    assert "mtr_lab" not in str(program.graph)
    images = torch.randn(5, 3, 24, 24)
    torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-5)


def test_the_exported_scan_has_no_loop_over_tokens() -> None:
    """The number of nodes grows with the logarithm of the length."""

    class Scan(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.selective_scan(x, x, -torch.ones(1, 2, 2), x, x, torch.ones(1, 2))[0]

    nodes = []
    for length in (32, 256):
        program = torch.export.export(Scan(), (torch.ones(1, 2, length, 2),))
        nodes.append(len(program.run_decompositions(ops.decompositions()).graph.nodes))
    assert nodes[1] <= 2 * nodes[0]


def test_every_operator_of_a_graph_can_be_decomposed() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mtr_lab::")}
    registered -= {"mtr_lab::mamba_inner_training", "mtr_lab::mamba_inner_training_backward"}  # not picked in a graph
    assert {operator.name() for operator in ops.decompositions()} == registered
