"""The models, one file per family, and the interface by which the rest of the library knows them."""

from typing import Any

from mtr_lab.backbones import (
    mambareg,
    mambavision,
    plainmamba,
    videomamba,
    vim,
    vmamba,
)
from mtr_lab.backbones.cuda_graph import compile
from mtr_lab.backbones.foreign import as_backbone, route, unroute, unwrapped
from mtr_lab.backbones.interface import (
    Backbone,
    blocks_of,
    convolutional_levels,
    first_state,
    last_state,
    missing_members,
    remove_head,
    run,
)
from mtr_lab.backbones.patch_embed import evenly, height_and_width
from mtr_lab.backbones.stage import Block, Stage
from mtr_lab.errors import unknown

FAMILIES = (vim, videomamba, mambareg, plainmamba, vmamba, mambavision)
MODELS = tuple(name for family in FAMILIES for name in family.CONFIGS)


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """Create a model by its registered name.

    Args:
        name: one of ``MODELS``.
        pretrained: load the published weights (``vim_nano``: the bundled ones). With another ``num_classes`` than
            theirs, the head stays untrained.
        kwargs: ``checkpoint`` (a local file, or ``hf://OWNER/REPOSITORY/FILE``) and ``revision`` of the weights;
            ``checkpoint_key``, the entry of the file or the prefix of the names, where it has several weights (by
            default the main ones rather than their moving average); ``checkpoint_grid``, (rows, columns) of its patches
            where they are not square and the file does not state them; ``new_head=True``, to leave the head untrained
            if the checkpoint has other classes;
            arguments with the upstream constructors' names: ``img_size``, ``patch_size``, ``stride``, ``depth``,
            ``embed_dim``, ``d_state``, ``channels``, ``num_classes``, ``drop_path_rate``, ``norm_epsilon``; for Vim
            ``if_divide_out`` and ``use_middle_cls_token``; for Mamba-Reg ``num_cls_tokens`` and ``cls_reduce``; for
            videos (VideoMamba) ``num_frames`` (T) and ``kernel_size`` (frames of a patch); and with timm's names
            ``in_chans``, ``drop_rate``, ``global_pool`` (``token``, ``avg``, or ``""``), ``features_only`` and
            ``out_indices``. All other keywords of the authors' constructors are accepted with the values that the model
            represents, ``ssm_cfg`` included.

    Returns:
        The model in training mode: images (B, channels, H, W), with ``num_frames`` videos (B, channels, T, H, W), to
        logits (B, num_classes). With ``features_only`` timm's wrapper of it: to a list of feature maps (B, embed_dim,
        rows, columns).

    Raises:
        UserError: an unknown name or argument, a value that is not represented; weights that cannot be downloaded,
            cannot be read, or do not fit.
    """
    if name not in MODELS:
        raise unknown("backbone", name, MODELS)
    family = next(family for family in FAMILIES if name in family.CONFIGS)
    return getattr(family, name)(pretrained=pretrained, **kwargs)


__all__ = [
    "FAMILIES",
    "MODELS",
    "Backbone",
    "Block",
    "Stage",
    "as_backbone",
    "blocks_of",
    "compile",
    "convolutional_levels",
    "create_model",
    "evenly",
    "first_state",
    "height_and_width",
    "last_state",
    "missing_members",
    "remove_head",
    "route",
    "run",
    "unroute",
    "unwrapped",
]
