"""A model as it is exported: normalised images in, outputs and the plans of its blocks out, and what it is in words."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self, get_args, get_origin, get_type_hints

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mtr_lab import __version__
from mtr_lab.backbones import as_backbone, blocks_of
from mtr_lab.measure.flops import model_costs
from mtr_lab.reduction.active import ActiveReduction
from mtr_lab.reduction.plan import Plan

INPUT, OUTPUT = "images", "logits"
"""The names of an exported model's first input and first output."""


@dataclass(frozen=True)
class Description:
    """What a file says of itself: enough to prepare a picture for it, and to name its outputs."""

    model: str
    task: str
    input_size: list[int]
    """[channels, height, width]."""
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    crop_mode: str
    labels: list[str] | None
    """The names of the outputs, if the weights have any."""
    grid: list[int]
    """[rows, columns] of the tokens of the first stage."""
    special: list[int]
    """The positions of tokens that are not patches, in the unreduced sequence."""
    policy: str
    """``none`` for the unreduced model."""
    ratio: float
    """The share of the unreduced FLOPs that is saved."""
    remove: list[int]
    """How many tokens each block removes."""
    flops: int
    """Of one image, the policy's own steps included."""
    flops_unreduced: int
    precision: str
    """``float32`` or ``float16``."""
    batch: int | None
    """The number of images; ``None``: any."""
    weights: str
    """The SHA-256 of the weights' file, or ``random``."""
    mtr_lab: str
    """The version of this library."""

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, text: str) -> Self:
        """The description in JSON; raises a ``ValueError`` that says what does not fit."""
        values = json.loads(text)
        kinds = get_type_hints(cls)
        if not isinstance(values, dict):
            raise ValueError("expected an object")
        if other := values.keys() ^ kinds.keys():
            raise ValueError(f"missing or unknown: {', '.join(sorted(other))}")
        for name, kind in kinds.items():
            if not _fits(values[name], kind):
                raise ValueError(f"{name} is {values[name]!r}")
        return cls(**values)

    @property
    def data_config(self) -> dict[str, Any]:
        """The arguments of ``timm.data.create_transform``."""
        names = ("interpolation", "crop_pct", "crop_mode")
        channels = {name: tuple(getattr(self, name)) for name in ("input_size", "mean", "std")}
        return {**channels, **{name: getattr(self, name) for name in names}}


def _fits(value: object, kind: Any) -> bool:
    """Whether a value of JSON has the type of a field."""
    parts = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    return isinstance(value, int | float if kind is float else kind)


def describe(model: nn.Module, task: str, name: str, precision: str, batch: int | None) -> Description:
    """The description of a model of a task, patched or not.

    Args:
        model: the task's model; that of a dense task has its backbone in ``backbone``.
    """
    backbone = backbone_of(model)
    active, config = backbone.reduction, resolve_model_data_config(backbone)
    schedule = active.schedule if isinstance(active, ActiveReduction) else None
    unreduced = schedule.flops_unreduced if schedule else model_costs(backbone)[0].flops
    acts = schedule is not None and schedule.acts
    layout = backbone.layouts()[0]
    labels = getattr(model, "label_names", None) or backbone.pretrained_cfg.get("label_names")
    return Description(
        model=name,
        task=task,
        input_size=list(backbone.input_shape),
        mean=list(config["mean"]),
        std=list(config["std"]),
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config["crop_mode"]),
        labels=None if labels is None else list(labels),
        grid=list(layout.image_grid),
        special=list(layout.special),
        policy=active.policy.policy if acts else "none",
        ratio=schedule.reduction if acts and schedule else 0.0,
        remove=list(schedule.remove) if schedule else [0] * len(blocks_of(backbone)),
        flops=schedule.flops + schedule.flops_overhead if schedule else unreduced,
        flops_unreduced=unreduced,
        precision=precision,
        batch=batch,
        weights=str(backbone.weights.get("sha256") or "random"),
        mtr_lab=__version__,
    )


def backbone_of(model: Any) -> Any:
    """The part of a task's model that a policy reduces."""
    return as_backbone(getattr(model, "backbone", model), "export")


class Deployable(nn.Module):
    """The model in evaluation mode, in float32 outside whatever its precision.

    ``plans``: whether the tensors of the blocks' plans are returned, too, for the verification.
    """

    def __init__(self, model: nn.Module, *, plans: bool) -> None:
        super().__init__()
        self.model, self.plans = model.eval(), plans

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, channels, H, W) -> outputs, and the plans' tensors, see ``tensors_of``."""
        images = images.to(next(self.model.parameters()).dtype)
        with recorded_plans(self.model) as plans:
            outputs = self.model(images).float()
        if not self.plans:
            return (outputs,)
        return outputs, *tensors_of(plans)


def tensors_of(plans: Sequence[Plan]) -> list[Tensor]:
    """The three tensors that each plan follows from, that of the residual stream, where it differs, after its own."""
    parts = [part for plan in plans for part in (plan, plan.residual) if part is not None]
    return [tensor for part in parts for tensor in (part.dest, part.weight, part.keep)]


@contextmanager
def recorded_plans(model: nn.Module) -> Iterator[list[Plan]]:
    """The plans that the blocks decide on in a forward pass within the ``with`` block, in their order."""
    plans: list[Plan] = []
    active = backbone_of(model).reduction
    if not isinstance(active, ActiveReduction):
        yield plans
        return

    def decide(*arguments: Any) -> Plan:
        plans.append(active.policy(*arguments))
        return plans[-1]

    active.decide = decide
    try:
        yield plans
    finally:
        active.decide = None


@contextmanager
def forced_plans(model: nn.Module, tensors: Sequence[Tensor], like: Sequence[Plan]) -> Iterator[None]:
    """Let the blocks follow given plans within the ``with`` block.

    Args:
        tensors: three for each plan, as a :class:`Deployable` returns them.
        like: the model's own plans, for what tensors do not say.
    """
    parts = iter(tensors)

    def given(plan: Plan) -> Plan:
        dest, weight, keep = (next(parts) for _ in range(3))
        rest = torch.ones_like(dest, dtype=torch.bool).scatter(1, keep, False)
        removed = rest.nonzero()[:, 1].view(len(dest), -1)
        return plan._replace(dest=dest, weight=weight, keep=keep, removed=removed, offsets=None, metadata=None)

    plans = []
    for plan in like:
        own = given(plan)
        plans.append(own if plan.residual is None else own._replace(residual=given(plan.residual)))
    turns = iter(plans)
    active = backbone_of(model).reduction
    if isinstance(active, ActiveReduction):
        active.decide = lambda *arguments: next(turns)
    try:
        yield
    finally:
        if isinstance(active, ActiveReduction):
            active.decide = None
