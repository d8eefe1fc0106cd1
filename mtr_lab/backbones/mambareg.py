"""Mamba-Reg (Mamba®): registers are spread evenly over the sequence, and the head reads all of them.

Source: Wang et al., "Mamba-R: Vision Mamba ALSO Needs Registers", arXiv 2405.14858; code wangf3014/Mamba-Reg, weights
Wangf3014/Mamba-Reg. The authors' code was read as a reference and none of it is copied: their repository states no
licence. State-dict names are the authors'.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtr_lab.backbones.factory import build
from mtr_lab.backbones.foreign import recognises
from mtr_lab.backbones.initialisation import initialise_vim
from mtr_lab.backbones.keywords import MIXER, MODEL, Keyword, only
from mtr_lab.backbones.norms import RMSNorm
from mtr_lab.backbones.pretrained import complete
from mtr_lab.backbones.vision_mamba import VisionMamba
from mtr_lab.backbones.vision_mamba_objects import copy_epsilons, mixers_of, read_arguments
from mtr_lab.errors import UserError
from mtr_lab.tokens import TokenState


class MambaReg(VisionMamba):
    """Mamba-Reg: k registers among the patches, whose outputs are reduced and concatenated for the head.

    A block averages its two directions. There are no models for videos.

    Args:
        num_cls_tokens: k, the number of registers.
        cls_reduce: the head reads embed_dim / cls_reduce channels of each register, computed by a linear layer; with 1
            it reads the registers themselves.
        kwargs: arguments of ``VisionMamba``, whose errors apply.

    Raises:
        UserError: ``cls_reduce`` does not divide ``embed_dim``.
    """

    average_directions = True
    pooling_without_head = "avg"
    keywords: ClassVar[Mapping[str, Keyword]] = {
        **MIXER,
        **MODEL,
        "biscan": only(True, otherwise="the mixers scan forward only"),
    }

    def __init__(self, *, num_cls_tokens: int = 12, cls_reduce: int = 2, **kwargs: Any) -> None:
        self.num_cls_tokens = self.num_prefix_tokens = num_cls_tokens  # before the constructor, which reads them
        self.cls_reduce = cls_reduce
        super().__init__(**kwargs)

    def add_special_tokens(self, patches: int) -> None:
        if self.embed_dim % self.cls_reduce:
            raise UserError(f"cls_reduce={self.cls_reduce} does not divide embed_dim={self.embed_dim}: give a divisor.")
        self.cls_token = nn.Parameter(torch.zeros(1, self.num_cls_tokens, self.embed_dim))
        self.pos_embed_cls = nn.Parameter(torch.zeros(1, self.num_cls_tokens, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, self.embed_dim))

    def special_positions(self, patches: int) -> tuple[int, ...]:
        """Of n patches, n // (k + 1) are before each register, all others behind the last one."""
        step = patches // (self.num_cls_tokens + 1) + 1
        return tuple(range(step - 1, step * self.num_cls_tokens, step))

    def embedded_positions(self, patches: int) -> tuple[int, ...]:
        """None: the position embeddings of registers are ``pos_embed_cls``."""
        return ()

    def embed(self, images: Tensor) -> TokenState:
        """Images (B, channels, H, W) to the state before the first block; any size that fits the patch grid."""
        grid = self.patch_embed.grid_of(images)
        layout = self._layout(grid)
        patches = self.patch_embed(images) + self.positions(grid)
        registers = (self.cls_token + self.pos_embed_cls).expand(patches.shape[0], -1, -1)
        spread = layout.special[0] * self.num_cls_tokens  # patches in front of registers
        runs = patches[:, :spread].unflatten(1, (self.num_cls_tokens, layout.special[0]))
        runs = torch.cat([runs, registers[:, :, None]], dim=2)
        tokens = torch.cat([runs.flatten(1, 2), patches[:, spread:]], dim=1)
        return TokenState.start(tokens, layout.special, layout)

    def read_special(self, special: Tensor) -> Tensor:
        """The normalised registers (B, k, C) -> the input of the head, (B, k · C / cls_reduce)."""
        if self.cls_reduce == 1:
            return special.flatten(1)
        reduced, _ = self.norm_neck(self.neck(special).flatten(1)[:, None])
        return reduced[:, 0].to(special.dtype)

    @property
    def head_hidden_size(self) -> int:
        if self.global_pool == "token":
            return self.num_cls_tokens * (self.embed_dim // self.cls_reduce)
        return self.embed_dim

    def head_products(self) -> int:
        neck = self.num_cls_tokens * self.neck.weight.numel() if hasattr(self, "neck") else 0
        return neck + super().head_products()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As of ``VisionMamba``. The layers between registers and head stay, unless another pooling replaces them."""
        super().reset_classifier(num_classes, global_pool)
        reduces = self.global_pool == "token" and self.cls_reduce > 1
        if reduces and not hasattr(self, "neck"):
            neck = nn.Linear(self.embed_dim, self.embed_dim // self.cls_reduce, bias=False)
            norm = RMSNorm(self.head_hidden_size, self.norm_epsilon)
            where: Any = (self.cls_token.device, self.cls_token.dtype)
            self.neck, self.norm_neck = neck.to(*where), norm.to(*where)
        elif not reduces and hasattr(self, "neck"):
            del self.neck, self.norm_neck

    def initialise(self) -> None:
        initialise_vim(self, len(self.layers))

    def copy_settings(self, model: Any) -> None:
        """Take over the settings of an object of the authors' class: every ε."""
        copy_epsilons(model, self)
        if hasattr(model, "norm_neck") and self.norm_neck.eps != model.norm_neck.eps:
            self.norm_neck.eps = model.norm_neck.eps


def _hub(size: str, top1: float) -> dict[str, Any]:
    """The authors' weights on the Hugging Face Hub, their accuracy and their preprocessing by the authors' README."""
    return {
        "hf_hub_id": "Wangf3014/Mamba-Reg",
        "hf_hub_filename": f"mambar_{size}_patch16_224.pth",
        "published_top1": top1,
        "crop_pct": 1.0,
        "license": "none stated",
    }


CONFIGS = complete(
    {
        "mambareg_s.in1k": _hub("small", 0.814),
        "mambareg_b.in1k": _hub("base", 0.830),
        "mambareg_l.in1k": _hub("large", 0.836),
    },
    first_conv="patch_embed.proj",
    classifier="head",
)


def mambareg_s(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-S, 28 M parameters, 12 registers."""
    geometry = {"embed_dim": 384, "num_cls_tokens": 12, "cls_reduce": 2}
    return build(MambaReg, CONFIGS["mambareg_s"], pretrained, geometry, kwargs)


def mambareg_b(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-B, 99 M parameters, 12 registers."""
    geometry = {"embed_dim": 768, "num_cls_tokens": 12, "cls_reduce": 4}
    return build(MambaReg, CONFIGS["mambareg_b"], pretrained, geometry, kwargs)


def mambareg_l(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-L, 341 M parameters, 16 registers."""
    geometry = {"embed_dim": 1024, "depth": 48, "num_cls_tokens": 16, "cls_reduce": 8}
    return build(MambaReg, CONFIGS["mambareg_l"], pretrained, geometry, kwargs)


SIGNS = ("num_cls_tokens", "cls_reduce", "token_idx", "cls_positions", "pos_embed_cls")
"""The attributes of the authors' objects that others lack."""


@recognises("Mamba-Reg")
def read_object(model: Any) -> nn.Module | None:
    """An object of the authors' class -> our model that computes the same, without weights; see ``foreign.Reader``.

    It has the attributes ``SIGNS``; its mixers have ``biscan``.
    """
    if not mixers_of(model, registers=True) or not all(hasattr(model, name) for name in SIGNS):
        return None
    registers = {"num_cls_tokens": model.num_cls_tokens, "cls_reduce": model.cls_reduce}
    ours = build(MambaReg, CONFIGS["mambareg_s"], False, {}, read_arguments(model, MambaReg) | registers)
    _check_order(model, ours)
    ours.copy_settings(model)
    return ours


def _check_order(model: Any, ours: MambaReg) -> None:
    """Raise a ``UserError`` unless the object's tokens are in the order of ours: patches row by row, even registers."""
    (layout,) = ours.layouts()
    order = list(range(layout.patches))
    for number, position in enumerate(layout.special):
        order.insert(position, layout.patches + number)
    for name, expected in (("cls_positions", list(layout.special)), ("token_idx", order)):
        if [int(position) for position in getattr(model, name)] != expected:
            raise UserError(
                f"{name} of {type(model).__name__} is not represented: expected {layout.special[0]} patches, row by "
                "row, before each register. Only the authors' code computes that."
            )
