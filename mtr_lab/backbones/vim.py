"""Vision Mamba (Vim): the class token is in the middle of the sequence, the two directions are averaged.

Source: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
arXiv 2401.09417; code and weights hustvl/Vim. State-dict names are the authors'.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from mtr_lab.backbones.factory import build
from mtr_lab.backbones.foreign import recognises
from mtr_lab.backbones.initialisation import initialise_vim
from mtr_lab.backbones.keywords import HARMLESS, MIXER, MODEL, Keyword, only
from mtr_lab.backbones.pretrained import ASSETS, complete
from mtr_lab.backbones.vision_mamba import VisionMamba
from mtr_lab.backbones.vision_mamba_objects import copy_epsilons, mixers_of, read_arguments

IMAGENETTE = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
)  # fmt: skip


class Vim(VisionMamba):
    """Vim: the class token is in the middle of the sequence, and a block averages its two directions.

    There are no models for videos.

    Args:
        if_divide_out: average the two directions; else a block adds them up.
        use_middle_cls_token: the class token is in the middle; else it is the first token.
        kwargs: arguments of ``VisionMamba``, whose errors apply.
    """

    average_directions = True
    keywords: ClassVar[Mapping[str, Keyword]] = {
        **MIXER,
        **MODEL,
        "bimamba_type": only("v2", otherwise="the directions share parameters (v1), or there is only one (none)"),
        "if_bimamba": only(False, otherwise="it is bimamba_type v1, whose directions share parameters"),
        "if_bidirectional": only(False, otherwise="the two layers of a pair scan in opposite directions"),
        "if_devide_out": only(True, otherwise="versions of the authors' code differ in it; the name is if_divide_out"),
        "if_cls_token": only(True, otherwise="there is no class token"),
        "use_double_cls_token": only(False, otherwise="there are two class tokens"),
        "if_abs_pos_embed": only(True, otherwise="there are no position embeddings"),
        "if_rope": only(False, otherwise="rotary position embeddings turn both streams before every block"),
        "if_rope_residual": only(False, otherwise="rotary position embeddings turn the residual stream"),
        "flip_img_sequences_ratio": Keyword(
            lambda ratio: ratio is None or ratio <= 0, "sequences are flipped at random, in evaluation, too"
        ),
        "final_pool_type": Keyword(lambda pooling: pooling != "max", "the largest of the classes is the output"),
        "init_layer_scale": only(None, otherwise="the outputs of the mixers are scaled by a parameter"),
        **dict.fromkeys(("ft_seq_len", "pt_hw_seq_len"), HARMLESS),
    }

    def __init__(self, *, if_divide_out: bool = True, use_middle_cls_token: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_middle_cls_token = use_middle_cls_token
        for block in self.blocks:
            block.mixer.average_directions = if_divide_out

    def class_position(self, patches: int) -> int:
        """After half of the patches, rounded down, or before all of them."""
        return patches // 2 if self.use_middle_cls_token else 0

    def special_positions(self, patches: int) -> tuple[int, ...]:
        return (self.class_position(patches),)

    def initialise(self) -> None:
        initialise_vim(self, len(self.layers))

    def copy_settings(self, model: Any) -> None:
        """Take over the settings of an object of the authors' class: every ε, whether directions are averaged."""
        copy_epsilons(model, self)
        for layer, block in zip(model.layers, self.blocks, strict=True):
            attributes = vars(layer.mixer)
            divides = bool(attributes.get("if_divide_out", attributes.get("if_devide_out", False)))
            if block.mixer.average_directions != divides:
                block.mixer.average_directions = divides


def _hub(repository: str, file: str, top1: float) -> dict[str, Any]:
    """The authors' weights on the Hugging Face Hub, and their accuracy by the paper and the files' names."""
    return {
        "hf_hub_id": f"hustvl/{repository}",
        "hf_hub_filename": file,
        "published_top1": top1,
        "license": "apache-2.0",
    }


def _own(side: int, classes: int, **preprocessing: Any) -> dict[str, Any]:
    """A model trained here, whose weights are not part of the package; its file names the classes."""
    config = {"input_size": (3, side, side), "num_classes": classes, "label_names": None}
    return {**config, "license": "apache-2.0", "verified": "weights", **preprocessing}


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
            "license": "apache-2.0",
            "verified": "weights",
        },
        "vim_nano_half.imagenette": _own(112, 10),
        "vim_ti_64.tiny_imagenet": _own(64, 200, crop_pct=1.0),
        "vim_ti_64_half.tiny_imagenet": _own(64, 200, crop_pct=1.0),
    },
    first_conv="patch_embed.proj",
    classifier="head",
)


NANO = {"img_size": 112, "patch_size": 8, "stride": 8, "embed_dim": 128, "num_classes": 10}
TI_64 = {"img_size": 64, "patch_size": 4, "stride": 4, "embed_dim": 192, "num_classes": 200}


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
    return build(Vim, CONFIGS["vim_nano"], pretrained, {**NANO, "depth": 16}, kwargs)


def vim_nano_half(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Half of vim_nano's blocks, half of its FLOPs."""
    return build(Vim, CONFIGS["vim_nano_half"], pretrained, {**NANO, "depth": 8}, kwargs)


def vim_ti_64(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti for 64² images, in 4² patches: 257 tokens, 200 classes."""
    return build(Vim, CONFIGS["vim_ti_64"], pretrained, TI_64, kwargs)


def vim_ti_64_half(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Half of vim_ti_64's blocks, half of its FLOPs."""
    return build(Vim, CONFIGS["vim_ti_64_half"], pretrained, {**TI_64, "depth": 12}, kwargs)


@recognises("Vim")
def read_object(model: Any) -> nn.Module | None:
    """An object of the authors' class -> our model that computes the same, without weights; see ``foreign.Reader``.

    Its mixers have ``bimamba_type``, and ``if_divide_out``, which was ``if_devide_out`` until July 2024.
    """
    mixers = mixers_of(model)
    if not mixers or not hasattr(mixers[0], "bimamba_type"):
        return None
    middle = {"use_middle_cls_token": bool(getattr(model, "use_middle_cls_token", False))}
    ours = build(Vim, CONFIGS["vim_ti"], False, {}, read_arguments(model, Vim) | middle)
    ours.copy_settings(model)
    return ours
