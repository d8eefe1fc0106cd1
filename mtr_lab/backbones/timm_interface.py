"""timm's interface of a classifier: its head, and the features of its blocks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones.interface import ModelReduction, first_state, last_state, run
from mtr_lab.errors import UserError
from mtr_lab.tokens import TokenState, fit_grid, restore
from mtr_lab.tokens.gather import take


class TimmInterface(nn.Module, ABC):
    """timm's methods for a :class:`Backbone` with special tokens whose only stage is ``layers``."""

    layers: nn.ModuleList
    patch_embed: Any
    pos_embed: nn.Parameter
    norm_f: nn.Module
    head: nn.Module
    head_drop: nn.Module
    drop_path: nn.Module
    embed_dim: int
    global_pool: str
    pretrained_cfg: dict[str, Any]
    """timm's data configuration, with ``input_size`` and ``label_names``."""
    default_cfg: dict[str, Any]
    """The older name of ``pretrained_cfg``."""
    num_classes: int
    """Outputs of the head, 0 without one."""
    reduction: ModelReduction | None = None
    """The policy in force; set and removed by ``mtr_lab.reduction``."""
    weights: dict[str, Any]
    """The origin of the parameters, see ``mtr_lab.backbones.weights.Weights``."""
    grad_checkpointing = False
    num_prefix_tokens = 1
    """The special tokens. They are the first ones of ``forward_features``, wherever they are between the blocks."""

    @abstractmethod
    def normalise(self, state: TokenState) -> Tensor:
        """The residual stream after the final norm, (B, L, C)."""

    @abstractmethod
    def class_first(self, state: TokenState) -> Tensor:
        """As ``normalise``, the special tokens first."""

    @abstractmethod
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head; none for 0 classes."""

    def enter(self, stage: int, state: TokenState) -> TokenState:
        """Raise an ``IndexError``: there is one stage."""
        raise IndexError(f"stage {stage} does not exist: the model has one stage, 0")

    def forward_state(self, images: Tensor) -> TokenState:
        """(B, channels, H, W) -> the input of the final norm."""
        self.patch_embed.check(images)  # a policy may resize them first
        return self.finish(last_state(self, images))  # type: ignore[arg-type]

    def finish(self, state: TokenState) -> TokenState:
        """The state after the last block -> the input of the final norm."""
        state = state.applied()
        return state.with_streams(self.drop_path(state.raw_hidden), state.raw_residual)

    def read_special(self, special: Tensor) -> Tensor:
        """The normalised special tokens (B, S, C) -> the input of the head: the first one, the class token (B, C)."""
        return special[:, 0]

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, L, C) of ``forward_features``, or pooled ones (B, C) -> logits (B, num_classes).

        Args:
            pre_logits: return the input of the head.

        Raises:
            UserError: the mean of a reduced sequence, for which the sizes of the tokens are missing.
        """
        if features.ndim == 3 and self.global_pool == "token":
            features = self.read_special(features[:, : self.num_prefix_tokens])
        elif features.ndim == 3 and self.global_pool == "avg":
            if self.reduction is not None and self.reduction.key is not None:
                raise UserError(
                    "global_pool='avg' of a patched model weights the tokens by their sizes, which forward_head does "
                    "not get: call the model itself, or classify(model.forward_state(images))."
                )
            features = features[:, self.num_prefix_tokens :].mean(1)
        features = self.head_drop(features)
        return features if pre_logits else self.get_classifier()(features)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each block: the channels of its feature map, its stride in pixels, and the name of the module."""
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

        For a patched model the whole grid of the images is restored, as by ``mtr_lab.tasks.features.FeatureMaps``,
        which has other restorations, too.

        Args:
            images: (B, channels, H, W).
            indices: the blocks, negative ones from the end; the last n for an integer n, all for ``None``.
            return_prefix_tokens: return the special tokens, (B, S, C), with each map.
            norm: apply the final norm to the maps.
            stop_early: run no more blocks than needed.
            output_fmt: ``NCHW`` for maps (B, C, rows, columns), ``NLC`` for tokens (B, rows · columns, C).
            intermediates_only: leave the final features out.

        Returns:
            The final features, as ``forward_features``, and the list of maps in the order of the blocks.

        Raises:
            UserError: a block that does not exist, another format, or a model for videos.
        """
        if self.patch_embed.num_frames is not None:
            raise UserError("feature maps need a model that takes images: create the model without num_frames.")
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt={output_fmt}: expected NCHW or NLC.")
        wanted = self.blocks_at(indices)
        self.patch_embed.check(images)  # a policy may resize them first
        backbone: Any = self
        grid = backbone.layouts(images.shape[-2:])[0].grid
        state, maps = first_state(backbone, images, traced=self.reduction is not None), []
        for i, (_, after) in enumerate(run(backbone, state)):
            state = after
            if i in wanted:
                state = state.applied()
                stream = self.normalise(state) if norm else state.stream
                stream = stream.to(self.pos_embed.dtype)
                tokens = fit_grid(_on_grid(state.with_streams(stream, None)), grid)
                tokens = tokens.contiguous() if output_fmt == "NCHW" else tokens.flatten(2).transpose(1, 2)
                maps.append((tokens, take(stream, state.special)) if return_prefix_tokens else tokens)
            if stop_early and i == max(wanted):
                break
        return maps if intermediates_only else (self.class_first(self.finish(state)), maps)

    def blocks_at(self, indices: int | Sequence[int] | None) -> list[int]:
        """The numbers of the blocks for the ``indices`` of ``forward_intermediates``."""
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

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all that ``forward_intermediates`` does not need for these blocks, in place; returns their numbers.

        Raises:
            UserError: the model is patched, for its present number of blocks.
        """
        if self.reduction is not None:
            raise UserError("a patched model cannot lose blocks: call unpatch first, and patch it again afterwards.")
        wanted = self.blocks_at(indices)
        self.layers = self.layers[: max(wanted) + 1]
        if prune_norm:
            self.remove_norm()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def remove_norm(self) -> None:
        """Leave the final norm out."""
        self.norm_f = nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the tokens between blocks for the backward pass and compute the rest again: less memory, slower."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors exempt from weight decay, besides biases and norms."""
        states = {
            name
            for name, _ in self.named_parameters()
            if name.endswith(("A_log", "A_b_log", ".D", ".D_b", ".direction_Bs"))
        }
        return {"pos_embed", "pos_embed_cls", "temporal_pos_embedding", "cls_token", *states}


def _on_grid(state: TokenState) -> Tensor:
    """The tokens of the patches, (B, C, rows, columns)."""
    assert state.layout is not None
    if state.source is not None:
        return restore(state, state.layout.grid).to(state.raw_hidden.dtype)
    patches = state.layout.patch_positions(state.index.device).expand(state.index.shape[0], -1)
    return take(state.raw_hidden, patches).transpose(1, 2).unflatten(2, state.layout.grid)
