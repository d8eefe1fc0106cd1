"""Record the effect of a policy on an image, block by block, on the grid of its patches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from mtr_lab.backbones import Stage, as_backbone
from mtr_lab.pictures.regions import PatchGrid
from mtr_lab.reduction import Reduction, TracedBlock, trace_blocks


@dataclass(frozen=True)
class BlockView:
    """One image or video after one block. Maps over patches are (rows, columns); of a video (frames, rows, columns)."""

    grid: PatchGrid
    """The patch grid of the block's stage, for one frame."""
    unreduced: int
    """Number of tokens in the stage without reduction, class token included."""
    entered: int
    """Number of tokens that enter the block; for the first block, including those removed at the embedding."""
    tokens: int
    """Number of tokens after the block."""
    source: np.ndarray
    """int map, the token that each patch was merged into; ``DROPPED`` if its token was dropped."""
    removed: np.ndarray
    """bool map, whether this block removed the patch's token."""
    score: np.ndarray | None
    """float map, the score by which this block chose, NaN for tokens removed before; None if it used no score."""


@dataclass(frozen=True)
class Observation:
    """One image or video, and its tokens after every block under one policy."""

    image: np.ndarray
    """(H, W, 3) uint8 after preprocessing; a video is (T, H, W, 3)."""
    backbone: str
    policy: str
    score: str
    """The name of the score."""
    score_words: str
    """What the score is."""
    reduction: float
    """Share of the FLOPs that the policy removes."""
    blocks: tuple[BlockView, ...]

    @property
    def reducing(self) -> list[int]:
        """The blocks that remove tokens; the last block if none does."""
        reducing = [number for number, view in enumerate(self.blocks) if view.tokens < view.entered]
        return reducing or [len(self.blocks) - 1]


@torch.no_grad()
def observe(model: Any, reduction: Reduction, images: Tensor) -> list[Observation]:
    """Run images through a patched model and record what the policy does to each.

    Args:
        model: patched by ``reduction``.
        images: (B, 3, H, W), or videos (B, 3, T, H, W), normalised as the model's weights expect.

    Returns:
        One observation per image or video.

    Raises:
        UserError: the images do not fit the patch grid, or the model is no longer patched by ``reduction``.
    """
    reduction.use(reduction.schedule)  # raises if the model was unpatched or patched again
    model = as_backbone(model, "observe")
    stages = [(stage, block is stage.blocks[0]) for stage in model.stages for block in stage.blocks]
    video = len(model.input_shape) == 4
    traced = zip(trace_blocks(model, images), stages, strict=True)
    views = [_view(block, *stage, video) for block, stage in traced]
    return [
        Observation(
            image=pixels,
            backbone=getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__),
            policy=reduction.policy.policy,
            score=reduction.policy.score,
            score_words=reduction.policy.scoring.words,
            reduction=reduction.schedule.reduction,
            blocks=tuple(view[i] for view in views),
        )
        for i, pixels in enumerate(_pixels(model, model.reduction.on_picture(images)))
    ]


def _view(block: TracedBlock, stage: Stage, is_first: bool, video: bool) -> list[BlockView]:
    before, after, score = block.before, block.after, block.score
    layout = after.layout
    assert layout is not None
    assert after.source is not None
    patches = layout.patch_positions(after.source.device).expand(len(after.source), -1)
    everywhere = torch.zeros(after.source.shape, dtype=torch.float32, device=after.source.device)

    def over_patches(values: Tensor) -> np.ndarray:
        """Values at the original positions (B · sequences, L0) -> maps over patches (B, *)."""
        maps = values.gather(1, patches).unflatten(1, (layout.frames, *layout.grid))
        maps = layout.join(maps)
        return (maps if video else maps[:, 0]).cpu().numpy()

    # Tokens are numbered consecutively over the sequences of an image.
    first = torch.arange(len(after.source), device=after.source.device) % layout.sequences * after.index.shape[1]
    source = over_patches(torch.where(after.source < 0, after.source, after.source + first[:, None]))
    # Tokens removed at the embedding are shown as removed by the first block.
    present = everywhere + 1 if is_first else everywhere.scatter(1, before.index, 1)
    removed = over_patches(present.scatter(1, after.index, 0)) > 0
    scores = None if score is None else over_patches((everywhere + torch.nan).scatter(1, before.index, score))
    rows, columns = source.shape[-2:]
    grid = PatchGrid(rows, columns, stage.patch_size, stage.stride)
    lengths = layout.tokens, layout.tokens if is_first else before.index.shape[1], after.index.shape[1]
    unreduced, entered, tokens = (length * layout.sequences for length in lengths)
    return [
        BlockView(grid, unreduced, entered, tokens, source[i], removed[i], None if scores is None else scores[i])
        for i in range(len(source))
    ]


def _pixels(model: Any, images: Tensor) -> np.ndarray:
    """Normalised images or videos (B, 3, *) -> (B, *, 3) uint8."""
    data_config = resolve_model_data_config(model)
    mean, std = (images.new_tensor(data_config[key]) for key in ("mean", "std"))
    return ((images.movedim(1, -1) * std + mean).clamp(0, 1) * 255).round().byte().cpu().numpy()
