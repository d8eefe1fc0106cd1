"""Time backbones, policies and backends of the operations in turn, in one process."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.backbones import MODELS, compile, create_model
from mtr_lab.cli import config_folders
from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.measure.memory import peak_memory_mib
from mtr_lab.measure.roofline import Peaks, bounds_ms, measure_peaks, model_bytes
from mtr_lab.measure.speed import WARM_UP_CALLS, idle_and_stream_ms, rounds
from mtr_lab.policy_files import policy_files
from mtr_lab.reduction import Reduction, Schedule, policy_config, unpatch
from mtr_lab.report.bench_table import bench_table
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

NONE = "none"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TIMM = {False: "torch", True: "torch.compile"}
"""What a row names as the backend of a competitor, a model of timm."""
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One combination of the axes."""

    backbone: str
    batch: int
    resolution: int | None  # pixels of a side, None for the model's own
    dtype: str
    backend: str
    policy: str
    ratio: float
    cuda_graph: bool

    def model(self) -> tuple[nn.Module, Schedule | None]:
        """The model with random weights, its policy attached, and the schedule in force (none for a competitor)."""
        size: dict[str, Any] = {} if self.resolution is None else {"img_size": self.resolution}
        if self.backend in TIMM.values():
            import timm

            try:
                return timm.create_model(self.backbone, pretrained=False, **size).eval(), None
            except Exception as error:  # each family refuses in its own way
                at = f"bench.competitors: {self.backbone} at bench.resolution={self.resolution}"
                raise UserError(f"{at} cannot be had from timm: {error}") from error
        model = create_model(self.backbone, **size).eval()
        policy = policy_files(config_folders())["mtr" if self.policy == NONE else self.policy]
        reduction = Reduction(model, policy_config(policy))
        schedule = reduction.solve(self.ratio)
        reduction.use(schedule)
        if self.policy == NONE:
            unpatch(model)
        return model, schedule

    def work(self) -> dict[str, Any]:
        """What there is to do, known without doing it: the first columns of the row, and ``bytes`` and
        ``exponentials`` of the batch beside (see ``mtr_lab.measure.roofline``).

        Raises:
            UserError: the case cannot be carried out.
        """
        with torch.device("meta"):
            model, schedule = self.model()
            size: int = self.resolution or model.pretrained_cfg["input_size"][-1]  # type: ignore[index, assignment]
            image = torch.empty(1, 3, size, size)
        cost: dict[str, Any]
        if schedule is not None:
            cost = {
                "tokens": list(schedule.tokens),
                "reduction": schedule.reduction,
                "flops": schedule.flops + schedule.flops_overhead,
                "bytes": model_bytes(model, (size, size), schedule.tokens, self.batch, DTYPES[self.dtype]),
                "exponentials": self.batch * schedule.exponentials,
            }
        else:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(image)
            flops = counter.get_total_flops()
            cost = {"tokens": None, "reduction": 0.0, "flops": flops, "bytes": None, "exponentials": None}
        return {**asdict(self), "resolution": size, **cost}


@dataclass
class Variant:
    """A case on its way through the measurement."""

    case: Case
    work: dict[str, Any]
    run: Callable[[], Tensor] | None = None
    ms: list[float] = field(default_factory=list)
    idle_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    error: str | None = None

    def prepare(self, images: Tensor) -> None:
        """Build the model, warm it up, and measure its memory, that of its CUDA graph included."""
        case = self.case
        with torch.inference_mode(False), images.device:  # parameters as everybody has them
            model = case.model()[0].to(DTYPES[case.dtype])
        call: Callable[[Tensor], Tensor] = torch.compile(model) if case.backend == TIMM[True] else model
        competitor = case.backend in TIMM.values()

        def run() -> Tensor:
            with contextlib.nullcontext() if competitor else ops.use_backend(case.backend):
                return call(images)

        for _ in range(WARM_UP_CALLS):
            run()
        if case.cuda_graph:
            call = compile(call)  # type: ignore[arg-type]
        self.peak_mib = peak_memory_mib(run, [images, *model.parameters(), *model.buffers()], images.device)
        self.run = run

    def time(self, device: torch.device) -> None:
        """One more sample, unless the variant has failed."""
        if self.run is not None:
            idle, ms = idle_and_stream_ms(self.run, device)
            self.idle_ms.append(idle)
            self.ms.append(ms)

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step; if it fails (out of memory, a kernel that does not compile), note why and go on without it."""
        try:
            step()
        except Exception as error:
            self.error = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self.run = None

    def row(self, peaks: Peaks) -> dict[str, Any]:
        """The row, without the columns that take other rows."""
        bytes, exponentials = self.work["bytes"], self.work["exponentials"]
        flops = self.case.batch * self.work["flops"]
        bound = bounds_ms(peaks, flops=flops, bytes=bytes, exponentials=exponentials)
        row = {key: value for key, value in self.work.items() if key not in ("bytes", "exponentials")}
        row |= dict.fromkeys(("ms", "idle_ms", "img_per_s", "peak_mib")) | {"bound_ms": bound, "error": self.error}
        if self.error is not None:
            return row
        low, ms, high = map(float, np.percentile(self.ms, [25, 50, 75]))
        return row | {
            "ms": ms,
            "ms_quartiles": [low, high],
            "idle_ms": float(np.median(self.idle_ms)),
            "rounds": len(self.ms),
            "img_per_s": 1000 * self.case.batch / ms,
            "peak_mib": self.peak_mib,
            "roofline": max(limit for limit in bound.values() if limit is not None) / ms,
        }


def bench(config: DictConfig) -> dict[str, Any]:
    """Carry out what ``conf/bench.yaml`` describes: write bench.json to the run folder and print it as a table.

    Everything the user can have got wrong is found on outlines of the models, before anything is timed.

    Returns:
        What is in the file: ``schema``, ``config``, ``environment``, ``notes`` (what was left out), ``peaks`` of the
        device by dtype (FLOPs, bytes, exponentials a second) and ``rows``, one a combination:

        * the axes, ``resolution`` in pixels; ``tokens`` entering each block, the ``reduction`` achieved, true
          ``flops`` of an image;
        * ``ms`` of a batch in a stream of them, median of ``rounds`` calls, ``ms_quartiles``, ``img_per_s``;
          ``idle_ms`` of a batch that finds the device idle; ``peak_mib`` (weights, images, all that the forward
          pass allocates);
        * ``bound_ms``, what each limit of the device allows at best, and ``roofline``, the largest of them over ``ms``;
        * ``speedup`` over the unreduced model, all else equal, and ``overhead``, the share of ``ms`` beyond the
          unreduced time scaled by the number of tokens; null without such a row;
        * ``error`` instead of the measured columns where a combination failed.

    Raises:
        UserError: anything in the configuration that cannot be carried out.
        RuntimeError: every combination failed; the file has been written.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    device = choose_device(config.bench.device)
    cases, notes = read_cases(config.bench, device)
    variants = [Variant(case, case.work()) for case in cases]
    groups: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in variants:
        groups.setdefault(tuple(variant.work[key] for key in ("batch", "resolution", "dtype")), []).append(variant)

    console = Console()
    peaks = {dtype: measure_peaks(device, DTYPES[dtype]) for dtype in dict.fromkeys(case.dtype for case in cases)}
    for (batch, size, dtype), group in groups.items():
        console.print(f"timing {len(group)} variants at batch {batch}, {size} x {size} pixels, {dtype}")
        torch.manual_seed(config.seed)
        images = torch.randn(batch, 3, size, size, device=device, dtype=DTYPES[dtype])
        time_in_turn(group, images, config.bench.seconds)
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


def name_of(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_device(name: str) -> torch.device:
    """The device of ``bench.device``."""
    if name not in ("auto", "cpu", "cuda"):
        raise unknown("bench.device", name, ("auto", "cpu", "cuda"))
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UserError("bench.device=cuda: no CUDA device is present. Use bench.device=cpu, or auto.")
    return torch.device("cuda", torch.cuda.current_device()) if present and name != "cpu" else torch.device("cpu")


def read_cases(settings: DictConfig, device: torch.device) -> tuple[list[Case], list[str]]:
    """All combinations of the axes, each once, and notes on what had to be left out.

    Raises:
        UserError: a value that is not one of its axis, a backend that cannot run a dtype on this device, or no backend.
    """

    def axis(name: str, check: Callable[[str, Any], None], least: int = 1) -> list[Any]:
        given = settings[name]
        values = list(given) if isinstance(given, ListConfig) else [given]
        if len(values) < least:
            raise UserError(f"bench.{name}=[]: expected at least one value.")
        for value in values:
            check(f"bench.{name}", value)
        return list(dict.fromkeys(values))

    batches = axis("batch", partial(check_number, kind=int, least=1))
    sizes = axis("resolution", _check_size)
    dtypes = axis("dtype", partial(_check_name, known=DTYPES))
    graphs = axis("cuda_graph", _check_bool)
    if True in graphs and device.type != "cuda":
        raise UserError(f"bench.cuda_graph=true needs a CUDA device, this run is on the {device.type}: leave it false.")
    axes = [
        axis("backbone", partial(_check_name, known=MODELS)),
        batches,
        sizes,
        dtypes,
        axis("backend", partial(_check_name, known=ops.BACKENDS)),
        axis("policy", partial(_check_name, known=(NONE, *policy_files(config_folders())))),
        axis("ratio", partial(check_number, kind=float, least=0, most=1)),
        graphs,
    ]
    competitors = axis("competitors", _check_competitor, least=0)
    torch_compile = axis("torch_compile", _check_bool)

    axes[4], notes = usable_backends(axes[4], [DTYPES[name] for name in dtypes], device)
    cases = [
        Case(backbone, batch, size, dtype, backend, policy, 0.0 if policy == NONE else ratio, graph)
        for backbone, batch, size, dtype, backend, policy, ratio, graph in itertools.product(*axes)
    ]
    cases += [
        Case(name, batch, size, dtype, TIMM[compiled], NONE, 0.0, graph)
        for name, batch, size, dtype, compiled, graph in itertools.product(
            competitors, batches, sizes, dtypes, torch_compile, graphs
        )
    ]
    return list(dict.fromkeys(cases)), notes


def usable_backends(
    names: Iterable[str], dtypes: Iterable[torch.dtype], device: torch.device
) -> tuple[list[str], list[str]]:
    """Those that are installed, and why the others are not.

    Raises:
        UserError: none is, or one cannot run a dtype on this device.
    """
    usable, notes = [], []
    for name in names:
        try:
            with ops.use_backend(name):
                pass
        except UserError as error:
            notes.append(f"left out: {error}")
            continue
        usable.append(name)
        with ops.use_backend(name):
            for dtype in dtypes:
                ops.check_backend(torch.empty(0, device=device, dtype=dtype))
    if not usable:
        raise UserError("no backend of bench.backend can be used:\n" + "\n".join(notes))
    return usable, notes


def time_in_turn(variants: Sequence[Variant], images: Tensor, seconds: float) -> None:
    """Prepare all variants, then time them in rounds; see ``mtr_lab.measure.speed``."""
    seed = torch.initial_seed()
    with torch.inference_mode():
        for variant in variants:
            torch.manual_seed(seed)  # one backbone has the same weights in all its variants
            variant.attempt(partial(variant.prepare, images))
        for order in rounds(variants, MIN_ROUNDS, seconds):
            for variant in order:
                variant.attempt(partial(variant.time, images.device))
    for variant in variants:
        variant.run = None  # its memory is for the next group


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


def _check_name(name: str, value: Any, known: Iterable[str]) -> None:
    if str(value) not in known:
        raise unknown(name, value, known)


def _check_size(name: str, value: Any) -> None:
    if value is not None:
        check_number(name, value, int, 1)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value}: expected true or false.")


def _check_competitor(name: str, value: Any) -> None:
    import timm

    if not timm.is_model(str(value)):
        raise unknown(name, value, timm.list_models(), "timm.list_models() names them all.")
