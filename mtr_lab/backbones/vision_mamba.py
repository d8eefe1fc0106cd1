"""The classifier the families are cases of: patches and a class token through bidirectional Mamba blocks."""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.bimamba import BiMamba, Block, RMSNorm, drop_path_rates, initialise
from mtr_lab.backbones.drop_path import DropPath
from mtr_lab.backbones.patch_embed import PatchEmbed, height_and_width, resize_positions
from mtr_lab.backbones.token_state import TokenState
from mtr_lab.errors import UserError


class VisionMamba(nn.Module, ABC):
    """Vision Mamba classifier. A family says where the class token stands and whether the directions are halved.

    It takes images (B, channels, H, W), or with ``num_frames`` videos (B, channels, T, H, W) wherever images are named.

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

    Raises:
        UserError: the sizes do not fit each other; ``num_frames`` of a family for images alone.
    """

    halve: bool
    """Whether a block divides the sum of its two directions by two."""
    video = False
    """Whether there are models for videos in the family. The class token leads in them."""
    pretrained_cfg: dict[str, Any]
    """timm's data configuration of the weights, ``input_size`` and ``label_names`` included."""
    num_classes: int
    """Outputs of the head, 0 without one."""
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
    ) -> None:
        super().__init__()
        if num_frames is not None and not self.video:
            raise UserError(
                f"num_frames={num_frames}: {type(self).__name__} takes images alone, VideoMamba videos too."
            )
        self.num_features = self.embed_dim = embed_dim
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
            Block(BiMamba(embed_dim, d_state, halve=self.halve), rate)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()  # of the last block's output
        self.norm_f = RMSNorm(embed_dim)
        self.reset_classifier(num_classes)
        initialise(self, depth)

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.layers))

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

    def embed(self, images: Tensor, *, traced: bool = False) -> TokenState:
        """Images (B, channels, H, W) to the state before the first block; any size that fits the patch grid.

        In half precision on a GPU, without gradients, one kernel does it all, unless ``patch_embed`` has a hook or an
        adapter on it and has to be called.
        """
        positions = self.positions(self.patch_embed.grid_of(images))
        place = self.class_position(positions.shape[1] - 1)
        if self.patch_embed.fuses:
            proj = self.patch_embed.proj
            inputs = (images, proj.weight, cast(Tensor, proj.bias), self.cls_token, positions)
            if ops.makes_tokens(*inputs):
                return TokenState.start(ops.patch_tokens(*inputs, place), [place], traced=traced)
        tokens = ops.add_class_token(self.patch_embed(images), self.cls_token, positions, place)
        return TokenState.start(tokens, [place], traced=traced)

    def forward_state(self, images: Tensor, *, traced: bool = False) -> TokenState:
        """All blocks: (B, channels, H, W) -> the state after the last one, before the final norm."""
        state = self.embed(images, traced=traced)
        for block in self.blocks:
            state = TokenState(*block(*state))
        state = state.settled()
        return state._replace(hidden=self.drop_path(state.hidden))

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised class token, (B, C)."""
        return self.class_features(self.forward_state(images))

    def class_features(self, state: TokenState) -> Tensor:
        """The state after the last block -> the normalised class token, (B, C)."""
        normed, _ = self.norm_f(state.special_tokens())
        return normed[:, 0].to(self.norm_f.weight.dtype)

    def reset_classifier(self, num_classes: int) -> None:
        """A new, untrained head; none for 0 classes."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C) -> logits (B, num_classes)."""
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters the authors exempt from weight decay, besides biases and norms."""
        states = {name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log", ".D", ".D_b"))}
        return {"pos_embed", "temporal_pos_embedding", "cls_token", *states}
