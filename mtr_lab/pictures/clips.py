"""Pictures of videos: frames and their surviving tokens, as a sheet and as an animation."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mtr_lab.pictures.marks import Sheet
from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page, save_picture, write_gif
from mtr_lab.pictures.panels import image_panel, token_panels
from mtr_lab.pictures.sheets import TOKENS, Panel, chosen_blocks, evenly_spaced, percent, title, token_count
from mtr_lab.results.atomic import replace_output

_SHEET_SIDE, _ANIMATION_SIDE = 150, 300  # smallest width or height of an enlarged frame, in pixels
_SHEET_FRAMES = 8
_FRAME_MS, _LAST_FRAME_MS = 400, 1200
_NOTE = f"{TOKENS}\na merged token may span frames: it is outlined in each frame, in its mean colour over all frames"


def clip_sheet(observation: Observation, blocks: Sequence[int] | None = None, words: str = "") -> Sheet:
    """One column per frame, at most eight: the input, and below it the tokens that survive the blocks.

    Args:
        observation: a video, processed under a policy.
        blocks: numbers from 0; by default up to four of the blocks that reduce, evenly spaced.
        words: more lines below the title.

    Raises:
        UserError: there is no such block.
    """
    rows = [
        (label(f"block {block}", token_count(observation, block)), _token_row(observation, block, _SHEET_SIDE))
        for block in chosen_blocks(observation, blocks)
    ]
    return _sheet(_heading(observation, words), observation, rows)


def clip_policies(observations: Sequence[Observation]) -> Sheet:
    """One column per frame, at most eight: the input, and below it the tokens after the last block of each policy.

    Args:
        observations: the same video under each policy.
    """
    rows = []
    for observation in observations:
        last = len(observation.blocks) - 1
        text = f"{percent(observation)} of FLOPs removed\n{token_count(observation, last)}"
        rows.append((label(observation.policy, text), _token_row(observation, last, _SHEET_SIDE)))
    return _sheet(f"{observations[0].backbone}  ·  after the last block", observations[0], rows)


def clip_pages(observation: Observation, block: int, words: str = "") -> list[Sheet]:
    """One page per frame, all of one size: the input beside the tokens that survive the block."""
    frames, text = observation.image, token_count(observation, block)
    panels = _token_row(observation, block, _ANIMATION_SIDE)
    scale = _scale(observation, _ANIMATION_SIDE)
    rows_of_pages = []
    for i, (frame, panel) in enumerate(zip(frames, panels, strict=True)):
        headings = [label(f"frame {i + 1} of {len(frames)}"), label(f"after block {block}", text)]
        rows_of_pages.append((headings, [image_panel(frame, scale), panel]))
    return [page(_heading(observation, words), rows, _NOTE) for rows in rows_of_pages]


def save_clip(observation: Observation, blocks: Sequence[int] | None, stem: Path, words: str = "") -> list[Path]:
    """Write ``clip_sheet`` to ``stem``.png and ``stem``.svg, ``clip_pages`` of its last block to ``stem``.gif.

    Raises:
        UserError: there is no such block, or a file cannot be written.
    """
    sheets = save_picture(clip_sheet(observation, blocks, words), stem)
    animation = stem.with_name(f"{stem.name}.gif")
    with replace_output(animation) as stream:
        pages = clip_pages(observation, chosen_blocks(observation, blocks)[-1], words)
        write_gif(pages, stream, _FRAME_MS, _LAST_FRAME_MS)
    return [*sheets, animation]


def _heading(observation: Observation, words: str) -> str:
    return f"{title(observation)}\n{words}" if words else title(observation)


def _sheet(title: str, observation: Observation, rows: Sequence[tuple[Sheet, list[Image.Image]]]) -> Sheet:
    """Labelled rows with one panel per frame, below a row of the input."""
    scale = _scale(observation, _SHEET_SIDE)
    shown = evenly_spaced(range(len(observation.image)), _SHEET_FRAMES)
    headings = [label(""), *(label(f"frame {i + 1}") for i in shown)]
    labelled = [(label("input"), [image_panel(frame, scale) for frame in observation.image]), *rows]
    lines: list[list[Panel]] = [[head, *(panels[i] for i in shown)] for head, panels in labelled]
    return page(title, [headings, *lines], _NOTE)


def _token_row(observation: Observation, block: int, side: int) -> list[Image.Image]:
    view, scale = observation.blocks[block], _scale(observation, side)
    return token_panels(observation.image, view, scale)


def _scale(observation: Observation, side: int) -> int:
    return -(-side // max(observation.image.shape[1:3]))
