"""timm's interface of a classifier whose stages form a pyramid: a feature map a stage, no class token."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones.interface import ModelReduction, first_state, last_state, run
from mtr_lab.errors import UserError, unknown
from mtr_lab.tokens import TokenState, fit_grid, restore

POOLINGS = ("avg", "")
"""``avg``: the mean of the map, of a reduced one weighted by the sizes of its tokens. ``""``: no pooling."""


class TimmPyramid(nn.Module, ABC):
    """timm's methods for a :class:`Backbone` without special tokens whose levels are modules of a list.

    The first levels may be convolutional; the others are the stages. The map of a level is that of its last block,
    before the grid is made coarser.
    """

    level_modules = "layers"
    """The name of the list."""
    final_norm: nn.Module
    head_drop: nn.Module
    global_pool = "avg"
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
    num_prefix_tokens = 0

    @property
    @abstractmethod
    def stages(self) -> Sequence[Any]:
        """See :class:`Backbone`."""

    @property
    def convolutional(self) -> Sequence[tuple[int, int]]:
        """(width, stride) of the convolutional levels. If there are any, ``embed`` takes a list for their maps."""
        return ()

    @abstractmethod
    def check(self, images: Tensor) -> None:
        """Raise a ``UserError`` unless shape and dtype are those of images."""

    @abstractmethod
    def get_classifier(self) -> nn.Module:
        """The head."""

    @abstractmethod
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head; none for 0 classes."""

    def forward_state(self, images: Tensor) -> TokenState:
        """(B, channels, H, W) -> the state after the last block."""
        self.check(images)  # a policy may resize them first
        return last_state(self, images)  # type: ignore[arg-type]

    def normalise(self, state: TokenState) -> Tensor:
        """The residual stream after the final norm, (B, L, C), in the dtype of the parameters."""
        state = state.applied()
        if isinstance(self.final_norm, nn.Identity):  # removed by prune_intermediate_layers
            return state.stream.to(state.raw_hidden.dtype)
        normed, _ = self.final_norm(state.raw_hidden, state.raw_residual)
        return normed.to(next(self.parameters()).dtype)

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised map of the last stage, (B, channels, H, W) -> (B, C, rows, columns).

        Of a reduced sequence, restored: each position has the token that absorbed it.
        """
        return self._map(self.forward_state(images), norm=True)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (B, C, rows, columns), or pooled features (B, C) -> logits (B, num_classes).

        Args:
            pre_logits: return the input of the head.
        """
        if features.ndim == 4:
            features = features.mean((2, 3)) if self.global_pool == "avg" else features.permute(0, 2, 3, 1)
        features = self.head_drop(features)
        return features if pre_logits else self.get_classifier()(features)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each level: the channels of its map, its stride in pixels, and the name of the module."""
        levels = [*self.convolutional, *((stage.width, stage.stride) for stage in self.stages)]
        return [
            {"num_chs": width, "reduction": stride, "module": f"{self.level_modules}.{number}"}
            for number, (width, stride) in enumerate(levels)
        ]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of several levels, with timm's arguments; the map of a stage is the residual stream after it.

        For a patched model the whole grid of each stage is restored.

        Args:
            images: (B, channels, H, W).
            indices: the levels, negative ones from the end; the last n for an integer n, all for ``None``.
            norm: apply the final norm to the map of the last level, which alone has its width.
            stop_early: run no more stages than needed.
            output_fmt: ``NCHW`` for maps (B, C, rows, columns), ``NHWC`` for (B, rows, columns, C).
            intermediates_only: leave the final features out.

        Returns:
            The final features, as ``forward_features``, and the list of maps in the order of the levels.

        Raises:
            UserError: a level that does not exist, or another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise UserError(f"output_fmt={output_fmt}: expected NCHW or NHWC.")
        self.check(images)
        backbone: Any = self
        wanted, last = self.blocks_at(indices), len(self.feature_info) - 1
        grids = [layout.image_grid for layout in backbone.layouts(images.shape[-2:])]
        ends = {stage.blocks[-1]: number for number, stage in enumerate(self.stages)}
        blocks = [block for stage in self.stages for block in stage.blocks]
        first: list[Tensor] = []
        state = first_state(backbone, images, traced=self.reduction is not None, maps=first)
        maps = [map for number, map in enumerate(first) if number in wanted]
        for block, (_, after) in zip(blocks, run(backbone, state), strict=False):
            if stop_early and max(wanted) < len(first):
                break
            state, stage = after, ends.get(block)
            if stage is not None and (number := len(first) + stage) in wanted:
                maps.append(fit_grid(self._map(state, norm=norm and number == last), grids[stage]))
                if stop_early and number == max(wanted):
                    break
        maps = [map.contiguous() if output_fmt == "NCHW" else map.permute(0, 2, 3, 1) for map in maps]
        return maps if intermediates_only else (self._map(state, norm=True), maps)

    def _map(self, state: TokenState, norm: bool) -> Tensor:
        state = state.applied()
        tokens = self.normalise(state) if norm else state.stream.to(state.raw_hidden.dtype)
        layout = state.current_layout if state.source is None else state.layout
        assert layout is not None
        return layout.join(restore(state.with_streams(tokens, None), layout.grid)).to(tokens.dtype)

    def blocks_at(self, indices: int | Sequence[int] | None) -> list[int]:
        """The numbers of the levels for the ``indices`` of ``forward_intermediates``."""
        number = len(self.feature_info)
        indices = number if indices is None else indices
        if isinstance(indices, int):
            if not 0 < indices <= number:
                raise UserError(f"indices={indices}: expected a number of levels from 1 to {number}.")
            return list(range(number - indices, number))
        for index in indices:
            if not -number <= index < number:
                raise UserError(f"indices={list(indices)}: the model has the levels 0 to {number - 1}, not {index}.")
        return [index % number for index in indices]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all that ``forward_intermediates`` does not need for these levels, in place; returns their numbers.

        The first stage stays.

        Raises:
            UserError: the model is patched, for its present number of blocks.
        """
        if self.reduction is not None:
            raise UserError("a patched model cannot lose blocks: call unpatch first, and patch it again afterwards.")
        wanted, levels = self.blocks_at(indices), getattr(self, self.level_modules)
        kept = max(max(wanted), len(self.convolutional)) + 1
        setattr(self, self.level_modules, levels[:kept])
        if prune_norm or kept < len(levels):
            self.remove_norm()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    @abstractmethod
    def remove_norm(self) -> None:
        """Leave the final norm out."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the tokens between blocks for the backward pass and compute the rest again: less memory, slower."""
        self.grad_checkpointing = enable

    def check_pooling(self, how: str) -> None:
        """Raise a ``UserError`` unless ``how`` is one of ``POOLINGS``."""
        if how not in POOLINGS:
            raise unknown("global_pool", how, map(repr, POOLINGS))
