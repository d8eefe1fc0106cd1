"""MambaVision: two stages of convolutions, then two stages of tokens in windows, with Mamba and attention blocks.

The first half of a token stage's blocks (rounded up) scan forward, the others attend. Tokens are removed in these two
stages, in each window the same number. The grid is restored between them; the last map is pooled by size.

Written from the paper and from measured outputs. The authors' code and weights (NVlabs/MambaVision) are licensed for
non-commercial use only. State-dict names are the authors'.

Source: Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", arXiv 2407.08083.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mtr_lab.backbones.adaptation import resize_channels
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.factory import build
from mtr_lab.backbones.foreign import recognises
from mtr_lab.backbones.initialisation import initialise_mambavision
from mtr_lab.backbones.keywords import Keyword, only
from mtr_lab.backbones.mambavision_blocks import (
    Attention,
    BatchNorm,
    ConvBlock,
    Downsample,
    Level,
    MambaVisionBlock,
    MambaVisionMixer,
    PatchEmbed,
)
from mtr_lab.backbones.mambavision_objects import copy_settings, read_arguments
from mtr_lab.backbones.patch_embed import check_images, for_convolutions, height_and_width
from mtr_lab.backbones.pretrained import complete
from mtr_lab.backbones.stage import Block, Stage
from mtr_lab.backbones.timm_pyramid import TimmPyramid
from mtr_lab.errors import UserError
from mtr_lab.tokens import Layout, TokenState, restore
from mtr_lab.tokens.pooling import mean_of_image

CONVOLUTIONAL = 2
"""The number of stages of convolutions, before those of tokens."""


@dataclass(frozen=True)
class WindowLayout(Layout):
    """The windows of a stage; they keep the size of the images, by which the convolutions before them are charged."""

    img_size: tuple[int, int] = (0, 0)


class MambaVision(TimmPyramid):
    """MambaVision classifier for images of any size.

    Args:
        img_size: pixels of a side, or (height, width), of the model's own images.
        dim: width of the first stage, which doubles from stage to stage.
        in_dim: width of the first convolution.
        depths: number of blocks of each of the four stages.
        window_size: patches of a window's side, of each stage; those of the first two are not used. Maps are padded
            with zeros to a multiple of it, and the padding consists of tokens like others.
        num_heads: of attention, of each stage; those of the first two are not used.
        mlp_ratio: inner width of an MLP, divided by the width of its stage.
        d_state: N, states a channel.
        channels: of the input image.
        num_classes: 0 for no head.
        drop_path_rate: stochastic depth of the last block while training; it falls linearly to 0 at the first one.
        layer_scale: initial value of the factors of all outputs of mixers and MLPs; ``None`` for no factors.
        global_pool: ``avg`` or ``""``, see ``mtr_lab.backbones.timm_pyramid.POOLINGS``.

    Raises:
        UserError: an impossible geometry, or an unknown pooling.
    """

    keywords: ClassVar[Mapping[str, Keyword]] = {
        "qkv_bias": only(True, otherwise="attention has no bias"),
        "qk_scale": only(None, otherwise="attention has a scale other than 1/√d"),
        "drop_rate": only(0, 0.0, otherwise="MLPs and attention drop some of their output while training"),
        "attn_drop_rate": only(0, 0.0, otherwise="attention drops some of its weights, in evaluation, too"),
        "layer_scale_conv": only(None, otherwise="the outputs of the convolutional blocks are scaled by a parameter"),
    }
    stands_for: ClassVar[Mapping[str, str]] = {"forward": "forward", "forward_features": "pooled"}
    """By the names of methods of the authors' class: our methods that compute the same."""
    level_modules = "levels"
    restoration = "skip"
    """Of the first token stage at its end, while tokens merge; see ``mtr_lab.backbones.first_state``."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        dim: int = 80,
        in_dim: int = 32,
        depths: tuple[int, ...] = (1, 3, 8, 4),
        window_size: tuple[int, ...] = (8, 8, 14, 7),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        d_state: int = 8,
        channels: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.widths = widths = [dim * 2**level for level in range(len(depths))]
        _check_geometry(widths, depths, window_size, num_heads)
        self.img_size, self.in_chans = height_and_width(img_size), channels
        self.window_size = tuple(window_size)
        self.num_features = self.head_hidden_size = widths[-1]
        self.patch_embed = PatchEmbed(channels, in_dim, dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.levels = nn.ModuleList()
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for number, rate in zip(range(depth), rates, strict=False):
                if level < CONVOLUTIONAL:
                    blocks.append(ConvBlock(width, rate))
                    continue
                scans = number < (depth + 1) // 2
                mixer = MambaVisionMixer(width, d_state) if scans else Attention(width, num_heads[level])
                blocks.append(MambaVisionBlock(mixer, width, mlp_ratio, rate, layer_scale))
            self.levels.append(Level(blocks, Downsample(width) if level < len(depths) - 1 else None))
        self.norm: nn.Module = BatchNorm(widths[-1])
        self.head_drop = nn.Identity()
        self.pretrained_cfg = self.default_cfg = {}
        self.reset_classifier(num_classes, global_pool)
        initialise_mambavision(self)

    @property
    def convolutional(self) -> list[tuple[int, int]]:
        """(width, stride) of the stages of convolutions."""
        return [(width, 4 * 2**level) for level, width in enumerate(self.widths[:CONVOLUTIONAL])]

    @property
    def stages(self) -> list[Stage]:
        """The two stages of tokens."""
        return [
            Stage(cast(list[Block], list(self._level(number).blocks)), self.widths[number], stride, stride)
            for number, stride in ((number, 4 * 2**number) for number in range(CONVOLUTIONAL, len(self.levels)))
        ]

    def _level(self, number: int) -> Level:
        return cast(Level, self.levels[number])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of one image."""
        return (self.in_chans, *self.img_size)

    @property
    def final_norm(self) -> nn.Module:  # type: ignore[override]
        """The norm before the head."""
        return self.norm

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        """The tokens of both token stages; any size fits, as convolutions pad the sides, and windows are padded."""
        height, width = img_size or self.img_size
        return [self._layout(number, (height, width)) for number in range(CONVOLUTIONAL, len(self.levels))]

    def _layout(self, number: int, img_size: tuple[int, int]) -> Layout:
        rows, columns = _grid(img_size, number)
        side = self.window_size[number]
        down, across = -(-rows // side), -(-columns // side)
        padding = down * side - rows, across * side - columns
        return WindowLayout(side, side, windows=(down, across), padding=padding, img_size=img_size)

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        """The costs of the stem, the stages of convolutions, downsampling and head."""
        img_size = cast(WindowLayout, layouts[0]).img_size
        products = self.num_features * self.num_classes
        for scale, conv in ((2, self.patch_embed.conv_down[0]), (4, self.patch_embed.conv_down[3])):
            products += -(-img_size[0] // scale) * -(-img_size[1] // scale) * _weights(conv)
        for number, module in enumerate(self.levels):
            level = cast(Level, module)
            (rows, columns), (fewer_rows, fewer_columns) = _grid(img_size, number), _grid(img_size, number + 1)
            if number < CONVOLUTIONAL:
                products += rows * columns * _weights(level.blocks)
            if level.downsample is not None:
                products += fewer_rows * fewer_columns * _weights(level.downsample)
        return Costs.products(products)

    def check(self, images: Tensor) -> None:
        """Raise a ``UserError`` unless shape and dtype are those of images."""
        check_images(images, self.in_chans, self.patch_embed.conv_down[0])

    def embed(self, images: Tensor, maps: list[Tensor] | None = None) -> TokenState:
        """Images (B, channels, H, W) to the state before the first block.

        Args:
            images: of any size.
            maps: a list that gets the map of each stage of convolutions, (B, C, rows, columns).
        """
        self.check(images)
        hidden = self.patch_embed(for_convolutions(images))
        for number in range(CONVOLUTIONAL):
            for block in self._level(number).blocks:
                hidden = block(hidden)
            if maps is not None:
                maps.append(hidden)
            hidden = self._level(number).downsample(hidden)  # type: ignore[misc]
        return self._start(hidden, CONVOLUTIONAL, (images.shape[-2], images.shape[-1]))

    def enter(self, stage: int, state: TokenState) -> TokenState:
        """The state before the first block of a stage: the map of the stage before it, downsampled."""
        number, layout = CONVOLUTIONAL + stage, cast(WindowLayout, state.layout)
        maps = layout.join(restore(state, layout.grid, "nearest" if state.offset is None else "skip"))
        maps = self._level(number - 1).downsample(maps.to(state.raw_hidden.dtype))  # type: ignore[misc]
        return self._start(maps, number, layout.img_size)

    def _start(self, maps: Tensor, number: int, img_size: tuple[int, int]) -> TokenState:
        layout = self._layout(number, img_size)
        return TokenState.start(layout.cut(maps).flatten(2).mT.contiguous(), (), layout)

    def pooled(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> the normalised mean of the last map, (B, C)."""
        return self._pooled(self.forward_state(images))

    def _pooled(self, state: TokenState) -> Tensor:
        if self.training:  # the statistics of a batch are those of the maps
            tokens = self._map(state, norm=False).flatten(2).mT
            return self.normalise(state.with_streams(tokens, None)).mean(1)
        return self.normalise(state.with_streams(mean_of_image(state.stream, state)[:, None], None))[:, 0]

    def classify(self, state: TokenState) -> Tensor:
        """The state after the last block -> logits (B, num_classes); without pooling, of each position."""
        return self.forward_head(self._pooled(state) if self.global_pool == "avg" else self._map(state, norm=True))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, num_classes); without pooling (B, rows, columns, num_classes)."""
        return self.classify(self.forward_state(images))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head, none for 0 classes; and another pooling, unless ``global_pool`` is ``None``.

        Raises:
            UserError: an unknown pooling.
        """
        if global_pool is not None:
            self.check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        weight = self.patch_embed.conv_down[0].weight
        self.head: nn.Module = head.to(weight.device, weight.dtype)  # type: ignore[arg-type]
        if self.pretrained_cfg.get("num_classes", num_classes) != num_classes:
            self.pretrained_cfg |= {"num_classes": num_classes, "label_names": None}

    def remove_norm(self) -> None:
        self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Parameters that are exempt from weight decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D"))}

    def copy_settings(self, model: Any) -> None:
        """Take the numbers that are attributes of an object of the authors' class: epsilon and momentum of its norms.

        Raises:
            UserError: an activation is another one, or something is dropped.
        """
        copy_settings(model, self)

    def fit_weights(self, state: dict[str, Tensor], grid: Sequence[int] | None, label: str) -> bool:
        """Adapt weights of another number of channels to the model's, in place; no weight depends on the grid.

        Returns:
            Whether the weights are for other channels.
        """
        kernel = state.get("patch_embed.conv_down.0.weight")
        if kernel is None or kernel.ndim < 2 or kernel.shape[1] in (0, self.in_chans):
            return False
        state["patch_embed.conv_down.0.weight"] = resize_channels(kernel, self.in_chans)
        return True


def _grid(img_size: tuple[int, int], number: int) -> tuple[int, int]:
    """(rows, columns) of the map of a stage: every convolution of stride 2 halves a side, rounded up."""
    rows, columns = (-(-side // (4 * 2**number)) for side in img_size)
    return rows, columns


def _weights(module: nn.Module) -> int:
    """Of all convolutions in a module, without biases."""
    return sum(conv.weight.numel() for conv in module.modules() if isinstance(conv, nn.Conv2d))


def _check_geometry(
    widths: Sequence[int], depths: Sequence[int], window_size: Sequence[int], num_heads: Sequence[int]
) -> None:
    """Raise a ``UserError`` unless the model can be built."""
    given = {"depths": depths, "window_size": window_size, "num_heads": num_heads}
    for name, values in given.items():
        if len(values) != CONVOLUTIONAL + 2:
            raise UserError(f"{name}={tuple(values)}: expected one of each for the {CONVOLUTIONAL + 2} stages.")
    for width, heads in zip(widths[CONVOLUTIONAL:], num_heads[CONVOLUTIONAL:], strict=True):
        if width % heads:
            raise UserError(f"num_heads={tuple(num_heads)}: {heads} heads do not divide the {width} channels there.")


def _hub(letter: str, file: str, top1: float, gflops: float, crop_pct: float) -> dict[str, Any]:
    """The authors' weights on the Hugging Face Hub.

    Accuracy and GFLOPs are those of the README of their repository, the crop that of their models' registration, with
    which their validation program evaluates. The hub calls the licence of the weights nvclv1, the README CC-BY-NC-SA
    4.0; both are for non-commercial use.
    """
    return {
        "hf_hub_id": f"nvidia/MambaVision-{letter}-1K",
        "hf_hub_filename": f"mambavision_{file}_1k.pth.tar",
        "published_top1": top1,
        "published_gflops": gflops,
        "crop_pct": crop_pct,
        "license": "non-commercial",
    }


CONFIGS = complete(
    {
        "mambavision_t.in1k": _hub("T", "tiny", 0.823, 4.4, 1.0),
        "mambavision_t2.in1k": _hub("T2", "tiny2", 0.827, 5.1, 0.98),
        "mambavision_s.in1k": _hub("S", "small", 0.833, 7.5, 0.93),
        "mambavision_b.in1k": _hub("B", "base", 0.842, 15.0, 1.0),
        "mambavision_l.in1k": _hub("L", "large", 0.850, 34.9, 1.0),
    },
    first_conv="patch_embed.conv_down.0",
    classifier="head",
)


def mambavision_t(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T, 32 M parameters; the authors state 4.4 GFLOPs at 224²."""
    return build(MambaVision, CONFIGS["mambavision_t"], pretrained, {}, kwargs)


def mambavision_t2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2, 35 M parameters; the authors state 5.1 GFLOPs at 224²."""
    return build(MambaVision, CONFIGS["mambavision_t2"], pretrained, {"depths": (1, 3, 11, 4)}, kwargs)


def mambavision_s(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S, 50 M parameters; the authors state 7.5 GFLOPs at 224²."""
    geometry = {"dim": 96, "in_dim": 64, "depths": (3, 3, 7, 5)}
    return build(MambaVision, CONFIGS["mambavision_s"], pretrained, geometry, kwargs)


def mambavision_b(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B, 98 M parameters; the authors state 15.0 GFLOPs at 224²."""
    geometry = {"dim": 128, "in_dim": 64, "depths": (3, 3, 10, 5), "layer_scale": 1e-5}
    return build(MambaVision, CONFIGS["mambavision_b"], pretrained, geometry, kwargs)


def mambavision_l(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L, 228 M parameters; the authors state 34.9 GFLOPs at 224²."""
    geometry = {"dim": 196, "in_dim": 64, "depths": (3, 3, 10, 5), "num_heads": (4, 8, 16, 32), "layer_scale": 1e-5}
    return build(MambaVision, CONFIGS["mambavision_l"], pretrained, geometry, kwargs)


@recognises("MambaVision")
def read_object(model: Any) -> nn.Module | None:
    """An object of the authors' class -> our model that computes the same, without weights; see ``foreign.Reader``."""
    arguments = read_arguments(model, MambaVision.stands_for)
    if arguments is None:
        return None
    ours = build(MambaVision, CONFIGS["mambavision_t"], False, {}, arguments)
    ours.copy_settings(model)
    return ours
