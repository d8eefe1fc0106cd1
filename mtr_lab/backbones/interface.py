"""The interface of a backbone, and the loop over its blocks.

All code outside a family uses this interface alone. A backbone is any module with these members, of any base class.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtr_lab.backbones.costs import Costs
from mtr_lab.backbones.stage import Block, Stage
from mtr_lab.tokens import Layout, TokenState, fit_grid


class ModelReduction(Protocol):
    """What ``patch`` attaches to a backbone: the policy and the schedule in force."""

    @property
    def key(self) -> Any:
        """Hashable; equal if and only if the forward pass is the same. ``None`` for the unreduced one."""

    @property
    def reads_source(self) -> bool:
        """Whether blocks read ``source`` of their tokens."""

    @property
    def merges_tokens(self) -> bool:
        """Whether blocks merge tokens and drop none, and the rest is not a full grid."""

    def on_picture(self, images: Tensor) -> Tensor:
        """The images that the backbone gets instead."""

    def on_embedding(self, state: TokenState, images: Tensor, model: "Backbone") -> TokenState:
        """The tokens before the first block, with a pending plan if some are removed; ``images`` are those embedded."""


class Backbone(Protocol):
    """A classifier whose stages consist of blocks; a module. B images, C channels, K classes."""

    # A backbone whose head may read the special tokens alone has ``reads_special_alone``, too, whether it does: it then
    # passes ``special_alone=True`` to ``last_state``, and a policy may let the last block compute these tokens alone.

    reduction: Any
    """The ``ModelReduction`` in force, ``None`` for none; set and removed by ``mtr_lab.reduction``."""

    @property
    def stages(self) -> Sequence[Stage]:
        """In the order in which tokens pass through them."""

    @property
    def num_classes(self) -> int:
        """Outputs of the head, 0 without one."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of an image, or (channels, T, H, W) of a video, of the model's own size."""

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head, called as the norms of blocks: (hidden, residual, plan) -> (normed, residual)."""

    def layouts(self, img_size: Sequence[int] | None = None) -> list[Layout]:
        """The tokens of each stage for images of (height, width), by default the model's own.

        Raises:
            UserError: the size does not fit.
        """

    def embed(self, images: Tensor) -> TokenState:
        """Images -> the state before the first block."""

    def enter(self, stage: int, state: TokenState) -> TokenState:
        """The state after the last block of the stage before -> the state before the first block of ``stage``."""

    def classify(self, state: TokenState) -> Tensor:
        """The state after the last block -> logits (B, K)."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, by none for 0 classes."""

    def costs(self, layouts: Sequence[Layout]) -> Costs:
        """The costs outside the blocks for one image: the embedding, the transitions between stages, the head."""


def remove_head(model: Backbone) -> None:
    """Remove the head; a model whose pooling has parameters (``pooling_without_head``) then pools in another way."""
    model.reset_classifier(0, getattr(model, "pooling_without_head", None))


MEMBERS = tuple(sorted(set(Backbone.__annotations__) | {name for name in vars(Backbone) if not name.startswith("_")}))


def missing_members(model: object) -> list[str]:
    """The members of :class:`Backbone` that an object lacks, none if it is a backbone."""
    return [name for name in MEMBERS if not hasattr(model, name)]


def blocks_of(model: Backbone) -> list[Block]:
    """The blocks of all stages in order."""
    return [block for stage in model.stages for block in stage.blocks]


def first_state(
    model: Backbone,
    images: Tensor,
    *,
    traced: bool = False,
    tracking_offset: bool = False,
    special_alone: bool = False,
    maps: list[Tensor] | None = None,
) -> TokenState:
    """Images (B, channels, H, W) -> the state before the first block, after the policy has acted on both.

    Args:
        traced: track ``source``. A reduced model that needs it later, for another stage or for a mixer that convolves
            over the original positions, tracks it anyway.
        tracking_offset: track ``offset``, too, for the restoration ``skip``. A model that restores its stages so
            (``restoration = "skip"``) tracks it anyway while tokens merge. Dropped ones gain nothing, and the nearest
            survivor is the better guess.
        special_alone: after the last block, a head reads the special tokens alone.
        maps: gets the maps of the model's convolutional levels, if it has any, (B, C, rows, columns) each.
    """
    reduction = model.reduction
    picture = images if reduction is None else reduction.on_picture(images)
    levels = convolutional_levels(model)
    if maps is None or not levels:
        state = model.embed(picture)
    else:
        state = model.embed(picture, maps)  # type: ignore[call-arg]
        height, width = images.shape[-2:]
        for number, (_, stride) in enumerate(levels):  # of a picture that the policy resizes, too
            maps[number] = fit_grid(maps[number], (-(-height // stride), -(-width // stride)))
    state = state._replace(special_alone=special_alone)
    if reduction is not None and reduction.merges_tokens and len(model.stages) > 1:
        tracking_offset = tracking_offset or getattr(model, "restoration", None) == "skip"
    if traced or tracking_offset or (reduction is not None and (reduction.reads_source or _needs_source(model))):
        state = state.traced()
    if tracking_offset:
        state = state.tracking_offset()
    return state if reduction is None else reduction.on_embedding(state, picture, model)


def convolutional_levels(model: Backbone) -> Sequence[tuple[int, int]]:
    """(width, stride) of the levels without tokens, before the first stage.

    A model that has any lists them as ``convolutional``, and its ``embed`` takes a list, to which it adds their maps.
    """
    levels: Sequence[tuple[int, int]] = getattr(model, "convolutional", ())
    return levels


def _needs_source(model: Backbone) -> bool:
    return len(model.stages) > 1 or any(getattr(block.mixer, "reads_grid", False) for block in blocks_of(model))


def run(model: Backbone, state: TokenState, first: int = 0) -> Iterator[tuple[TokenState, TokenState]]:
    """Run the blocks from number ``first`` on; yields the states before and after each block.

    With ``model.grad_checkpointing``, the activations of a block are computed again in the backward pass.

    Args:
        state: the state before block ``first``.
    """
    start = 0
    for number, stage in enumerate(model.stages):
        if first < start:
            before, state = state, model.enter(number, state)
            state = state._replace(special_alone=before.special_alone)
            state = state if before.source is None else state.traced()
            state = state if before.offset is None else state.tracking_offset()
        for block in stage.blocks[max(first - start, 0) :]:
            after = run_block(model, block, state)
            yield state, after
            state = after
        start += len(stage.blocks)


def run_block(model: Backbone, block: Block, state: TokenState) -> TokenState:
    """The state before a block -> the state after it."""
    if getattr(model, "grad_checkpointing", False) and torch.is_grad_enabled():
        return TokenState(*checkpoint(block, *state, use_reentrant=False))
    return TokenState(*block(*state))


def last_state(model: Backbone, images: Tensor, *, special_alone: bool = False) -> TokenState:
    """Images (B, channels, H, W) -> the state after the last block; ``special_alone`` as in ``first_state``."""
    state = first_state(model, images, special_alone=special_alone)
    for _, after in run(model, state):
        state = after
    return state
