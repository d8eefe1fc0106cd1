"""Classify pictures: by a model, or by an exported file, unreduced and reduced."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones import as_backbone
from mtr_lab.compose import make_meta_model, make_model
from mtr_lab.data.classes import readable_name
from mtr_lab.data.files import ENDINGS, is_image
from mtr_lab.data.pictures import Picture, prepare
from mtr_lab.errors import UserError, check_number
from mtr_lab.evaluation.points import policy_settings
from mtr_lab.export.model import read_exported
from mtr_lab.reduction import Reduction, measured_on_images
from mtr_lab.report.wording import shown_name

BATCH = 8
TOP = 5


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    label: str
    """The name of the class, or its number if the weights name none."""
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of a picture, the most probable first."""

    picture: str
    """The file; of a picture from memory its number."""
    policy: str
    """``none`` for the unreduced model."""
    reduction: float
    """Share of the FLOPs that is saved."""
    guesses: tuple[Guess, ...]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.guesses[0].label

    def row(self) -> dict[str, Any]:
        """The prediction in plain types, for JSON."""
        guesses = [{"label": guess.label, "probability": round(guess.probability, 6)} for guess in self.guesses]
        return {"picture": self.picture, "policy": self.policy, "reduction": self.reduction, "classes": guesses}


@dataclass(frozen=True)
class Classifier:
    """What classifies: images (B, channels, H, W) to logits (B, classes)."""

    run: Callable[[Tensor], Tensor]
    data_config: Mapping[str, Any]
    labels: Sequence[str] | None
    policy: str
    reduction: float
    batch: int | None = None
    """The number of images that it takes; ``None``: any."""


def predict_images(
    model: nn.Module | str | Path, images: Picture | Iterable[Picture], *, top: int = TOP
) -> list[Prediction]:
    """Classify pictures by a model, reduced as it is patched, or by an exported file.

        for prediction in mtr_lab.predict_images(model, ["dog.jpg", array]):
            print(prediction.label, prediction.guesses[0].probability)

    Args:
        model: a classifier that ``mtr_lab.patch`` accepts; or a ``.onnx`` or ``.pt2`` file of ``mtr-lab export``.
        images: files, PIL images, or arrays (H, W), (H, W, 1), (H, W, 3), (H, W, 4), uint8 or floats from 0 to 1; or
            one. They are resized, cropped and normalised as the weights expect.
        top: the number of classes of each prediction, at most those of the model.

    Returns:
        One prediction a picture.

    Raises:
        UserError: a picture or a file that cannot be read, or a model of another kind.
    """
    check_number("top", top, int, 1)
    one = isinstance(images, str | Path | Image.Image) or hasattr(images, "shape")
    pictures: Iterable[Picture] = [images] if one else images  # type: ignore[list-item,assignment]
    classifier = exported_classifier(Path(model)) if isinstance(model, str | Path) else model_classifier(model)
    return list(classify([classifier], pictures, top))


def classify(classifiers: Sequence[Classifier], pictures: Iterable[Picture], top: int) -> Iterator[Prediction]:
    """Predictions of each picture in turn, by each classifier; all classifiers have the same preprocessing."""
    size = classifiers[0].batch or BATCH
    pictures, number = iter(pictures), 0
    while group := list(islice(pictures, size)):
        images = torch.stack([prepare(picture, classifiers[0].data_config) for picture in group])
        names = [str(p) if isinstance(p, str | Path) else str(number + i) for i, p in enumerate(group)]
        number += len(group)
        probabilities = [_probabilities(classifier, images) for classifier in classifiers]
        for i, name in enumerate(names):
            for classifier, rows in zip(classifiers, probabilities, strict=True):
                values, classes = rows[i].topk(min(top, rows.shape[1]))
                guesses = tuple(
                    Guess(str(n) if classifier.labels is None else readable_name(classifier.labels[n]), float(value))
                    for value, n in zip(values, classes.tolist(), strict=True)
                )
                yield Prediction(name, classifier.policy, classifier.reduction, guesses)


def _probabilities(classifier: Classifier, images: Tensor) -> Tensor:
    """(B, classes) float32. A file of a fixed batch gets the last images several times."""
    count = len(images)
    if classifier.batch:
        images = torch.cat([images, images[-1:].expand(classifier.batch - count, -1, -1, -1)])
    logits = classifier.run(images)[:count]
    if logits.ndim != 2:
        raise UserError(f"the model returns {tuple(logits.shape)}: predict takes classifiers, (B, classes).")
    if classifier.labels is not None and len(classifier.labels) != logits.shape[1]:
        raise UserError(f"the model returns {logits.shape[1]} classes, and names {len(classifier.labels)}.")
    return logits.float().softmax(-1)


def model_classifier(model: nn.Module) -> Classifier:
    """The classifier that a model is, as it is patched."""
    backbone: Any = as_backbone(model, "predict_images")
    if len(backbone.input_shape) != 3:
        raise UserError("predict takes models of images only: leave num_frames out.")
    parameter, active = next(backbone.parameters()), backbone.reduction
    acts = active is not None and active.schedule.acts

    def run(images: Tensor) -> Tensor:
        training = backbone.training
        backbone.eval()
        try:
            with torch.inference_mode():
                logits: Tensor = backbone(images.to(parameter.device, parameter.dtype))
                return logits.cpu()
        finally:
            backbone.train(training)

    return Classifier(
        run=run,
        data_config=resolve_model_data_config(backbone),
        labels=backbone.pretrained_cfg.get("label_names"),
        policy=active.policy.policy if acts else "none",
        reduction=active.schedule.reduction if acts else 0.0,
    )


def exported_classifier(file: Path) -> Classifier:
    """The classifier of a file of ``mtr-lab export``."""
    model = read_exported(file)
    about = model.description
    if about.task != "classification":
        raise UserError(f"{file} is for task={about.task}: predict takes classifiers.")
    return Classifier(model, about.data_config, about.labels, about.policy, about.ratio, about.batch)


def configured_classifiers(config: DictConfig, compare: bool) -> list[Classifier]:
    """The classifiers that ``conf/predict.yaml`` describes: the model, before it the unreduced one if asked.

    Raises:
        UserError: the configuration has a mistake; most are reported before weights are loaded.
    """
    if measured := measured_on_images(config.mtr):
        raise UserError(
            f"{measured} measures on training images, which predict does not have: give the counts, mtr.ratio=null "
            "mtr.schedule=[…]."
        )
    settings = policy_settings(config.mtr)
    reduction = Reduction(make_meta_model(config.backbone), settings)
    schedule = reduction.solve(config.mtr.ratio)
    ops.set_backend(config.ops.backend)
    model = make_model(config.backbone).eval()
    if not schedule.acts:
        return [model_classifier(model)]
    reduced = Reduction(model, settings)
    points = [reduced.solve(0.0), schedule] if compare else [schedule]

    def at(point: Any) -> Classifier:
        reduced.use(point)
        one = model_classifier(model)

        def run(images: Tensor) -> Tensor:
            reduced.use(point)
            return one.run(images)

        return Classifier(run, one.data_config, one.labels, one.policy, one.reduction)

    return [at(point) for point in points]


def files_below(paths: Iterable[Path]) -> list[Path]:
    """The files, and all pictures in the folders, sorted.

    Raises:
        UserError: a path that does not exist, or a folder without pictures.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: give pictures, or folders of pictures.")
        pictures = [path]
        if path.is_dir():
            pictures = sorted(f for f in path.rglob("*") if f.is_file() and is_image(f.name))
            if not pictures:
                raise UserError(f"no pictures are in the folder {path}: expected {', '.join(ENDINGS)}.")
        files += pictures
    return files


def as_json(predictions: Sequence[Prediction]) -> str:
    """A list of objects."""
    return json.dumps([prediction.row() for prediction in predictions], indent=2, ensure_ascii=False)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """A row for each class of each prediction."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["picture", "policy", "reduction", "rank", "label", "probability"])
    for p in predictions:
        for rank, guess in enumerate(p.guesses, 1):
            reduction, probability = f"{p.reduction:.4f}", f"{guess.probability:.6f}"
            writer.writerow([p.picture, p.policy, reduction, rank, guess.label, probability])
    return stream.getvalue().removesuffix("\n")


def as_table(predictions: Sequence[Prediction]) -> str:
    """A line for each prediction."""
    rows = [("picture", "policy", "FLOPs", "classes")]
    for p in predictions:
        classes = ", ".join(f"{guess.label} {100 * guess.probability:.1f} %" for guess in p.guesses)
        rows.append((p.picture, shown_name(p.policy), f"-{100 * p.reduction:.0f} %" if p.reduction else "all", classes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {"table": as_table, "json": as_json, "csv": as_csv}
