"""``evaluate_model``: accuracy, FLOPs and speed of a classifier, unreduced and reduced, from Python."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mtr_lab.backbones import as_backbone
from mtr_lab.data import ImageDataModule
from mtr_lab.errors import UserError
from mtr_lab.evaluation.points import describe_points, points_at
from mtr_lab.evaluation.timing import time_points
from mtr_lab.reduction import Policy, patch
from mtr_lab.reduction.patching import keeping_policy
from mtr_lab.results.schema import Point
from mtr_lab.tasks.classification.task import Classification

Batch = Mapping[str, Any]
RATIOS = (0.2, 0.3, 0.4)
"""The default of ``evaluate_model``."""


def evaluate_model(
    model: nn.Module,
    data: Iterable[Any] | ImageDataModule | str | Path,
    policy: str | Path | Policy = "mtr",
    ratio: float | Iterable[float] | None = None,
    *,
    schedule: str | Sequence[int] | None = None,
    images: Tensor | None = None,
    timing_seconds: float = 0.0,
    **parts: Any,
) -> list[Point]:
    """Evaluate a classifier unreduced and under a policy; every batch is read once and run at all ratios.

        points = mtr_lab.evaluate_model(model, loader, "mtr", ratio=[0.2, 0.4])
        for point in points:
            print(point["policy"], point["ratio"], point["top1"], point["flops_true"])

    The model runs in evaluation mode where it is, in its own precision or the caller's autocast, and in this process
    alone. Its mode is restored when the function returns, and so is the policy of a patched model.

    Args:
        model: a classifier that ``mtr_lab.patch`` accepts.
        data: batches (images, labels), of a ``DataLoader`` for instance, or dicts of ``image`` and ``label``: images
            (B, channels, H, W) as the model expects them, normalised; labels (B,) integers, indices of the model's
            outputs, -1 for unknown, which counts as wrong. Or the folder of a dataset, with a folder per class or with
            those in ``val/``, prepared as the model's weights expect; or an ``ImageDataModule``.
        policy: as in ``mtr_lab.patch``.
        ratio: share of the unreduced model's FLOPs to remove, in [0, 1), or several, in a list or an array. The default
            is 0.2, 0.3 and 0.4, or the token counts if the ``schedule`` gives them.
        schedule, images, parts: as in ``mtr_lab.patch``.
        timing_seconds: time all points in turn on the first batch, for about as long; 0 for no timing.

    Returns:
        The points of ``result.json`` (``mtr_lab.results.schema.Point``), the unreduced model's (policy "none", ratio 0)
        first. Accuracies, agreement with the unreduced model and shares are fractions, ``kl`` is in nats an image,
        ``*_ci`` are 95 % intervals, FLOPs are those of one image; with timing, ``img_per_s``, ``latency_ms`` and
        ``peak_mib``.

    Raises:
        UserError: an unknown policy or part, a ratio out of reach, both a ratio and token counts, a model, data or
            labels of another kind, a folder without images, no image at all, or outputs that are not finite.
    """
    backbone: Any = as_backbone(model, "evaluate_model")
    model = backbone  # in an object's place
    modes, task = [(module, module.training) for module in model.modules()], Classification({})
    with keeping_policy(backbone):
        reduction = patch(model, policy, ratio=0.0, schedule=schedule, images=images, **parts)
        config = reduction.config
        gives_counts = not isinstance(config["schedule"], str) or isinstance(config["resolution"], list)
        points = points_at(reduction, reduction.policy.policy, _ratios(ratio, gives_counts))
        reduction.release_images()
        try:
            evaluation = task.evaluation(model.eval(), reduction, points, cuda_graph=False)
            first: Tensor | None = None
            with torch.inference_mode():
                for index, batch in enumerate(_batches(model, data)):
                    first = batch["image"] if first is None and len(batch["image"]) else first
                    evaluation.test_step(batch, index)
                evaluation.on_test_epoch_end()
            predictions = evaluation.predictions()
            speeds = {}
            if timing_seconds and first is not None:
                speeds = time_points(evaluation, points, first, timing_seconds)
            return describe_points(task, model, points, predictions, evaluation.skipped, speeds)
        finally:
            model.train(modes[0][1])
            for module, training in modes:  # a user may have frozen parts of a model in another mode
                module.training = training


def _ratios(ratio: Any, gives_counts: bool) -> list[Any]:
    """The ratios as plain numbers; ``None`` stands for the counts that the schedule gives."""
    if ratio is None:
        return [None] if gives_counts else list(RATIOS)
    if isinstance(ratio, np.ndarray | Tensor):
        ratio = ratio.tolist()
    ratios = list(ratio) if isinstance(ratio, Iterable) and not isinstance(ratio, str) else [ratio]
    return [number.item() if isinstance(number, np.generic | Tensor) else number for number in ratios]


def _batches(model: Any, data: Iterable[Any] | ImageDataModule | str | Path) -> Iterator[Batch]:
    """Evaluation batches on the model's device and in its precision."""
    parameter = next(model.parameters())
    if isinstance(data, str | Path):
        classes = Classification({}).data_arguments(model, None)
        config = resolve_model_data_config(model)
        data = ImageDataModule(name=str(data), root=str(data), data_config=config, **classes)
    if isinstance(data, ImageDataModule):
        for encoded in data.test_dataloader():
            images = data.normalise(encoded["image"].to(parameter.device))
            yield {**encoded, "image": images.to(parameter.dtype)}
        return
    count = 0
    for given in data:
        batch = _named(given, count)
        labels = batch["label"]
        if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
            raise UserError(
                f"data gives labels from {labels.min()} to {labels.max()}: expected 0 to {model.num_classes - 1}, "
                "the indices of the model's outputs, or -1 for unknown."
            )
        count += len(batch["image"])
        yield {**batch, "image": batch["image"].to(parameter.device, parameter.dtype)}


def _named(batch: Any, count: int) -> Batch:
    """A batch (images, labels), or a dict of both, as a dict; its images are named by number, from ``count`` on."""
    if isinstance(batch, Sequence) and len(batch) == 2:
        batch = {"image": batch[0], "label": batch[1]}
    if not isinstance(batch, Mapping) or not all(isinstance(batch.get(key), Tensor) for key in ("image", "label")):
        raise UserError(
            f"data gives a batch of type {type(batch).__name__}: expected tensors (images, labels), or a dict with the "
            "tensors 'image' and 'label'."
        )
    images, labels = batch["image"], batch["label"]
    fits = images.ndim >= 4 and labels.shape == images.shape[:1]
    if not fits or not images.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(
            f"data gives images {tuple(images.shape)} of {images.dtype} with labels {tuple(labels.shape)} of "
            f"{labels.dtype}: expected images (B, channels, H, W), normalised floats, and labels (B,), integers."
        )
    names = np.array([str(count + i) for i in range(len(images))], np.str_)
    return {"id": names, "hash": np.full(len(names), ""), "skipped": [], **batch}
