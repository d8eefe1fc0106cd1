"""VideoMamba for images and videos: class token first, the two directions of a block summed but not halved.

With ``num_frames`` a model takes videos: patches of one frame (or of ``kernel_size`` frames) each, ordered frame by
frame, with a spatial and a temporal position embedding; the blocks are the same.

Source: Li et al., "VideoMamba: State Space Model for Efficient Video Understanding", arXiv 2403.06977; code and weights
OpenGVLab/VideoMamba. State-dict names are the authors'.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from mtr_lab.backbones.vision_mamba import VisionMamba
from mtr_lab.backbones.weights import build, imagenet_label_names


class VideoMamba(VisionMamba):
    __doc__ = VisionMamba.__doc__
    halve = False
    video = True

    def class_position(self, patches: int) -> int:
        """The class token leads."""
        return 0


def _cfg(file: str) -> dict[str, Any]:
    """ImageNet-1k weights on the Hugging Face Hub; evaluation as DeiT's: resize to size / 0.875, centre crop."""
    return {"hf_hub_id": "OpenGVLab/VideoMamba", "hf_hub_filename": file, "label_names": imagenet_label_names()}


default_cfgs = generate_default_cfgs(
    {
        "videomamba_ti.in1k": _cfg("videomamba_t16_in1k_res224.pth"),
        "videomamba_s.in1k": _cfg("videomamba_s16_in1k_res224.pth"),
        "videomamba_m.in1k": _cfg("videomamba_m16_in1k_res224.pth"),
        "videomamba_b.in1k": _cfg("videomamba_b16_in1k_res224.pth"),
    }
)


@register_model
def videomamba_ti(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti, 7 M parameters."""
    return build(VideoMamba, "videomamba_ti", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def videomamba_s(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S, 26 M parameters."""
    return build(VideoMamba, "videomamba_s", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def videomamba_m(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M, 74 M parameters."""
    return build(VideoMamba, "videomamba_m", pretrained, {"embed_dim": 576, "depth": 32}, kwargs)


@register_model
def videomamba_b(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-B, 98 M parameters."""
    return build(VideoMamba, "videomamba_b", pretrained, {"embed_dim": 768}, kwargs)
