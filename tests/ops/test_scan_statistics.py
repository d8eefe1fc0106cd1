"""A new entry of ``STATISTICS`` works in every implementation of the scan."""

import pytest
import torch
import torch.nn.functional as F
from new_statistics import NEW, absolute, taken

from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.ops.cpu import scan, scan_statistics
from mtr_lab.ops.statistics import STATISTICS


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu"])
def test_a_new_row(backend, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 2, 2, 19, 70, generator=generator)
    B, C = torch.randn(2, 2, 2, 19, 3, generator=generator)
    A, D, z = -torch.rand(2, 70, 3, generator=generator), torch.ones(2, 70), torch.ones(2, 19, 70)
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}
    stats = ("absolute", "delta", "taken")
    with pytest.raises(UserError, match="absolute"):
        ops.selective_scan(**inputs, stats=stats)

    for name, statistic in NEW.items():
        monkeypatch.setitem(STATISTICS, name, statistic)
    with ops.use_backend(backend):
        _, sums = ops.selective_scan(**inputs, z=z, reverse=(False, True), stats=stats)
    for g in range(2):
        with ops.use_backend("reference"):
            y, _ = ops.selective_scan(**{k: t[g : g + 1] for k, t in inputs.items()}, reverse=(g,))
        step = F.softplus(delta[g])
        expected = torch.stack([y.abs().sum(-1), step.sum(-1), (step * u[g].abs()).sum(-1)], dim=-1)
        torch.testing.assert_close(sums[g], expected, rtol=1e-5, atol=1e-5)


def test_a_changed_formula_is_compiled_again():
    names = {scan_statistics._compiled(scan.scan, (term,)).py_func.__qualname__ for term in (absolute, taken)}
    assert len(names) == 2
