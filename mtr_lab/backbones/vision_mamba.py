"""The classifier behind Vim, VideoMamba and Mamba-Reg: patches and special tokens in blocks of bidirectional Mamba."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.adaptation import fit_positions, resize_channels, resize_frames, resize_positions
from mtr_lab.backbones.bimamba import BiMamba
from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.drop_path import DropPath, drop_path_rates
from mtr_lab.backbones.interface import last_state
from mtr_lab.backbones.norms import RMSNorm
from mtr_lab.backbones.patch_embed import PatchEmbed, evenly, height_and_width
from mtr_lab.backbones.stage import Block, Stage
from mtr_lab.backbones.timm_interface import TimmInterface
from mtr_lab.errors import UserError
from mtr_lab.tokens import Layout, TokenState
from mtr_lab.tokens.pooling import check_pooling, mean_by_size, special_first


class VisionMamba(TimmInterface):
    """Vision Mamba classifier. A family sets the special tokens, by default a class token, and how directions combine.

    Images are (B, channels, H, W); with ``num_frames`` they are videos (B, channels, T, H, W). Names are the authors',
    and the interface is that of timm's models, too. ``torch.compile`` and ``torch.export`` work; ``torch.jit.script``
    and symbolic tracing with ``torch.fx`` do not.

    Args:
        img_size: pixels of a side, or (height, width).
        patch_size, stride: of the patch convolution. The default stride is the patch size; with a smaller one patches
            overlap.
        depth: number of blocks.
        embed_dim: width C.
        d_state: N, states a channel.
        channels: of the input image.
        num_classes: 0 for no head.
        drop_path_rate: stochastic depth of the last block while training; it falls linearly towards the first block.
        num_frames: T, the frames of a video; None for images.
        kernel_size: frames in a patch of a video; it divides T.
        drop_rate: dropout before the head while training.
        global_pool: pooling before the head, one of ``mtr_lab.tokens.pooling.POOLINGS``.
        norm_epsilon: ε of all norms.

    Raises:
        UserError: sizes that do not fit each other, ``num_frames`` for a family of image models, or an unknown pooling.
    """

    stands_for: ClassVar[Mapping[str, str]] = {"forward": "forward", "forward_features": "pooled"}
    """By the names of methods of the authors' class: our methods that compute the same."""
    average_directions: bool
    """Whether a block divides the sum of its two directions by two; else it is their sum."""
    video = False
    """Whether the family has models for videos; in these the class token is the first token."""

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
        norm_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_frames is not None and not self.video:
            raise UserError(
                f"num_frames={num_frames}: {type(self).__name__} takes images only; VideoMamba takes videos, too."
            )
        self.num_features = self.embed_dim = embed_dim
        self.in_chans = channels
        self.patch_embed = PatchEmbed(
            height_and_width(img_size), patch_size, stride or patch_size, channels, embed_dim, num_frames, kernel_size
        )
        self.norm_epsilon = norm_epsilon
        self.add_special_tokens(self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1])
        self.temporal_pos_embedding = (
            None if num_frames is None else nn.Parameter(torch.zeros(1, self.patch_embed.frames, embed_dim))
        )
        self.layers = nn.ModuleList(
            Block(
                BiMamba(embed_dim, d_state, average_directions=self.average_directions),
                RMSNorm(embed_dim, norm_epsilon),
                drop_path=rate,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()  # of the last block's output
        self.norm_f: RMSNorm | nn.Identity = RMSNorm(embed_dim, norm_epsilon)
        self.head_drop = nn.Dropout(drop_rate) if drop_rate > 0 else nn.Identity()
        self.grad_checkpointing = False
        self.pretrained_cfg = self.default_cfg = {}
        self.reset_classifier(num_classes, global_pool)
        self.initialise()

    def add_special_tokens(self, patches: int) -> None:
        """Add the parameters of the special tokens and the position embeddings, for that many patches."""
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, self.embed_dim))

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.layers))

    @property
    def stages(self) -> list[Stage]:
        """One stage with all blocks."""
        return [Stage(self.blocks, self.embed_dim, self.patch_embed.stride, self.patch_embed.patch_size)]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of one image, or (channels, T, H, W) of one video."""
        return self.patch_embed.input_shape

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return self.norm_f

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        """The tokens of an image (or video) of (height, width), by default of the model's own size.

        A video may be shorter than the model's: (frames, height, width).

        Raises:
            UserError: the size does not fit the patch grid.
        """
        *length, height, width = img_size or self.patch_embed.img_size
        frames = self.patch_embed.frames_of(*length) if length else self.patch_embed.frames
        return [self._layout(self.patch_embed.grid(height, width), frames)]

    def _layout(self, grid: tuple[int, int], frames: int = 1) -> Layout:
        return Layout(*grid, special=self.special_positions(frames * grid[0] * grid[1]), frames=frames)

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        """The costs of patch embedding and head. The literature charges the embedding for special tokens, too."""
        embedding, head = self.patch_embed.proj.weight.numel(), self.head_products()
        (layout,) = layouts
        return Costs(2 * (layout.patches * embedding + head), layout.tokens * embedding + head)

    @property
    def head_hidden_size(self) -> int:
        """The width of the head's input."""
        return self.embed_dim

    def head_products(self) -> int:
        """The multiply-accumulates of the head, for one image."""
        return self.head_hidden_size * self.num_classes

    @abstractmethod
    def initialise(self) -> None:
        """Give all parameters the values that they have in the authors' code before training."""

    @abstractmethod
    def special_positions(self, patches: int) -> tuple[int, ...]:
        """The positions of the special tokens in an unreduced sequence with that many patches, ascending."""

    def embedded_positions(self, patches: int) -> tuple[int, ...]:
        """The entries of special tokens in ``pos_embed``, for that many patches."""
        return self.special_positions(patches)

    def positions(self, grid: tuple[int, int], frames: int = 1) -> Tensor:
        """Position embeddings (1, L, C) of all tokens of an image (or video) on a grid of (rows, columns).

        Those of a shorter video are of the frames that ``evenly`` keeps.
        """
        spatial: Tensor = self.pos_embed
        trained = self.patch_embed.grid_size
        if grid != trained:
            spatial = resize_positions(spatial, self.embedded_positions, trained, grid)
        if self.temporal_pos_embedding is None:
            return spatial
        class_entry, patches = spatial[:, :1], spatial[:, 1:]
        temporal: Tensor = self.temporal_pos_embedding
        if frames != self.patch_embed.frames:
            temporal = temporal[:, evenly(self.patch_embed.frames, frames)]
        patches = temporal[:, :, None] + patches[:, None]  # (1, frames, rows · columns, C)
        return torch.cat([class_entry, patches.flatten(1, 2)], dim=1)

    def embed(self, images: Tensor) -> TokenState:
        """Images (B, channels, H, W) to the state before the first block; any size that fits the patch grid.

        One fused operation, unless ``patch_embed`` has to be called: for overlapping patches, hooks and adapters.
        """
        grid = self.patch_embed.grid_of(images)
        frames = self.patch_embed.frames_of(images.shape[2]) if images.ndim == 5 else 1
        positions, layout = self.positions(grid, frames), self._layout(grid, frames)
        (position,) = layout.special
        if self.patch_embed.can_fuse:
            proj = self.patch_embed.proj
            tokens = ops.patch_tokens(images, proj.weight, proj.bias, self.cls_token, positions, position)
        else:
            tokens = ops.add_class_token(self.patch_embed(images), self.cls_token, positions, position)
        return TokenState.start(tokens, layout.special, layout)

    @property
    def reads_special_alone(self) -> bool:
        """Whether the model has a head and it reads the special tokens alone."""
        return self.num_classes > 0 and self.global_pool == "token"

    def _state_of_head(self, images: Tensor) -> TokenState:
        """As ``forward_state``; if the head reads the special tokens alone, the streams may be of these alone."""
        self.patch_embed.check(images)  # a policy may resize them first
        return self.finish(last_state(self, images, special_alone=self.reads_special_alone))

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens, normalised, the special tokens first: (B, channels, H, W) -> (B, L, C).

        Of a reduced sequence, the survivors in their order.
        """
        return self.class_first(self.forward_state(images))

    def pooled(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> what the head reads of the special tokens: the normalised class token, (B, C)."""
        return self.class_features(self._state_of_head(images))

    def class_features(self, state: TokenState) -> Tensor:
        """The state after the last block -> what the head reads of the special tokens: the class token, (B, C)."""
        return self.read_special(self._norm(state.special_tokens(), None))

    def classify(self, state: TokenState) -> Tensor:
        """The state after the last block -> the logits of ``forward``."""
        if self.global_pool == "token":  # only special tokens need the final norm
            features = self.class_features(state)
        elif self.global_pool == "avg":
            features = mean_by_size(self.normalise(state), state)
        else:
            features = self.class_first(state)
        return self.head(self.head_drop(features))

    def class_first(self, state: TokenState) -> Tensor:
        """As ``normalise``, the special tokens first."""
        return special_first(self.normalise(state), state.special)

    def normalise(self, state: TokenState) -> Tensor:
        """The residual stream after the final norm, (B, L, C)."""
        state = state.applied()
        return self._norm(state.raw_hidden, state.raw_residual)

    def _norm(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The final norm of the sum of both streams, (B, L, C), in the dtype of the parameters."""
        if isinstance(self.norm_f, nn.Identity):  # removed by prune_intermediate_layers
            return (hidden if residual is None else hidden + residual).to(self.cls_token.dtype)
        normed, _ = self.norm_f(hidden, residual)
        return normed.to(self.norm_f.weight.dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head, none for 0 classes; and another pooling, unless ``global_pool`` is ``None``.

        Raises:
            UserError: an unknown pooling.
        """
        if global_pool is not None:
            check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(self.cls_token.device, self.cls_token.dtype)
        if self.pretrained_cfg.get("num_classes", num_classes) != num_classes:
            self.pretrained_cfg |= {"num_classes": num_classes, "label_names": None}

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, num_classes); without pooling, of each token, (B, L, num_classes)."""
        return self.classify(self._state_of_head(images))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the tensors, with the versions of the modules: position embeddings do not tell rows from columns.
        if prefix.removesuffix(".") in getattr(destination, "_metadata", {}):
            destination._metadata[prefix.removesuffix(".")]["grid_size"] = self.patch_embed.grid_size

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        stated, grid = local_metadata.get("grid_size"), self.patch_embed.grid_size
        if stated is not None and tuple(stated) != grid and math.prod(stated) == math.prod(grid):
            messages = others[-1]
            messages.append(
                f"{prefix}pos_embed is that of {stated[0]} x {stated[1]} patches, the model has {grid[0]} x {grid[1]}: "
                "create_model(..., checkpoint=FILE) interpolates it."
            )

    def fit_weights(self, state: dict[str, Tensor], grid: Sequence[int] | None, label: str) -> bool:
        """Adapt weights of another grid, number of frames or number of channels to the model's, in place.

        Args:
            state: the state dict.
            grid: (rows, columns) of its position embeddings; ``None`` for a square one.
            label: of the weights, for errors.

        Returns:
            Whether the weights are for other channels.

        Raises:
            UserError: their number of patches fits no grid.
        """
        positions, temporal = state.get("pos_embed"), state.get("temporal_pos_embedding")
        embed, kernel = self.patch_embed, state.get("patch_embed.proj.weight")
        # Tensors of a wrong shape are left to the check of all shapes.
        special = len(self.embedded_positions(0))
        if positions is not None and positions.ndim == 3 and positions.shape[1] > special and positions.shape[2] > 0:
            state["pos_embed"] = fit_positions(positions, grid, embed.grid_size, self.embedded_positions, label)
        if temporal is not None and temporal.ndim == 3 and temporal.numel() > 0 and temporal.shape[1] != embed.frames:
            state["temporal_pos_embedding"] = resize_frames(temporal, embed.frames)
        if kernel is None or kernel.ndim < 2 or kernel.shape[1] in (0, self.in_chans):
            return False
        state["patch_embed.proj.weight"] = resize_channels(kernel, self.in_chans)
        return True
