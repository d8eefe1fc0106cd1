"""The footnotes of a benchmark's table."""

import io
from typing import Any

import pytest
from rich.console import Console

from mtr_lab.report.bench_table import bench_table

ROW = {
    "backbone": "vim_nano",
    "backend": "auto",
    "batch": 4,
    "resolution": 112,
    "dtype": "float32",
    "cuda_graph": False,
    "policy": "none",
    "ratio": 0.0,
    "ms": 80.0,
    "idle_ms": 80.0,
    "img_per_s": 50.0,
    "peak_mib": 18.0,
    "speedup": 1.0,
    "overhead": 0.0,
    "roofline": 0.5,
    "bound_ms": {"matrix": 40.0, "memory": 1.0, "exponential": None},
    "error": None,
}
REDUCED = {**ROW, "policy": "mtr", "ratio": 0.4, "ms": 50.0, "speedup": 1.6, "overhead": 0.04, "roofline": 0.4}
FAILED = {**ROW, "policy": "write", "error": "OutOfMemoryError", "overhead": None}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        # 60 % of the tokens would take 48 of the 50 ms
        (
            [FAILED, ROW, REDUCED],
            ["mtr 40.0: 1 - 80.0 ms × 60.0 % / 50.0 ms = 4.0 %", "mtr 40.0: 20.0 / 50.0 ms = 40.0 %"],
        ),
        ([ROW], ["unreduced 0.0: 40.0 / 80.0 ms = 50.0 %"]),
        ([FAILED], ["divided by the measured time peak of the device"]),
    ],
)
def test_footnotes_have_an_example(rows: list[dict[str, Any]], words: list[str]) -> None:
    result = {
        "environment": {"cpu": "A", "threads": 1, "torch": "2", "gpus": []},
        "peaks": {},
        "notes": [],
        "rows": rows,
    }
    stream = io.StringIO()
    Console(file=stream, width=200).print(bench_table(result))
    text = " ".join(stream.getvalue().split())
    for expected in words:
        assert expected in text
