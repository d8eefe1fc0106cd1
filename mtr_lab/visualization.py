"""Draw the tokens that a policy keeps, merges and drops, in images or in videos."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import blocks_of
from mtr_lab.compose import make_meta_model, make_model, make_trainer
from mtr_lab.data.clips import read_clip
from mtr_lab.data.images import decode
from mtr_lab.errors import UserError
from mtr_lab.evaluation.drawing import observe_images
from mtr_lab.evaluation.points import asked_budgets, operating_points, policy_settings, strongest
from mtr_lab.image_file import reason
from mtr_lab.pictures import check_blocks, clip_policies, policy_strip, save_clip, save_depth, save_picture
from mtr_lab.reduction import Reduction, measured_on_images

SAMPLE_IMAGES = ("n02102040/n02102040_3141.JPEG", "n03028079/n03028079_14310.JPEG", "n03888257/n03888257_30680.JPEG")


def visualize(
    config: DictConfig,
    policies: Mapping[str, DictConfig],
    compared: Sequence[str],
    images: Sequence[Path],
    output: Path,
    blocks: Sequence[int] | None = None,
) -> list[Path]:
    """Draw images under the policy that a configuration describes, and under others for comparison.

    Args:
        config: ``conf/config.yaml`` with overrides.
        policies: policy name -> its ``mtr`` group; the chosen policy and those of ``compared``.
        compared: names of the policies to compare, from left to right.
        images: files, by default bundled ones. For a model of videos: animated images or folders of frames.
        output: the folder to write to.
        blocks: numbers of the blocks to draw, from 0; by default up to four that reduce.

    Returns:
        The files written: for each image ``<image>_<policy>`` as PNG, SVG and GIF, ``<image>_policies`` as PNG and SVG.

    Raises:
        UserError: no token is removed, a block does not exist, an image cannot be read, or a model of videos was given
            no video.
    """
    ops.set_backend(config.ops.backend)
    trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False)
    meta_model = make_meta_model(config.backbone)
    check_blocks(blocks or (), len(blocks_of(meta_model)))
    if measured := measured_on_images(config.mtr):
        raise UserError(
            f"{measured} measures on training images, which a drawing does not have: choose another "
            f"{measured.partition('=')[0]}, or give the counts: mtr.ratio=null mtr.schedule=[…]."
        )
    if asked := asked_budgets(config.mtr):
        raise UserError(
            f"mtr.{asked[0]} is measured on a model and images, which a drawing does not do: give mtr.ratio, that of a "
            "result of mtr-lab eval."
        )
    points = {}
    for name, setting in policies.items():
        points[name] = strongest(operating_points(Reduction(meta_model, policy_settings(setting)), setting))
    video = len(meta_model.input_shape) == 4
    if video and not images:
        raise UserError(
            f"backbone.num_frames={meta_model.input_shape[1]} takes videos, and no video is bundled: give an "
            "animated GIF or a folder of frames."
        )
    files = list(images) or _samples()
    inputs = [_load(file, meta_model, config.dataset.get("exif", "apply")) for file in files]

    model, chosen = make_model(config.backbone).eval(), config.mtr.policy
    seen = {}
    for name, setting in policies.items():
        reduction = Reduction(model, policy_settings(setting))
        reduction.use(points[name].schedule)
        seen[name] = [observe_images(trainer, model, reduction, image[None])[0] for image in inputs]
    written = []
    for i, stem in enumerate(_stems(files)):
        save, compare = (save_clip, clip_policies) if video else (save_depth, policy_strip)
        written += save(seen[chosen][i], blocks, output / f"{stem}_{chosen}")
        comparison = compare([seen[name][i] for name in compared])
        written += save_picture(comparison, output / f"{stem}_policies")
    return written


def _samples() -> list[Path]:
    folder = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
    return [folder / name for name in SAMPLE_IMAGES]


def _load(file: Path, model: Any, exif: str) -> Tensor:
    """Read an image, (3, H, W), or a video, (3, T, H, W), preprocessed as for the model's evaluation."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    if len(model.input_shape) == 4:
        return torch.stack([transform(frame) for frame in read_clip(file, model.input_shape[1])], dim=1)
    try:
        image, _ = decode(file.read_bytes(), exif)
    except Exception as error:  # of damaged bytes, Pillow raises errors of many types
        raise UserError(f"cannot read the image {file}: {reason(error)}") from error
    transformed: Tensor = transform(image)
    return transformed


def _stems(files: Sequence[Path]) -> list[str]:
    """The names of the pictures: those of the files, numbered if two files have the same name."""
    stems = [file.resolve().name if file.is_dir() else file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [f"{i:02}_{stem}" for i, stem in enumerate(stems)]
