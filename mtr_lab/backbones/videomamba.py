"""VideoMamba for images and videos: class token first, the two directions of a block summed, not averaged.

With ``num_frames`` a model takes videos: patches of one frame (or of ``kernel_size`` frames) each, ordered frame by
frame, with a spatial and a temporal position embedding; the blocks are the same.

Source: Li et al., "VideoMamba: State Space Model for Efficient Video Understanding", arXiv 2403.06977; code and weights
OpenGVLab/VideoMamba. State-dict names are the authors'.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from mtr_lab.backbones.factory import build
from mtr_lab.backbones.foreign import recognises
from mtr_lab.backbones.initialisation import initialise_videomamba
from mtr_lab.backbones.keywords import HARMLESS, MIXER, MODEL, Keyword, only
from mtr_lab.backbones.pretrained import ASSETS, complete
from mtr_lab.backbones.vision_mamba import VisionMamba
from mtr_lab.backbones.vision_mamba_objects import copy_epsilons, mixers_of, read_arguments


class VideoMamba(VisionMamba):
    """VideoMamba: the class token comes first, and a block adds up its two directions.

    With ``num_frames`` it takes videos.

    Args:
        fc_drop_rate: dropout before the head while training, as ``drop_rate``.
        use_checkpoint: compute activations again in the backward pass, as ``set_grad_checkpointing``.
        long_memory: start the mixers as Mamba does, with Δ log-uniform in [0.001, 0.1], so that states span a video's
            tokens. The authors' start, Δ near 0.69, forgets within a few tokens: they train videos from weights for
            images.
        kwargs: arguments of ``VisionMamba``, whose errors apply.
    """

    average_directions = False
    video = True
    keywords: ClassVar[Mapping[str, Keyword]] = {
        **MIXER,
        **MODEL,
        "bimamba": only(True, otherwise="the mixers scan forward only"),
        "checkpoint_num": HARMLESS,
    }

    def __init__(
        self, *, fc_drop_rate: float = 0.0, use_checkpoint: bool = False, long_memory: bool = False, **kwargs: Any
    ) -> None:
        self.long_memory = long_memory
        super().__init__(**kwargs)
        if fc_drop_rate > 0:
            self.head_drop = nn.Dropout(fc_drop_rate)
        self.set_grad_checkpointing(use_checkpoint)

    def class_position(self, patches: int) -> int:
        """The first position."""
        return 0

    def special_positions(self, patches: int) -> tuple[int, ...]:
        return (self.class_position(patches),)

    def initialise(self) -> None:
        initialise_videomamba(self, len(self.layers), self.long_memory)

    def copy_settings(self, model: Any) -> None:
        """Take over the settings of an object of the authors' class: every ε, checkpointing."""
        copy_epsilons(model, self)
        self.grad_checkpointing = bool(getattr(model, "use_checkpoint", False))


def _hub(file: str, top1: float, gflops: float | None) -> dict[str, Any]:
    """The authors' weights on the Hugging Face Hub; their accuracy and GFLOPs by the authors' MODEL_ZOO.md."""
    return {
        "hf_hub_id": "OpenGVLab/VideoMamba",
        "hf_hub_filename": file,
        "published_top1": top1,
        "published_gflops": gflops,
        "license": "apache-2.0",
    }


MOTIONS = ("bob", "clockwise", "counterclockwise", "down", "grow", "left", "right", "shrink", "swing", "up")
"""The classes of generated clips, see ``mtr_lab.data.video.motion``."""

CONFIGS = complete(
    {
        "videomamba_ti.in1k": _hub("videomamba_t16_in1k_res224.pth", 0.769, 1.1),
        "videomamba_s.in1k": _hub("videomamba_s16_in1k_res224.pth", 0.812, 4.3),
        "videomamba_m.in1k": _hub("videomamba_m16_in1k_res224.pth", 0.828, 12.7),
        "videomamba_b.in1k": _hub("videomamba_b16_in1k_res224.pth", 0.827, None),
        "videomamba_64.tiny_imagenet": {
            "input_size": (3, 64, 64),
            "num_classes": 200,
            "label_names": None,
            "crop_pct": 1.0,
            "license": "apache-2.0",
            "verified": "weights",
        },
        "videomamba_words.grid": {
            "input_size": (3, 112, 112),
            "num_frames": 16,
            "num_classes": 51,
            "label_names": None,
            "license": "apache-2.0",
            "verified": "weights",
        },
        "videomamba_nano.motion": {
            "file": str(ASSETS / "videomamba_nano.safetensors"),
            "input_size": (3, 48, 48),
            "num_frames": 16,
            "num_classes": len(MOTIONS),
            "label_names": MOTIONS,
            "license": "apache-2.0",
            "verified": "weights",
        },
    },
    first_conv="patch_embed.proj",
    classifier="head",
)


def videomamba_ti(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti, 7 M parameters."""
    return build(VideoMamba, CONFIGS["videomamba_ti"], pretrained, {"embed_dim": 192}, kwargs)


def videomamba_s(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S, 26 M parameters."""
    return build(VideoMamba, CONFIGS["videomamba_s"], pretrained, {"embed_dim": 384}, kwargs)


def videomamba_m(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M, 74 M parameters."""
    return build(VideoMamba, CONFIGS["videomamba_m"], pretrained, {"embed_dim": 576, "depth": 32}, kwargs)


def videomamba_b(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-B, 98 M parameters."""
    return build(VideoMamba, CONFIGS["videomamba_b"], pretrained, {"embed_dim": 768}, kwargs)


def videomamba_64(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """2.2 M parameters, for 64² images in 4² patches: 257 tokens, 200 classes."""
    geometry = {"img_size": 64, "patch_size": 4, "stride": 4, "depth": 16, "embed_dim": 128, "num_classes": 200}
    return build(VideoMamba, CONFIGS["videomamba_64"], pretrained, geometry, kwargs)


def videomamba_words(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """1.7 M parameters, for 16 frames of 112² in patches of 4 × 16²: 197 tokens, the 51 words of GRID."""
    video = {"num_frames": 16, "kernel_size": 4, "num_classes": 51, "long_memory": True, "global_pool": "avg"}
    return build(
        VideoMamba,
        CONFIGS["videomamba_words"],
        pretrained,
        {"img_size": 112, "depth": 4, "embed_dim": 192, **video},
        kwargs,
    )


def videomamba_nano(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """A small model of videos: 0.3 M parameters, 16 frames of 48² in patches of 4 × 8 × 8, 145 tokens."""
    geometry = {"img_size": 48, "patch_size": 8, "stride": 8, "depth": 8, "embed_dim": 64, "d_state": 8}
    video = {"num_frames": 16, "kernel_size": 4, "num_classes": len(MOTIONS), "long_memory": True, "global_pool": "avg"}
    return build(VideoMamba, CONFIGS["videomamba_nano"], pretrained, {**geometry, **video}, kwargs)


@recognises("VideoMamba")
def read_object(model: Any) -> nn.Module | None:
    """An object of the authors' class -> our model that computes the same, without weights; see ``foreign.Reader``.

    Its mixers have ``bimamba``, and no ``bimamba_type``.
    """
    mixers = mixers_of(model)
    if not mixers or not hasattr(mixers[0], "bimamba") or hasattr(mixers[0], "bimamba_type"):
        return None
    ours = build(VideoMamba, CONFIGS["videomamba_ti"], False, {}, read_arguments(model, VideoMamba))
    ours.copy_settings(model)
    return ours
