"""Pictures: an image through the depth of the model, still and animated, and an image under several policies."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from mtr_lab.errors import UserError
from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page, replacing, save_picture, write_gif
from mtr_lab.pictures.panels import PAPER, image_panel, score_panel, token_panel

_SIDE = 300  # an image is enlarged to at least so many pixels
TOKENS = "outlined: patches merged into one token, which may have regions apart, of one colour  ·  pale: dropped"
_SCORES = "cross: removed by this block  ·  grey: removed before"
_FRAME_MS, _LAST_FRAME_MS = 700, 2500


def depth_sheet(observation: Observation, blocks: Sequence[int] | None = None) -> Image.Image:
    """One row a block: the input, the tokens that survive the block, and the scores by which it chose them.

    Args:
        observation: an image under a policy.
        blocks: from 0; by default up to four of those that reduce, evenly spread.

    Raises:
        UserError: there is no such block.
    """
    headings = ["", "input", "surviving tokens", f"score: {observation.score}"]
    rows = [
        [
            label(f"block {block}", token_count(observation, block)),
            image_panel(observation.image, _scale(observation)),
            *_panels(observation, block),
        ]
        for block in chosen_blocks(observation, blocks)
    ]
    return page(title(observation), [[label(heading) for heading in headings], *rows], f"{TOKENS}\n{_SCORES}")


def depth_frames(observation: Observation) -> list[Image.Image]:
    """The surviving tokens and the scores, a frame for each block that reduces; all of one size."""
    pages = []
    for block in observation.reducing:
        headings = [label(f"block {block}", token_count(observation, block)), label(f"score: {observation.score}")]
        pages.append(page(title(observation), [headings, _panels(observation, block)], f"{TOKENS}\n{_SCORES}"))
    frames = []
    for picture in pages:
        frames.append(Image.new("RGB", (max(p.width for p in pages), max(p.height for p in pages)), PAPER))
        frames[-1].paste(picture, (0, 0))
    return frames


def policy_strip(observations: Sequence[Observation]) -> Image.Image:
    """The input, and what each of several policies has left of it after the last block.

    Args:
        observations: the same image under each of them.
    """
    first = observations[0]
    headings = [label("input", f"{first.blocks[0].entered} tokens")]
    panels = [image_panel(first.image, _scale(first))]
    for observation in observations:
        last = observation.blocks[-1]
        headings.append(
            label(observation.policy, f"{percent(observation)} of FLOPs removed\n{last.tokens} tokens left")
        )
        panels.append(token_panel(observation.image, last, _scale(observation)))
    return page(f"{first.backbone}  ·  after the last block", [headings, panels], TOKENS)


def write_animation(observation: Observation, stream: BinaryIO) -> None:
    """Write ``depth_frames`` as a GIF that goes round for ever and rests on the last frame."""
    write_gif(depth_frames(observation), stream, _FRAME_MS, _LAST_FRAME_MS)


def save_depth(observation: Observation, blocks: Sequence[int] | None, stem: Path) -> list[Path]:
    """Write ``depth_sheet`` to ``stem``.png and ``write_animation`` to ``stem``.gif.

    Raises:
        UserError: there is no such block, or nothing can be written there.
    """
    sheet = save_picture(depth_sheet(observation, blocks), stem.with_name(f"{stem.name}.png"))
    animation = stem.with_name(f"{stem.name}.gif")
    with replacing(animation) as stream:
        write_animation(observation, stream)
    return [sheet, animation]


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raise a ``UserError`` unless a model of ``depth`` blocks has these."""
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(f"there is no block {block}: the model has blocks 0 to {depth - 1}.")


def chosen_blocks(observation: Observation, blocks: Sequence[int] | None) -> Sequence[int]:
    """The blocks asked for, from 0, or up to four of those that reduce, evenly spread.

    Raises:
        UserError: there is no such block.
    """
    check_blocks(blocks or (), len(observation.blocks))
    return evenly_spaced(observation.reducing, 4) if blocks is None else blocks


def _panels(observation: Observation, block: int) -> list[Image.Image]:
    view, scale = observation.blocks[block], _scale(observation)
    return [token_panel(observation.image, view, scale), score_panel(view, scale)]


def _scale(observation: Observation) -> int:
    return -(-_SIDE // max(observation.image.shape[:2]))


def evenly_spaced(blocks: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` of the blocks, evenly spread from the first to the last."""
    if len(blocks) <= count:
        return list(blocks)
    return [blocks[round(i * (len(blocks) - 1) / (count - 1))] for i in range(count)]


def percent(observation: Observation) -> str:
    """The share of the FLOPs that is gone."""
    return f"{100 * observation.reduction:.1f} %"


def token_count(observation: Observation, block: int) -> str:
    """How many tokens are left after a block."""
    view = observation.blocks[block]
    return f"{view.tokens} of {view.unreduced} tokens"


def title(observation: Observation) -> str:
    """The backbone, the policy, and what it saves."""
    return f"{observation.backbone}  ·  {observation.policy}  ·  {percent(observation)} of FLOPs removed"
