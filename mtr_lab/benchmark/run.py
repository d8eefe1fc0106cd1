"""Time backbones, policies and backends of the operations in turn, in one process."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from mtr_lab.benchmark.cases import DTYPES, NONE, read_cases
from mtr_lab.benchmark.variants import Variant, time_in_turn
from mtr_lab.errors import UserError, unknown
from mtr_lab.evaluation.progress import Phases
from mtr_lab.measure.roofline import measure_peaks
from mtr_lab.report.bench_table import bench_table
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment


def bench(config: DictConfig) -> dict[str, Any]:
    """Run the benchmark that ``conf/bench.yaml`` describes; write bench.json to the run folder, print it as a table.

    Mistakes are found on models without weights, before anything is timed.

    Returns:
        The content of the file: ``schema``, ``config``, ``environment``, ``notes`` (backends left out), ``peaks`` of
        the device by dtype (FLOPs, bytes, exponentials a second) and ``rows``, one a combination:

        * the axes, ``resolution`` in pixels; ``picture``, the [height, width] to which the policy resizes; ``tokens``
          entering every block, the ``reduction`` achieved, true ``flops`` of an image;
        * ``ms`` of a batch in a stream of batches, median of ``rounds`` calls, ``ms_quartiles``, ``img_per_s``;
          ``idle_ms`` of a batch on an idle device; ``peak_mib`` (weights, images, all that the forward pass
          allocates);
        * ``bound_ms``, the lower bound that every limit of the device sets, and ``roofline``, the largest over ``ms``;
        * ``asked_speedup``, and ``promised_speedup``, predicted from the times of blocks, with ``bench.speedup``; then
          ``ratio`` is null;
        * ``speedup`` over the unreduced model, all else equal, and ``overhead``, the share of ``ms`` beyond the
          unreduced time scaled by the number of tokens; null without such a row;
        * ``error`` instead of the measured columns if the combination failed.

    Raises:
        UserError: the configuration has a mistake.
        RuntimeError: every combination failed; the file has been written.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    device = choose_device(config.bench.device)
    phases = Phases()
    with phases.phase("load"):
        cases, notes = read_cases(config.bench, device)
        variants = [Variant(case, case.work()) for case in cases]
    groups: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in variants:
        groups.setdefault(tuple(variant.work[key] for key in ("batch", "resolution", "dtype")), []).append(variant)

    console = Console()
    with phases.phase("peak rates of the device"):
        peaks = {dtype: measure_peaks(device, DTYPES[dtype]) for dtype in dict.fromkeys(case.dtype for case in cases)}
    phases.begin({_group_name(group): len(variants) for group, variants in groups.items()})
    for (batch, size, dtype), group in groups.items():
        torch.manual_seed(config.seed)
        images = torch.randn(batch, 3, size, size, device=device, dtype=DTYPES[dtype])
        with phases.phase(_group_name((batch, size, dtype))) as advance:
            time_in_turn(group, images, config.bench.seconds, advance)
    rows = [variant.row(peaks[variant.case.dtype]) for variant in variants]
    compare(rows)

    result = {
        "schema": 2,
        "config": OmegaConf.to_container(config, resolve=True),
        "environment": {**describe_environment(), "device": name_of(device)},
        "notes": notes,
        "peaks": {dtype: asdict(peak) for dtype, peak in peaks.items()},
        "rows": rows,
    }
    with replace_file(folder / "bench.json") as stream:
        stream.write(f"{json.dumps(result, indent=1)}\n".encode())
    console.print(bench_table(result))
    print(f"wrote {folder / 'bench.json'}")
    if all(row["error"] for row in rows):
        raise RuntimeError("every combination failed, see above.")
    return result


def compare(rows: list[dict[str, Any]]) -> None:
    """Add ``speedup`` and ``overhead`` to the rows."""
    alike = ("backbone", "batch", "resolution", "dtype", "backend", "cuda_graph")
    unreduced = {tuple(row[key] for key in alike): row for row in rows if row["policy"] == NONE}
    for row in rows:
        base = unreduced.get(tuple(row[key] for key in alike))
        if base is None or base["ms"] is None or row["ms"] is None:
            row |= {"speedup": None, "overhead": None}
            continue
        tokens = 1.0 if row["tokens"] is None else sum(row["tokens"]) / sum(base["tokens"])
        row |= {"speedup": base["ms"] / row["ms"], "overhead": 1 - base["ms"] * tokens / row["ms"]}


def name_of(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_device(name: str) -> torch.device:
    """The device of ``bench.device``: ``auto`` is CUDA's current device if one is present, else the CPU.

    Raises:
        UserError: another name, or ``cuda`` without a CUDA device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise unknown("bench.device", name, ("auto", "cpu", "cuda"))
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UserError("bench.device=cuda: no CUDA device is present. Use bench.device=cpu, or auto.")
    return torch.device("cuda", torch.cuda.current_device()) if present and name != "cpu" else torch.device("cpu")


def _group_name(group: tuple[Any, ...]) -> str:
    batch, size, dtype = group
    return f"batch {batch}, {size}², {dtype}"
