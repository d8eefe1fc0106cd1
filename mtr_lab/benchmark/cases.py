"""The cases of a benchmark: all combinations of its axes."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.backbones import MODELS, create_model
from mtr_lab.cli.program import config_folders
from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.measure.roofline import model_bytes
from mtr_lab.policy_files import policy_files
from mtr_lab.reduction import Reduction, Schedule, policy_config, unpatch
from mtr_lab.reduction.budgets import solve_speedup
from mtr_lab.reduction.cost_table import cost_table

NONE = "none"
PROVISIONAL_RATIO = 0.02  # until a speed-up is solved on the device
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TIMM = {False: "torch", True: "torch.compile"}
"""What a row names as the backend of a competitor, a model of timm."""


@dataclass(frozen=True)
class Case:
    """One combination of the axes of ``conf/bench``."""

    backbone: str
    batch: int
    resolution: int | None  # pixels of a side, None for the model's own
    dtype: str
    backend: str
    policy: str
    ratio: float | None  # None with asked_speedup
    cuda_graph: bool
    asked_speedup: float | None = None  # over the unreduced model

    def model(self) -> tuple[nn.Module, Reduction | None]:
        """The model with random weights, and the handle of its policy (none for a competitor).

        The schedule of ``asked_speedup`` is provisional, see ``solve``.
        """
        size: dict[str, Any] = {} if self.resolution is None else {"img_size": self.resolution}
        if self.backend in TIMM.values():
            import timm

            try:
                return timm.create_model(self.backbone, pretrained=False, **size).eval(), None
            except Exception as error:  # every family of timm raises another exception
                at = f"bench.competitors: {self.backbone} at bench.resolution={self.resolution}"
                raise UserError(f"{at} is refused by timm: {error}") from error
        model = create_model(self.backbone, **size).eval()
        policy = policy_files(config_folders())["mtr" if self.policy == NONE else self.policy]
        reduction = Reduction(model, policy_config(policy))
        reduction.use(reduction.solve(PROVISIONAL_RATIO if self.ratio is None else self.ratio))
        if self.policy == NONE:
            unpatch(model)
        return model, reduction

    @torch.no_grad()
    def solve(self, model: Any, reduction: Reduction, images: Tensor) -> dict[str, Any]:
        """Put the schedule of ``asked_speedup`` on these images in force; returns the columns that it changes.

        Raises:
            UserError: it is out of reach.
        """
        assert self.asked_speedup is not None
        table = cost_table(reduction, images, partial(model, images), model)
        schedule, budget = solve_speedup(reduction, self.asked_speedup, table)
        reduction.use(schedule)
        return {**self._costs(model, schedule, images.shape[-1]), "promised_speedup": budget.promised}

    def work(self) -> dict[str, Any]:
        """The columns of the row that need no measurement, and ``bytes`` and ``exponentials`` of the batch.

        See ``mtr_lab.measure.roofline`` for the latter two. Computed on the meta device.

        Raises:
            UserError: the model, the policy or the ratio is impossible.
        """
        with torch.device("meta"):
            model, reduction = self.model()
            size: int = self.resolution or model.pretrained_cfg["input_size"][-1]  # type: ignore[index, assignment]
            image = torch.empty(1, 3, size, size)
        cost: dict[str, Any]
        if reduction is not None:
            cost = self._costs(model, reduction.schedule, size)
        else:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(image)
            flops = counter.get_total_flops()
            cost = {"picture": [size, size], "tokens": None, "reduction": 0.0, "flops": flops}
            cost |= {"bytes": None, "exponentials": None}
        return {**asdict(self), "promised_speedup": None, "resolution": size, **cost}

    def _costs(self, model: Any, schedule: Schedule, size: int) -> dict[str, Any]:
        """The columns that follow from a schedule."""
        return {
            "picture": list(schedule.resolution or (size, size)),
            "tokens": list(schedule.tokens),
            "reduction": schedule.reduction,
            "flops": schedule.flops + schedule.flops_overhead,
            "bytes": model_bytes(model, (size, size), schedule.tokens, self.batch, DTYPES[self.dtype]),
            "exponentials": self.batch * schedule.exponentials,
        }


def read_cases(settings: DictConfig, device: torch.device) -> tuple[list[Case], list[str]]:
    """All combinations of the axes without duplicates, and notes on the backends that are left out.

    Raises:
        UserError: an unknown value, a backend that cannot run a dtype on this device, or no usable backend.
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
        raise UserError(
            f"bench.cuda_graph=true needs a CUDA device, this run is on the {device.type}: set it to false."
        )
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
    budgets: list[tuple[float | None, float | None]] = [(ratio, None) for ratio in axes[6]]
    if settings.speedup is not None:
        budgets = [(None, speedup) for speedup in axis("speedup", partial(check_number, kind=float, least=1))]
        if True in graphs:
            raise UserError("bench.speedup is solved from times without CUDA graphs: set bench.cuda_graph=false.")
    axes[6] = budgets
    competitors = axis("competitors", _check_competitor, least=0)
    torch_compile = axis("torch_compile", _check_bool)

    axes[4], notes = usable_backends(axes[4], [DTYPES[name] for name in dtypes], device)
    cases = [
        Case(backbone, batch, size, dtype, backend, policy, ratio, graph, speedup)
        for backbone, batch, size, dtype, backend, policy, budget, graph in itertools.product(*axes)
        for ratio, speedup in [(0.0, None) if policy == NONE else budget]
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
    """The installed backends, and notes on why the others are left out.

    Raises:
        UserError: no backend is installed, or a backend cannot run a dtype on this device.
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
