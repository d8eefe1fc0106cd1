"""Which implementation runs, and the errors if none can."""

import os
import subprocess
import sys
import types

import numba
import pytest
import torch
from torch.utils.data import DataLoader

from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.ops import registry
from mtr_lab.ops.cpu import compiled, convolution, norm
from mtr_lab.ops.scan import SELECTIVE_SCAN
from mtr_lab.ops.scan_gradient import SELECTIVE_SCAN_BACKWARD
from mtr_lab.ops.scan_inputs import ScanInputs


def conv(x):
    channels = x.shape[-1]
    return ops.causal_conv1d(x, torch.ones(1, channels, 4).to(x), torch.zeros(1, channels).to(x))


def scan(x):
    channels = x.shape[-1]
    state = torch.ones(1, *x.shape[:2], 2).to(x)
    return ops.selective_scan(
        x[None], x[None], -torch.ones(1, channels, 2).to(x), state, state, x.new_ones(1, channels)
    )


def scan_of(data, gap=None):
    """Inputs of the scan's operator: those that decide which implementation runs."""
    return *ScanInputs(data, *[None] * 5, gap=gap), None


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.float32, "cpu", "cpu"),
        (torch.float64, "cpu", "reference"),
        (torch.bfloat16, "cpu", "reference"),
        (torch.float32, "meta", "portable"),
    ],
)
def test_auto(dtype, device, expected):
    assert SELECTIVE_SCAN.pick(*scan_of(torch.empty(0, dtype=dtype, device=device))).name == expected


@pytest.mark.parametrize("operation", [conv, scan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cpu_runs_float32_only(operation, dtype):
    with ops.use_backend("cpu"), pytest.raises(UserError, match=rf"float32.*got {dtype} on cpu.*reference"):
        operation(torch.ones(1, 3, 2, dtype=dtype))


def test_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match=r"'mamba-ssm'.*'mamba_ssm'.*reference"):
        ops.set_backend("mamba-ssm")


def test_missing_kernels_say_what_to_install(monkeypatch):
    monkeypatch.setitem(registry._installed, "mamba_ssm", False)
    with pytest.raises(UserError, match="install the extra `cuda`"):
        ops.set_backend("mamba_ssm")


@pytest.mark.parametrize("operation", [conv, scan])
def test_cuda_kernels_refuse_the_cpu(monkeypatch, operation):
    monkeypatch.setitem(registry._installed, "mamba_ssm", True)
    with ops.use_backend("mamba_ssm"), pytest.raises(UserError, match="got torch.float32 on cpu"):
        operation(torch.ones(1, 3, 2))


def test_use_backend_restores_the_previous_one_after_an_error():
    before = ops.selected_backend()
    with ops.use_backend("reference"):
        with pytest.raises(UserError), ops.use_backend("no such backend"):
            pass
        assert ops.selected_backend() == "reference"
        with pytest.raises(ZeroDivisionError), ops.use_backend("cpu"):
            raise ZeroDivisionError
        assert ops.selected_backend() == "reference"
    assert ops.selected_backend() == before


@pytest.mark.parametrize("operation", [conv, scan])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_default_dtype_changes_nothing(operation, backend):
    x = torch.ones(1, 3, 2)
    with ops.use_backend(backend):
        expected = operation(x)
        torch.set_default_dtype(torch.float64)
        try:
            torch.testing.assert_close(operation(x), expected, rtol=0, atol=0)
        finally:
            torch.set_default_dtype(torch.float32)


def test_kernels_use_as_many_threads_as_pytorch(monkeypatch):
    threads, counts = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with monkeypatch.context() as patch, ops.use_backend("cpu"):
                patch.setattr(convolution, "conv", lambda *args: counts.append(numba.get_num_threads()))
                conv(torch.ones(1, 3, 2))
    finally:
        torch.set_num_threads(threads)
    assert counts == [1, min(2, numba.config.NUMBA_NUM_THREADS)]


@pytest.mark.parametrize(("tokens", "expected"), [(3, 1), (1024, 2)])
def test_a_thread_is_woken_for_enough_work(tokens, expected, monkeypatch):
    threads, counts = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(norm, "_norm_add", lambda *args: counts.append(numba.get_num_threads()))
        with torch.no_grad():
            ops.rms_norm_add(torch.ones(1, tokens, 128), None, torch.ones(128))
    finally:
        torch.set_num_threads(threads)
    assert counts == [min(expected, numba.config.NUMBA_NUM_THREADS)]


def test_data_loading_workers_may_fork_after_a_kernel_has_run():
    with ops.use_backend("cpu"):
        expected = conv(torch.ones(4, 3, 2))
        loader = DataLoader(torch.ones(4, 3, 2), batch_size=2, num_workers=1, multiprocessing_context="fork")
        assert torch.equal(torch.cat([conv(batch) for batch in loader], dim=1), expected)


@pytest.mark.slow
def test_import_brings_no_numba_and_first_use_needs_no_cache_and_leaves_the_threads_alone():
    script = """
import sys
import torch
from mtr_lab import ops
assert "numba" not in sys.modules
torch.set_num_threads(1)
ops.set_backend("cpu")
y = ops.causal_conv1d(torch.ones(1, 2, 1), torch.ones(1, 1, 4), torch.zeros(1, 1))
torch.testing.assert_close(y.flatten(), torch.nn.functional.silu(torch.tensor([1.0, 2.0])))
assert torch.get_num_threads() == 1
"""
    # The only cache directory allowed is that of a variable, which is empty.
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment["NUMBA_CACHE_LOCATOR_CLASSES"] = "_UserProvidedCacheLocator"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("installed", [True, False])
def test_auto_on_a_gpu(dtype, installed, monkeypatch):
    for package in ("triton", "mamba_ssm"):
        monkeypatch.setitem(registry._installed, package, installed)
    data = types.SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
    expected = "triton" if installed and dtype != torch.float64 else "reference"
    assert SELECTIVE_SCAN.pick(*scan_of(data, gap=torch.zeros(1, 1))).name == expected
    with torch.no_grad():
        assert SELECTIVE_SCAN_BACKWARD.pick(*scan_of(data)).name == expected


def test_a_change_in_any_file_of_the_package_compiles_its_kernels_again(tmp_path, monkeypatch):
    def kernel(x):
        return x

    def name():
        compiled._version.cache_clear()
        kernel.__qualname__ = "kernel"
        return compiled.jit()(kernel).py_func.__qualname__

    (tmp_path / "vectors.py").write_text("BLOCK = 64")
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
        before = name()
        assert name() == before
        (tmp_path / "vectors.py").write_text("BLOCK = 32")
        assert name() != before
    compiled._version.cache_clear()


def test_a_profile_names_the_operators_that_otherwise_run_without_the_dispatcher():
    hidden, weight = torch.ones(1, 3, 5), torch.ones(5)
    with torch.no_grad():
        expected = ops.rms_norm_add(hidden, None, weight)
        with torch.profiler.profile() as profile:
            observed = ops.rms_norm_add(hidden, None, weight)
    assert all(map(torch.equal, observed, expected))
    assert "mtr_lab::norm_add" in {event.name for event in profile.events()}
