"""Learning from a trained classifier."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab.errors import UserError

LOCAL, CONFIG = "local-dir:", "config.json"


def check_teacher(name: str) -> None:
    """Check a teacher's name before any weights are read. Only the hub knows a model of the hub.

    Raises:
        UserError: there is no such model, or it is not one of images of three channels.
    """
    config: Mapping[str, Any] = {}
    try:
        if name.startswith(LOCAL):
            folder = Path(name.removeprefix(LOCAL))
            config = json.loads((folder / CONFIG).read_text())["pretrained_cfg"]
        elif ":" not in name:
            known = timm.models.get_pretrained_cfg(name)  # none for a name that timm gave up for another
            if known is None and not timm.is_model(name):
                raise ValueError("timm has no model of this name")
            config = known.to_dict() if known is not None else {}
    except Exception as error:  # of timm, the file, or its content; none has a common type
        raise _no_teacher(name, error) from error
    _check_channels(name, config)


def _no_teacher(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"training.teacher={name}: {reason.removesuffix('.')}. Give the name of a model of timm with trained weights, "
        f"hf-hub:OWNER/NAME, or {LOCAL}FOLDER with {CONFIG} and model.safetensors."
    )


def _check_channels(name: str, config: Mapping[str, Any]) -> None:
    channels = config.get("input_size", (3,))[0]
    if channels != 3:
        plural = "s" if channels != 1 else ""
        raise UserError(
            f"training.teacher={name} takes images of {channels} channel{plural}, and the student's have 3: choose a "
            "teacher of RGB images."
        )


def load_teacher(name: str, num_classes: int) -> nn.Module:
    """A trained classifier of timm.

    Args:
        name: of a model that timm knows, also ``"hf-hub:OWNER/NAME"``, or ``"local-dir:FOLDER"`` with the two files
            that ``timm.models.save_for_hf`` writes.
        num_classes: that the student has.

    Raises:
        UserError: there is no such model, its weights cannot be read, or it has other channels or classes.
    """
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm, the hub, or the file; none has a common type
        raise _no_teacher(name, error) from error
    config: Any = model.pretrained_cfg
    _check_channels(name, config)
    classes: Any = model.num_classes
    if classes != num_classes:
        raise UserError(
            f"training.teacher={name} has {classes} classes and the student {num_classes}: choose a teacher that was "
            "trained on the student's classes."
        )
    return model


class Teacher:
    """A classifier whose answers are targets. It is not a module, so no checkpoint contains it.

    Args:
        model: see :func:`load_teacher`.
        student: the student's ``pretrained_cfg``; images are normalised by its ``mean`` and ``std``.
    """

    def __init__(self, model: nn.Module, student: Mapping[str, Any]) -> None:
        self._model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config: Any = model.pretrained_cfg
        self._size = tuple(config["input_size"][1:])
        scale, shift = [], []
        for mean, std, own_mean, own_std in zip(
            student["mean"], student["std"], config["mean"], config["std"], strict=True
        ):
            scale.append(std / own_std)
            shift.append((mean - own_mean) / own_std)
        self._scale, self._shift = (torch.tensor(values).view(3, 1, 1) for values in (scale, shift))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K), float32, of the student's images (B, 3, H, W), resized to the teacher's size."""
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
            self._model.to(images.device)
        images = images * self._scale + self._shift
        if images.shape[-2:] != self._size:
            images = F.interpolate(images, self._size, mode="bilinear", align_corners=False, antialias=True)
        logits: Tensor = self._model(images.contiguous(memory_format=torch.channels_last))
        return logits.float()


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of the student's classes from the teacher's, both softened, averaged over the batch.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).

    Args:
        logits, teacher: (B, K).
        temperature: divides the logits. The loss is multiplied by its square, so that gradients keep their size.
    """
    student, target = ((values.float() / temperature).log_softmax(-1) for values in (logits, teacher))
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2
