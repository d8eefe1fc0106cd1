"""The hardware's label is of the device that was used."""

import io
from typing import Any

import pytest
from dashboard_runs import ENVIRONMENT
from rich.console import Console

from mtr_lab.report.bench_table import bench_table
from mtr_lab.results.hardware import hardware


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"device": "cpu", "gpus": ["A GPU"]}, "A CPU, 2 threads"),
        ({"device": "A GPU", "gpus": ["A GPU", "Another GPU"]}, "A GPU"),
        ({"device": "cpu", "cpu": None, "threads": 1}, "Linux, 1 thread"),
        ({"gpus": ["A GPU", "Another GPU", "A GPU"]}, "2 × A GPU, Another GPU"),
        ({}, "A CPU, 2 threads"),
    ],
)
def test_the_device_that_was_used_is_named(fields: dict[str, Any], label: str) -> None:
    environment = {**ENVIRONMENT, **fields}
    assert hardware(environment) == label
    stream = io.StringIO()
    result = {"environment": environment, "peaks": {}, "notes": [], "rows": []}
    Console(file=stream, width=120).print(bench_table(result))
    assert stream.getvalue().strip().startswith(f"{label} · torch 2.9.0")
