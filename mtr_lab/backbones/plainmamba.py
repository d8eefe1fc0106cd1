"""PlainMamba: one stage of blocks that scan the grid along four snake paths; no special tokens, mean pooling.

Source: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", arXiv 2403.17695; code and
weights ChenhongyiYang/PlainMamba, Apache-2.0. State-dict names are those of the authors' backbone, without their prefix
``backbone.``, and of their head, ``head.fc``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab.backbones.adaptation import fit_positions, resize_channels, resize_positions
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.drop_path import DropPath, drop_path_rates
from mtr_lab.backbones.factory import build
from mtr_lab.backbones.foreign import recognises
from mtr_lab.backbones.initialisation import initialise_plainmamba
from mtr_lab.backbones.keywords import HARMLESS, MIXER, Keyword, named, only
from mtr_lab.backbones.norms import LayerNorm
from mtr_lab.backbones.patch_embed import check_images, for_convolutions, height_and_width
from mtr_lab.backbones.plainmamba_mixer import PlainMamba2D
from mtr_lab.backbones.plainmamba_objects import copy_settings, read_arguments
from mtr_lab.backbones.pretrained import complete
from mtr_lab.backbones.stage import Block, Stage
from mtr_lab.backbones.timm_interface import TimmInterface
from mtr_lab.errors import UserError, unknown
from mtr_lab.tokens import Layout, TokenState, convolve, restore
from mtr_lab.tokens.pooling import mean_by_size

STEM_WIDTH = 64
POOLINGS = ("avg", "")
"""``avg``: the mean of the tokens, weighted by size. ``""``: all tokens."""


class ConvPatchEmbed(nn.Module):
    """Convolutions at half the resolution, then one that turns a patch into a token.

    Sides that the last one does not divide are padded with zeros below and on the right.

    Args:
        img_size: (height, width) of the model's own images.
        patch_size, stride: pixels, even.
        in_chans: of the images.
        embed_dim: width of a token.
        num_convs: 3 × 3 convolutions after the first one.
    """

    num_frames = None

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, stride: int, in_chans: int, embed_dim: int, num_convs: int
    ) -> None:
        super().__init__()
        for name, pixels in (("patch_size", patch_size), ("stride", stride)):
            if pixels % 2:
                raise UserError(f"{name}={pixels}: expected an even number, as the stem halves the resolution.")
        self.img_size, self.patch_size, self.stride, self.in_chans = img_size, patch_size, stride, in_chans
        self.grid_size = self.grid(*img_size)
        self.stem = nn.Sequential(*_convolution(nn.Conv2d(in_chans, STEM_WIDTH, 7, 2, 3, bias=False)))
        convs = [nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, bias=False) for _ in range(num_convs)]
        self.convs = nn.Sequential(*(module for conv in convs for module in _convolution(conv)))
        self.projection = nn.Conv2d(STEM_WIDTH, embed_dim, patch_size // 2, stride // 2)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of ``height`` × ``width`` pixels."""
        return -(-height // self.stride), -(-width // self.stride)

    def check(self, images: Tensor) -> None:
        """Raise a ``UserError`` unless shape and dtype are those of images; values are not checked."""
        check_images(images, self.in_chans, self.stem[0])

    def products(self, layout: Layout) -> int:
        """Multiply-accumulates, for an image whose sides are multiples of the stride."""
        inner = sum(conv.weight.numel() for conv in (self.stem[0], *self.convs[::3]))
        return layout.patches * ((self.stride // 2) ** 2 * int(inner) + self.projection.weight.numel())

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> maps of tokens (B, C, rows, columns)."""
        maps = self.convs(self.stem(images))
        kernel, step = self.patch_size // 2, self.stride // 2
        missing = [max((-(-side // step) - 1) * step + kernel - side, 0) for side in maps.shape[2:]]
        return self.projection(F.pad(maps, (0, missing[1], 0, missing[0])) if any(missing) else maps)


def _convolution(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)]


class PlainMambaLayer(Block):
    """A block with the authors' names: its mixer is ``mamba``; ``dw`` convolves the stream of some blocks.

    Args:
        mixer: the mixer.
        with_dwconv: whether a depthwise convolution over the grid, a batch norm and a GELU follow the addition of the
            mixer's output to the stream.
        drop_path: of the output of the block before.
        own_drop_path: of this block's output, where ``dw`` needs the sum.
    """

    own_drop_path: DropPath

    def __init__(self, mixer: PlainMamba2D, with_dwconv: bool, drop_path: float, own_drop_path: float) -> None:
        super().__init__(mixer, LayerNorm(mixer.d_model), drop_path=drop_path)
        self.mamba = self._modules.pop("mixer")
        self.dw: nn.Sequential | None = None
        if with_dwconv:
            width = mixer.d_model
            conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.dw = nn.Sequential(conv, nn.BatchNorm2d(width), nn.GELU())
            self.own_drop_path = DropPath(own_drop_path)

    @property
    def mixer(self) -> Any:
        """``mamba``."""
        return self.mamba

    def settle(self, state: TokenState) -> TokenState:
        """The stream after ``dw``; all of it is in ``hidden``, and the residual stream starts again from zero."""
        if self.dw is None:
            return state
        assert state.raw_residual is not None
        convolution: Any
        convolution, norm, activation = self.dw
        stream = self.own_drop_path(state.raw_hidden) + state.raw_residual
        maps = convolve(stream.to(state.raw_hidden.dtype), state, convolution)
        tokens = activation(norm(maps.transpose(1, 2)[..., None]))[..., 0].transpose(1, 2)
        return state.with_streams(tokens, torch.zeros_like(state.raw_residual))

    def costs(self, mixed: int, transformed: int, layout: Layout, *args: Any, **kwargs: Any) -> Costs:
        """As of ``Block``, and of ``dw``, on the whole grid."""
        own = super().costs(mixed, transformed, layout, *args, **kwargs)
        weights = 0 if self.dw is None else sum(p.numel() for p in self.dw[0].parameters())
        return own + Costs.products(layout.patches * weights)


class PlainMamba(TimmInterface):
    """PlainMamba classifier for images of any size.

    Args:
        img_size: pixels of a side, or (height, width), of the model's own images.
        patch_size, stride: pixels of a patch, and between patches, by default as many; even numbers.
        depth: number of blocks.
        embed_dim: width C.
        d_state: N, states a channel.
        conv_size: width of the mixers' convolutions over the grid, odd.
        num_convs_patch_embed: 3 × 3 convolutions in the stem.
        layers_with_dwconv: numbers of the blocks that end in a convolution of the stream.
        channels: of the input image.
        num_classes: 0 for no head.
        drop_path_rate: stochastic depth of the last block while training; it falls linearly to 0 at the first one.
        drop_rate: dropout before the head while training.
        global_pool: ``avg`` or ``""``, see ``POOLINGS``.
        pairing: in a reduced sequence, which token gives Δ, B and C to a step of a scan; see
            ``mtr_lab.backbones.plainmamba_mixer.PAIRINGS``.

    Raises:
        UserError: an impossible geometry, or an unknown pooling or pairing.
    """

    keywords: ClassVar[Mapping[str, Keyword]] = {
        **MIXER,
        "num_layers": named("depth"),
        "embed_dims": named("embed_dim"),
        "in_channels": named("channels"),
        "arch": only(None, otherwise="it is another name for the geometry, which the model's name states"),
        "bias": only(True, otherwise="in_proj and out_proj have no bias"),
        "conv_bias": only(True, otherwise="the convolutions over the grid have no bias"),
        "use_rms_norm": only(False, otherwise="the norms of the blocks have no bias"),
        "init_layer_scale": only(None, otherwise="the outputs of the mixers are scaled by a parameter"),
        "with_pos_embed": only(True, otherwise="there are no position embeddings"),
        "final_norm": only(True, otherwise="there is no norm before the head"),
        "norm_cfg": only({"type": "LN", "eps": 1e-6}, otherwise="the last norm is another one"),
        "interpolate_mode": only("bicubic", otherwise="position embeddings are interpolated in another way"),
        **dict.fromkeys(("default_hw_shape", "init_cfg", "test_cfg", "convert_syncbn", "freeze_patch_embed"), HARMLESS),
    }
    stands_for: ClassVar[Mapping[str, str]] = {"forward": "tokens_and_maps"}
    """The methods of the authors' class, and ours that compute the same."""
    equivalents: ClassVar[Mapping[str, type]] = {"AdaptivePadding": nn.Identity}
    """Classes of the authors' modules that need no counterpart: ours pads in its stem."""
    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        conv_size: int = 7,
        num_convs_patch_embed: int = 1,
        layers_with_dwconv: Sequence[int] = (),
        channels: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        pairing: str = "source",
    ) -> None:
        super().__init__()
        if conv_size % 2 == 0:
            raise UserError(f"conv_size={conv_size}: expected an odd number.")
        for number in layers_with_dwconv:
            if not 0 <= number < depth:
                raise UserError(
                    f"layers_with_dwconv={list(layers_with_dwconv)}: expected blocks from 0 to {depth - 1}."
                )
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.in_chans = channels
        self.patch_embed = ConvPatchEmbed(
            height_and_width(img_size), patch_size, stride or patch_size, channels, embed_dim, num_convs_patch_embed
        )
        rows, columns = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, embed_dim))
        rates, convolved = [*drop_path_rates(drop_path_rate, depth), drop_path_rate], set(layers_with_dwconv)
        self.layers = nn.ModuleList(
            PlainMambaLayer(
                PlainMamba2D(embed_dim, d_state, conv_size, pairing),
                with_dwconv=number in convolved,
                drop_path=0.0 if number - 1 in convolved else rates[number],
                own_drop_path=rates[number + 1],
            )
            for number in range(depth)
        )
        last = 0.0 if depth - 1 in convolved else drop_path_rate
        self.drop_path = DropPath(last) if last > 0 else nn.Identity()  # of the last block's output
        self.ln1: LayerNorm | nn.Identity = LayerNorm(embed_dim, 1e-6)
        self.head = nn.ModuleDict()
        self.head_drop = nn.Dropout(drop_rate) if drop_rate > 0 else nn.Identity()
        self.pretrained_cfg = self.default_cfg = {}
        self.reset_classifier(num_classes, global_pool)
        initialise_plainmamba(self)

    @property
    def stages(self) -> list[Stage]:
        """One stage with all blocks."""
        blocks: Any = list(self.layers)
        return [Stage(blocks, self.embed_dim, self.patch_embed.stride, self.patch_embed.patch_size)]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of one image."""
        return (self.in_chans, *self.patch_embed.img_size)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return self.ln1

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        """The tokens of an image of (height, width), by default of the model's own size; any size fits."""
        height, width = img_size or self.patch_embed.img_size
        return [Layout(*self.patch_embed.grid(height, width))]

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        """The costs of stem and head; of the stem as for sides that are multiples of the stride."""
        return Costs.products(self.patch_embed.products(layouts[0]) + self.embed_dim * self.num_classes)

    def embed(self, images: Tensor) -> TokenState:
        """Images (B, channels, H, W) to the state before the first block."""
        self.patch_embed.check(images)
        maps = self.patch_embed(for_convolutions(images))
        layout = Layout(maps.shape[2], maps.shape[3])
        positions: Tensor = self.pos_embed
        if layout.grid != self.patch_embed.grid_size:
            positions = resize_positions(positions, _none, self.patch_embed.grid_size, layout.grid, antialias=False)
        return TokenState.start(maps.flatten(2).transpose(1, 2) + positions, (), layout)

    def normalise(self, state: TokenState) -> Tensor:
        """The residual stream after the final norm, (B, L, C), in the dtype of the parameters."""
        state = state.applied()
        if isinstance(self.ln1, nn.Identity):  # removed by prune_intermediate_layers
            return state.stream.to(self.pos_embed.dtype)
        normed, _ = self.ln1(state.raw_hidden, state.raw_residual)
        return normed.to(self.pos_embed.dtype)

    def class_first(self, state: TokenState) -> Tensor:
        """As ``normalise``: there are no special tokens."""
        return self.normalise(state)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens, normalised: (B, channels, H, W) -> (B, L, C). Of a reduced sequence, the survivors."""
        return self.normalise(self.forward_state(images))

    def classify(self, state: TokenState) -> Tensor:
        """The state after the last block -> logits (B, num_classes); without pooling, of each token."""
        tokens = self.normalise(state)
        features = mean_by_size(tokens, state) if self.global_pool == "avg" else tokens
        return self.get_classifier()(self.head_drop(features))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, num_classes); without pooling, of each token, (B, L, num_classes)."""
        return self.classify(self.forward_state(images))

    def tokens_and_maps(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``forward`` of the authors' backbone: the tokens of the whole grid, (B, L, C), and (B, C, rows, columns).

        A removed token has the features of the one that absorbed it, so that a mean over them is weighted by size.
        """
        state = self.forward_state(images)
        assert state.layout is not None
        tokens = restore(state, state.layout.grid).flatten(2).transpose(1, 2)
        normed: Tensor = self.ln1(tokens)[0]
        normed = normed.to(self.pos_embed.dtype)
        return normed, (normed.transpose(1, 2).unflatten(2, state.layout.grid),)

    def copy_settings(self, model: Any) -> None:
        """Take the numbers that are attributes of an object of the authors' class."""
        copy_settings(model, self)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head["fc"]  # type: ignore[index]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head, none for 0 classes; and another pooling, unless ``global_pool`` is ``None``.

        Raises:
            UserError: an unknown pooling.
        """
        if global_pool is not None:
            if global_pool not in POOLINGS:
                raise unknown("global_pool", global_pool, map(repr, POOLINGS))
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head["fc"] = head.to(self.pos_embed.device, self.pos_embed.dtype)  # type: ignore[operator]
        if self.pretrained_cfg.get("num_classes", num_classes) != num_classes:
            self.pretrained_cfg |= {"num_classes": num_classes, "label_names": None}

    def remove_norm(self) -> None:
        self.ln1 = nn.Identity()

    def fit_weights(self, state: dict[str, Tensor], grid: Sequence[int] | None, label: str) -> bool:
        """Adapt weights of another grid or number of channels to the model's, in place; as of ``VisionMamba``."""
        positions, kernel = state.get("pos_embed"), state.get("patch_embed.stem.0.weight")
        if positions is not None and positions.ndim == 3 and positions.shape[1] > 0:
            state["pos_embed"] = fit_positions(
                positions, grid, self.patch_embed.grid_size, _none, label, antialias=False
            )
        if kernel is None or kernel.ndim < 2 or kernel.shape[1] in (0, self.in_chans):
            return False
        state["patch_embed.stem.0.weight"] = resize_channels(kernel, self.in_chans)
        return True


def _none(patches: int) -> tuple[int, ...]:
    """The special tokens among ``patches``."""
    return ()


def _hub(file: str, top1: float, gflops: float | None) -> dict[str, Any]:
    """The authors' weights on the Hugging Face Hub, their accuracy by the README of their repository, their GFLOPs."""
    return {
        "hf_hub_id": "ChenhongyiYang/PlainMamba",
        "hf_hub_filename": file,
        "published_top1": top1,
        "published_gflops": gflops,
        "license": "apache-2.0",
    }


CONFIGS = complete(
    {
        "plainmamba_l1.in1k": _hub("l1.pth", 0.779, 3.0),
        "plainmamba_l2.in1k": _hub("l2.pth", 0.816, None),
        "plainmamba_l3.in1k": _hub("l3.pth", 0.823, 14.4),
    },
    first_conv="patch_embed.stem.0",
    classifier="head.fc",
)


def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1, 7.6 M parameters; the authors state 3.0 GFLOPs at 224²."""
    geometry = {"embed_dim": 192, "num_convs_patch_embed": 1, "layers_with_dwconv": (0,)}
    return build(PlainMamba, CONFIGS["plainmamba_l1"], pretrained, geometry, kwargs)


def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2, 26 M parameters."""
    geometry = {"embed_dim": 384, "num_convs_patch_embed": 2}
    return build(PlainMamba, CONFIGS["plainmamba_l2"], pretrained, geometry, kwargs)


def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3, 51 M parameters; the authors state 14.4 GFLOPs at 224²."""
    geometry = {"embed_dim": 448, "depth": 36, "num_convs_patch_embed": 2}
    return build(PlainMamba, CONFIGS["plainmamba_l3"], pretrained, geometry, kwargs)


@recognises("PlainMamba")
def read_object(model: Any) -> nn.Module | None:
    """An object of the authors' class -> our model that computes the same, without weights; see ``foreign.Reader``."""
    arguments = read_arguments(model, PlainMamba)
    if arguments is None:
        return None
    ours = build(PlainMamba, CONFIGS["plainmamba_l1"], False, {}, arguments)
    ours.copy_settings(model)
    return ours
