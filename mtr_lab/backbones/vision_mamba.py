"""The classifier the families are cases of: patches and a class token through bidirectional Mamba blocks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.bimamba import BiMamba, drop_path_rates, initialise
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.drop_path import DropPath
from mtr_lab.backbones.interface import ModelReduction, first_state, last_state, run
from mtr_lab.backbones.norms import RMSNorm
from mtr_lab.backbones.patch_embed import PatchEmbed, height_and_width, resize_channels, resize_positions
from mtr_lab.backbones.stage import Block, Stage
from mtr_lab.errors import UserError
from mtr_lab.tokens import Layout, TokenState, restore
from mtr_lab.tokens.gather import take
from mtr_lab.tokens.pooling import check_pooling, mean_by_size, special_first


class VisionMamba(nn.Module, ABC):
    """Vision Mamba classifier. A family says where the class token stands and whether the directions are halved.

    It takes images (B, channels, H, W), or with ``num_frames`` videos (B, channels, T, H, W) wherever images are named.
    Beside the authors' names it has the interface of timm's models. ``torch.compile`` and ``torch.export`` take it;
    ``torch.jit.script`` and the symbolic tracing of ``torch.fx`` do not.

    Args:
        img_size: pixels of a side, or (height, width).
        patch_size, stride: of the patch convolution; a stride below the patch size, which is the default, gives
            overlapping patches.
        depth: number of blocks.
        embed_dim: width C.
        d_state: N, states a channel.
        channels: of the input image.
        num_classes: 0 for no head.
        drop_path_rate: stochastic depth of the last block while training; earlier blocks have less.
        num_frames: T, the frames of a video; None for images.
        kernel_size: how many frames a patch of a video spans; it divides T.
        drop_rate: dropout before the head while training.
        global_pool: what the head is given, one of ``mtr_lab.tokens.pooling.POOLINGS``.

    Raises:
        UserError: the sizes do not fit each other; ``num_frames`` of a family for images alone; an unknown pooling.
    """

    average_directions: bool
    """Whether a block divides the sum of its two directions by two."""
    video = False
    """Whether there are models for videos in the family. The class token leads in them."""
    pretrained_cfg: dict[str, Any]
    """timm's data configuration of the weights, ``input_size`` and ``label_names`` included."""
    default_cfg: dict[str, Any]
    """The same, by its older name."""
    num_classes: int
    """Outputs of the head, 0 without one."""
    num_prefix_tokens = 1
    """The class token, which leads in what ``forward_features`` returns, wherever it stands between the blocks."""
    reduction: ModelReduction | None = None
    """The policy in force; set and removed by ``mtr_lab.reduction``."""
    weights: dict[str, Any]
    """Where the parameters come from: ``source``, ``revision`` and ``sha256``."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        num_frames: int | None = None,
        kernel_size: int = 1,
        drop_rate: float = 0.0,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        if num_frames is not None and not self.video:
            raise UserError(
                f"num_frames={num_frames}: {type(self).__name__} takes images alone, VideoMamba videos too."
            )
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.in_chans = channels
        self.patch_embed = PatchEmbed(
            height_and_width(img_size), patch_size, stride or patch_size, channels, embed_dim, num_frames, kernel_size
        )
        patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim))
        self.temporal_pos_embedding = (
            None if num_frames is None else nn.Parameter(torch.zeros(1, self.patch_embed.frames, embed_dim))
        )
        self.layers = nn.ModuleList(
            Block(
                BiMamba(embed_dim, d_state, average_directions=self.average_directions),
                RMSNorm(embed_dim),
                drop_path=rate,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()  # of the last block's output
        self.norm_f: RMSNorm | nn.Identity = RMSNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate) if drop_rate > 0 else nn.Identity()
        self.grad_checkpointing = False
        self.pretrained_cfg = self.default_cfg = {}
        self.reset_classifier(num_classes, global_pool)
        initialise(self, depth)

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.layers))

    @property
    def stages(self) -> list[Stage]:
        """One, of all blocks."""
        return [Stage(self.blocks, self.embed_dim, self.patch_embed.stride, self.patch_embed.patch_size)]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image (channels, H, W), or video (channels, T, H, W), of the model's own size."""
        return self.patch_embed.input_shape

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return self.norm_f

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        """The tokens of an image of (height, width), or of a video's, by default of the model's own size.

        Raises:
            UserError: the size does not fit the patch grid.
        """
        height, width = img_size or self.patch_embed.img_size
        return [self._layout(self.patch_embed.grid(height, width))]

    def _layout(self, grid: tuple[int, int]) -> Layout:
        frames = self.patch_embed.frames
        return Layout(*grid, special=(self.class_position(frames * grid[0] * grid[1]),), frames=frames)

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        """Of the patch embedding and the head. The literature charges the embedding for the class token too."""
        embedding, head = self.patch_embed.proj.weight.numel(), self.num_features * self.num_classes
        (layout,) = layouts
        return Costs(2 * (layout.patches * embedding + head), layout.tokens * embedding + head)

    @abstractmethod
    def class_position(self, patches: int) -> int:
        """Where the class token stands in the unreduced sequence of an image with that many patches."""

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, L, C) of all tokens of an image, or of a video's, on a grid of (rows, columns)."""
        spatial: Tensor = self.pos_embed
        trained = self.patch_embed.grid_size
        if grid != trained:
            old, new = (self.class_position(rows * columns) for rows, columns in (trained, grid))
            spatial = resize_positions(spatial, old, trained, new, grid)
        if self.temporal_pos_embedding is None:
            return spatial
        class_entry, patches = spatial[:, :1], spatial[:, 1:]
        patches = self.temporal_pos_embedding[:, :, None] + patches[:, None]  # (1, frames, rows · columns, C)
        return torch.cat([class_entry, patches.flatten(1, 2)], dim=1)

    def embed(self, images: Tensor) -> TokenState:
        """Images (B, channels, H, W) to the state before the first block; any size that fits the patch grid.

        One operation does it all, unless ``patch_embed`` has to be called: patches overlap, or it has a hook or an
        adapter on it.
        """
        grid = self.patch_embed.grid_of(images)
        positions, layout = self.positions(grid), self._layout(grid)
        (place,) = layout.special
        if self.patch_embed.can_fuse:
            proj = self.patch_embed.proj
            tokens = ops.patch_tokens(images, proj.weight, proj.bias, self.cls_token, positions, place)
        else:
            tokens = ops.add_class_token(self.patch_embed(images), self.cls_token, positions, place)
        return TokenState.start(tokens, layout.special, layout)

    def enter(self, stage: int, state: TokenState) -> TokenState:
        """There is no second stage."""
        raise IndexError(stage)

    def forward_state(self, images: Tensor) -> TokenState:
        """All blocks: (B, channels, H, W) -> the state after the last one, before the final norm."""
        return self._finished(last_state(self, images))

    def _finished(self, state: TokenState) -> TokenState:
        """What the last block leaves -> the state the final norm is given."""
        state = state.applied()
        return state.with_streams(self.drop_path(state.raw_hidden), state.raw_residual)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens, normalised, the class token first: (B, channels, H, W) -> (B, L, C).

        Those of a reduced sequence are the ones left, in their order.
        """
        return self._all_features(self.forward_state(images))

    def class_features(self, state: TokenState) -> Tensor:
        """The state after the last block -> the normalised class token, (B, C)."""
        return self._norm(state.special_tokens(), None)[:, 0]

    def classify(self, state: TokenState) -> Tensor:
        """The state after the last block -> logits (B, num_classes), as ``forward`` gives them."""
        if self.global_pool == "token":  # only this token needs the final norm
            features = self.class_features(state)
        elif self.global_pool == "avg":
            features = mean_by_size(self._normed(state), state)
        else:
            features = self._all_features(state)
        return self.head(self.head_drop(features))

    def _all_features(self, state: TokenState) -> Tensor:
        return special_first(self._normed(state), state.special)

    def _normed(self, state: TokenState) -> Tensor:
        state = state.applied()
        return self._norm(state.raw_hidden, state.raw_residual)

    def _norm(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The final norm of both streams, (B, L, C), in the dtype of the parameters."""
        if isinstance(self.norm_f, nn.Identity):  # pruned
            return (hidden if residual is None else hidden + residual).to(self.cls_token.dtype)
        normed, _ = self.norm_f(hidden, residual)
        return normed.to(self.norm_f.weight.dtype)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head; none for 0 classes. Another pooling before it, unless ``global_pool`` is ``None``.

        Raises:
            UserError: an unknown pooling.
        """
        if global_pool is not None:
            check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(self.cls_token.device, self.cls_token.dtype)
        if self.pretrained_cfg.get("num_classes", num_classes) != num_classes:
            self.pretrained_cfg |= {"num_classes": num_classes, "label_names": None}

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, L, C) as ``forward_features`` gives them, or pooled ones (B, C) -> logits (B, num_classes).

        Args:
            pre_logits: return what the head would be given.

        Raises:
            UserError: the mean of a reduced sequence, whose tokens do not tell what they stand for.
        """
        if features.ndim == 3 and self.global_pool == "token":
            features = features[:, 0]
        elif features.ndim == 3 and self.global_pool == "avg":
            if self.reduction is not None and self.reduction.key is not None:
                raise UserError(
                    "global_pool='avg' of a patched model weights the tokens by their sizes, which forward_head is not "
                    "given: call the model itself, or classify(model.forward_state(images))."
                )
            features = features[:, self.num_prefix_tokens :].mean(1)
        features = self.head_drop(features)
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, num_classes), or of every token (B, L, num_classes) without pooling."""
        return self.classify(self.forward_state(images))

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of each block: the channels of its feature map, how much smaller than the image it is, and the module."""
        info = {"num_chs": self.embed_dim, "reduction": self.patch_embed.stride}
        return [{**info, "module": f"layers.{block}"} for block in range(len(self.layers))]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The residual stream after several blocks, with timm's arguments.

        Of a patched model every position of the grid is restored, as ``mtr_lab.tasks.features.FeatureMaps`` does, which
        also has other restorations.

        Args:
            images: (B, channels, H, W).
            indices: the blocks, negative ones from the end; the last n for an integer n, all for ``None``.
            return_prefix_tokens: beside each map its class token, (B, 1, C).
            norm: apply the final norm to the maps.
            stop_early: run no more blocks than are needed.
            output_fmt: ``NCHW`` for maps (B, C, rows, columns), ``NLC`` for tokens (B, rows · columns, C).
            intermediates_only: leave the final features out.

        Returns:
            The final features, as ``forward_features``, and the list of maps in the order of the blocks.

        Raises:
            UserError: a block that is not there, another format, or a model for videos.
        """
        if self.patch_embed.num_frames is not None:
            raise UserError("feature maps are of images: create the model without num_frames.")
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt={output_fmt}: expected NCHW or NLC.")
        wanted = self.blocks_at(indices)
        state, maps = first_state(self, images, traced=self.reduction is not None), []
        for i, (_, after) in enumerate(run(self, state)):
            state = after
            if i in wanted:
                state = state.applied()
                stream = self._normed(state) if norm else state.stream
                stream = stream.to(self.cls_token.dtype)
                tokens = self._on_grid(state.with_streams(stream, None))
                tokens = tokens.contiguous() if output_fmt == "NCHW" else tokens.flatten(2).transpose(1, 2)
                maps.append((tokens, take(stream, state.special)) if return_prefix_tokens else tokens)
            if stop_early and i == max(wanted):
                break
        return maps if intermediates_only else (self._all_features(self._finished(state)), maps)

    def blocks_at(self, indices: int | Sequence[int] | None) -> list[int]:
        """The numbers of the blocks that ``forward_intermediates`` means by ``indices``."""
        depth = len(self.layers)
        if indices is None:
            indices = depth
        if isinstance(indices, int):
            if not 0 < indices <= depth:
                raise UserError(f"indices={indices}: expected a number of blocks from 1 to {depth}.")
            return list(range(depth - indices, depth))
        for index in indices:
            if not -depth <= index < depth:
                raise UserError(f"indices={list(indices)}: the model has the blocks 0 to {depth - 1}, not {index}.")
        return [index % depth for index in indices]

    def _on_grid(self, state: TokenState) -> Tensor:
        """The tokens of the patches, (B, C, rows, columns)."""
        assert state.layout is not None
        if state.source is not None:
            return restore(state, state.layout.grid).to(state.raw_hidden.dtype)
        patches = state.layout.patch_positions(state.index.device).expand(state.index.shape[0], -1)
        return take(state.raw_hidden, patches).transpose(1, 2).unflatten(2, state.layout.grid)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what ``forward_intermediates`` does not need for these blocks, in place; returns their numbers.

        Raises:
            UserError: the model is patched, for a number of blocks that it will not have.
        """
        if self.reduction is not None:
            raise UserError("a patched model cannot lose blocks: call unpatch first, and patch what is left.")
        wanted = self.blocks_at(indices)
        self.layers = self.layers[: max(wanted) + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what flows between blocks for the backward pass, and recompute the rest: less memory, more time."""
        self.grad_checkpointing = enable

    def fit_weights(self, state: dict[str, Tensor], grid: Sequence[int] | None, label: str) -> bool:
        """Adapt weights of another grid, number of frames or of channels to the model's, in place.

        Position embeddings are interpolated, see ``resize_channels`` for the patch convolution.

        Args:
            state: the state dict.
            grid: (rows, columns) of its position embeddings; ``None`` for a square one where that is possible.
            label: of the weights, for errors.

        Returns:
            Whether the weights are for other channels.

        Raises:
            UserError: their number of patches fits no grid.
        """
        pos_embed = state.get("pos_embed")
        if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape[1] > 1:  # else it does not fit at all
            state["pos_embed"] = self._fit_positions(pos_embed, grid, label)
        temporal, frames = state.get("temporal_pos_embedding"), self.patch_embed.frames
        if temporal is not None and temporal.ndim == 3 and temporal.shape[1] not in (0, frames):
            resized = F.interpolate(temporal.float().transpose(1, 2), size=frames, mode="linear")
            state["temporal_pos_embedding"] = resized.transpose(1, 2)
        kernel = state.get("patch_embed.proj.weight")
        if kernel is None or kernel.ndim < 2 or kernel.shape[1] in (0, self.in_chans):
            return False
        state["patch_embed.proj.weight"] = resize_channels(kernel, self.in_chans)
        return True

    def _fit_positions(self, pos_embed: Tensor, stated: Sequence[int] | None, label: str) -> Tensor:
        """Position embeddings on the model's grid. Almost all that do not state their grid are of a square one."""
        patches, grid = pos_embed.shape[1] - 1, self.patch_embed.grid_size
        side = math.isqrt(patches)
        old = stated or ((side, side) if side * side == patches else grid)
        if len(old) != 2 or old[0] * old[1] != patches:
            model = f"not the {old[0]} x {old[1]} of the model"
            shape = f"not the {stated} its metadata states" if stated else model
            raise UserError(f"{label}: pos_embed has {patches} patches, {shape}, and no square grid either.")
        if tuple(old) == grid:
            return pos_embed
        places = self.class_position(patches), self.class_position(grid[0] * grid[1])
        return resize_positions(pos_embed.float(), places[0], (old[0], old[1]), places[1], grid)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters the authors exempt from weight decay, besides biases and norms."""
        states = {name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log", ".D", ".D_b"))}
        return {"pos_embed", "temporal_pos_embedding", "cls_token", *states}
