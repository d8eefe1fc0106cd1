"""Vision Mamba (Vim): the class token is in the middle of the sequence, the two directions are averaged.

Source: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
arXiv 2401.09417; code and weights hustvl/Vim. State-dict names are the authors'.
"""

from typing import Any

from mtr_lab.backbones.factory import build
from mtr_lab.backbones.pretrained import ASSETS, complete
from mtr_lab.backbones.vision_mamba import VisionMamba

IMAGENETTE = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
)  # fmt: skip


class Vim(VisionMamba):
    """Vim: the class token is in the middle of the sequence, and a block averages its two directions.

    Arguments and errors as for ``VisionMamba``; there are no models for videos.
    """

    average_directions = True

    def class_position(self, patches: int) -> int:
        """The middle: after half of the patches, rounded down."""
        return patches // 2


def _hub(repository: str, file: str, top1: float) -> dict[str, Any]:
    """The authors' weights on the Hugging Face Hub, and their accuracy by the paper and the files' names."""
    return {"hf_hub_id": f"hustvl/{repository}", "hf_hub_filename": file, "published_top1": top1}


CONFIGS = complete(
    {
        "vim_ti.in1k": _hub("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth", 0.761),
        "vim_ti_plus.in1k": _hub("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth", 0.783),
        "vim_s.in1k": _hub("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", 0.805),
        "vim_s_plus.in1k": _hub("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth", 0.816),
        "vim_b.in1k": _hub("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", 0.819),
        "vim_nano.imagenette": {
            "file": str(ASSETS / "vim_nano.safetensors"),
            "input_size": (3, 112, 112),
            "num_classes": 10,
            "label_names": IMAGENETTE,
        },
    },
    first_conv="patch_embed.proj",
    classifier="head",
)


def vim_ti(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 7 M parameters."""
    return build(Vim, CONFIGS["vim_ti"], pretrained, {"embed_dim": 192}, kwargs)


def vim_ti_plus(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+: Vim-Ti fine-tuned on overlapping patches, 730 tokens at 224²."""
    return build(Vim, CONFIGS["vim_ti_plus"], pretrained, {"embed_dim": 192, "stride": 8}, kwargs)


def vim_s(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 26 M parameters."""
    return build(Vim, CONFIGS["vim_s"], pretrained, {"embed_dim": 384}, kwargs)


def vim_s_plus(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+: Vim-S fine-tuned on overlapping patches, 730 tokens at 224²."""
    return build(Vim, CONFIGS["vim_s_plus"], pretrained, {"embed_dim": 384, "stride": 8}, kwargs)


def vim_b(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 98 M parameters."""
    return build(Vim, CONFIGS["vim_b"], pretrained, {"embed_dim": 768}, kwargs)


def vim_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """The bundled model: 2.2 M parameters, 112² images in 8² patches, the 197 tokens of Vim at 224²."""
    geometry = {"img_size": 112, "patch_size": 8, "stride": 8, "depth": 16, "embed_dim": 128, "num_classes": 10}
    return build(Vim, CONFIGS["vim_nano"], pretrained, geometry, kwargs)
