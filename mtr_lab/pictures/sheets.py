"""Pictures of one image: its tokens through the depth of the model, as a sheet and animated; under several policies."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from mtr_lab.errors import UserError
from mtr_lab.pictures.marks import Sheet
from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page, save_picture, write_gif
from mtr_lab.pictures.panels import image_panel, score_panel, size_panel, token_panel
from mtr_lab.results.atomic import replace_output

_SIDE, _DENSE_SIDE = 300, 600  # smallest width or height of an enlarged image, in pixels
TOKENS = "outlined: patches merged into one token; its regions may be apart, in one colour  ·  pale: dropped"
SCORES = "cross: removed by this block  ·  grey: removed before"
Panel = Sheet | Image.Image
_FRAME_MS, _LAST_FRAME_MS = 700, 2500


def depth_sheet(observation: Observation, blocks: Sequence[int] | None = None, words: str = "") -> Sheet:
    """One row per block: the input, the tokens that survive the block, and the scores by which it chose them.

    Args:
        observation: an image, processed under a policy.
        blocks: numbers from 0; by default up to four of the blocks that reduce, evenly spaced.
        words: more lines below the title.

    Raises:
        UserError: there is no such block.
    """
    headings = [label(""), label("input"), label("surviving tokens"), _score_label(observation)]
    rows: list[list[Panel]] = [
        [
            label(f"block {block}", token_count(observation, block)),
            image_panel(observation.image, _scale(observation)),
            *_panels(observation, block),
        ]
        for block in chosen_blocks(observation, blocks)
    ]
    heading = f"{title(observation)}\n{words}" if words else title(observation)
    return page(heading, [headings, *rows], f"{TOKENS}\n{SCORES}")


def depth_frames(observation: Observation) -> list[Sheet]:
    """One frame per block that reduces: the surviving tokens and the scores."""
    frames = []
    for block in observation.reducing:
        headings = [label(f"block {block}", token_count(observation, block)), _score_label(observation)]
        frames.append(page(title(observation), [headings, _panels(observation, block)], f"{TOKENS}\n{SCORES}"))
    return frames


def _score_label(observation: Observation, block: int | None = None) -> Sheet:
    place = "" if block is None else f" in block {block}"
    negated = "minus the " if observation.score.startswith("-") else ""
    words = f"{negated}{observation.score_words}; the lowest are removed" if observation.score_words else ""
    return label(f"score: {observation.score}{place}", words)


def policy_strip(observations: Sequence[Observation]) -> Sheet:
    """The input, and its surviving tokens after the last block under several policies.

    Args:
        observations: the same image under each policy.
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
    """Write ``depth_frames`` as an endlessly looping GIF that rests on the last frame."""
    write_gif(depth_frames(observation), stream, _FRAME_MS, _LAST_FRAME_MS)


def save_depth(observation: Observation, blocks: Sequence[int] | None, stem: Path, words: str = "") -> list[Path]:
    """Write ``depth_sheet`` to ``stem``.png and ``stem``.svg, and ``write_animation`` to ``stem``.gif.

    Raises:
        UserError: there is no such block, or a file cannot be written.
    """
    sheets = save_picture(depth_sheet(observation, blocks, words), stem)
    animation = stem.with_name(f"{stem.name}.gif")
    with replace_output(animation) as stream:
        write_animation(observation, stream)
    return [*sheets, animation]


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raise a ``UserError`` unless a model of ``depth`` blocks has these blocks."""
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(f"there is no block {block}: the model has blocks 0 to {depth - 1}.")


def chosen_blocks(observation: Observation, blocks: Sequence[int] | None) -> Sequence[int]:
    """``blocks``, or by default up to four of the blocks that reduce, evenly spaced.

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


def dense_scale(observation: Observation) -> int:
    """How many times the images of a dense task are enlarged: their objects and patches are small."""
    return -(-_DENSE_SIDE // max(observation.image.shape[:2]))


def dense_rows(
    observation: Observation, upper: Sequence[tuple[Sheet, Panel]], lower: Sequence[tuple[Sheet, Panel]]
) -> list[list[Panel]]:
    """The rows of a dense task's page: a task's panels below their labels, right of them those of the tokens.

    Args:
        observation: the image, processed under one policy.
        upper: label and panel, of the upper row.
        lower: the same of the lower row, which has one more panel.
    """
    last, scale, acts = observation.blocks[-1], dense_scale(observation), observation.reducing[-1]
    words = f"{token_count(observation, len(observation.blocks) - 1)}, {percent(observation)} of FLOPs removed"
    tokens = label("surviving tokens", words), token_panel(observation.image, last, scale)
    sizes = label("patches per token", "after the last block"), size_panel(last, scale)
    scores = _score_label(observation, acts), score_panel(observation.blocks[acts], scale)
    rows = [*upper, tokens, sizes], [*lower, scores]
    return [[part[place] for part in row] for row in rows for place in (0, 1)]


def evenly_spaced(blocks: Sequence[int], count: int) -> list[int]:
    """``count`` of the blocks, evenly spaced from the first to the last; all blocks if they are fewer."""
    if len(blocks) <= count:
        return list(blocks)
    return [blocks[round(i * (len(blocks) - 1) / (count - 1))] for i in range(count)]


def percent(observation: Observation) -> str:
    """The share of FLOPs that the policy removes, as text."""
    return f"{100 * observation.reduction:.1f} %"


def token_count(observation: Observation, block: int) -> str:
    """The number of tokens after a block, as text."""
    view = observation.blocks[block]
    return f"{view.tokens} of {view.unreduced} tokens"


def title(observation: Observation) -> str:
    """The backbone, the policy, and the share of FLOPs that it removes."""
    return f"{observation.backbone}  ·  {observation.policy}  ·  {percent(observation)} of FLOPs removed"
