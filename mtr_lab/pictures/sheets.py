"""Pictures: an image through the depth of the model, still and animated, and an image under several policies."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw

from mtr_lab.errors import UserError
from mtr_lab.pictures.observe import Observation
from mtr_lab.pictures.panels import FAINT, INK, PAPER, font, image_panel, score_panel, token_panel
from mtr_lab.report.atomic import replace_file

_SIDE = 300  # an image is enlarged to at least so many pixels
_GAP, _MARGIN = 16, 24
_LARGE, _NORMAL, _SMALL = 24, 19, 16  # of letters, in pixels
_TOKENS = "outlined: patches merged into one token, which may have regions apart, of one colour  ·  pale: dropped"
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
    check_blocks(blocks or (), len(observation.blocks))
    chosen = _spread(observation.reducing, 4) if blocks is None else blocks
    headings = ["", "input", "surviving tokens", f"score: {observation.score}"]
    rows = [
        [
            _label(f"block {block}", _count(observation, block)),
            image_panel(observation.image, _scale(observation)),
            *_panels(observation, block),
        ]
        for block in chosen
    ]
    return _page(_title(observation), [[_label(heading) for heading in headings], *rows], f"{_TOKENS}\n{_SCORES}")


def depth_frames(observation: Observation) -> list[Image.Image]:
    """The surviving tokens and the scores, a frame for each block that reduces; all of one size."""
    pages = []
    for block in observation.reducing:
        headings = [_label(f"block {block}", _count(observation, block)), _label(f"score: {observation.score}")]
        pages.append(_page(_title(observation), [headings, _panels(observation, block)], f"{_TOKENS}\n{_SCORES}"))
    frames = []
    for page in pages:
        frames.append(Image.new("RGB", (max(p.width for p in pages), max(p.height for p in pages)), PAPER))
        frames[-1].paste(page, (0, 0))
    return frames


def policy_strip(observations: Sequence[Observation]) -> Image.Image:
    """The input, and what each of several policies has left of it after the last block.

    Args:
        observations: the same image under each of them.
    """
    first = observations[0]
    headings = [_label("input", f"{first.tokens} tokens")]
    panels = [image_panel(first.image, _scale(first))]
    for each in observations:
        last = each.blocks[-1]
        headings.append(_label(each.policy, f"{_percent(each)} of FLOPs removed\n{last.tokens} tokens left"))
        panels.append(token_panel(each.image, last, each.grid, _scale(each)))
    return _page(f"{first.backbone}  ·  after the last block", [headings, panels], _TOKENS)


def write_animation(observation: Observation, stream: BinaryIO) -> None:
    """Write ``depth_frames`` as a GIF that goes round for ever and rests on the last frame."""
    first, *others = [frame.quantize(256) for frame in depth_frames(observation)]
    durations = [_FRAME_MS] * len(others) + [_LAST_FRAME_MS]
    first.save(stream, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def save_depth(observation: Observation, blocks: Sequence[int] | None, stem: Path) -> list[Path]:
    """Write ``depth_sheet`` to ``stem``.png and ``write_animation`` to ``stem``.gif.

    Raises:
        UserError: there is no such block, or nothing can be written there.
    """
    sheet = save_picture(depth_sheet(observation, blocks), stem.with_name(f"{stem.name}.png"))
    animation = stem.with_name(f"{stem.name}.gif")
    with _replacing(animation) as stream:
        write_animation(observation, stream)
    return [sheet, animation]


def save_picture(picture: Image.Image, file: Path) -> Path:
    """Write a PNG file, and return its path.

    Raises:
        UserError: it cannot be written there.
    """
    with _replacing(file) as stream:
        picture.save(stream, "PNG", optimize=True)
    return file


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    try:
        with replace_file(file) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}") from error


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raise a ``UserError`` unless a model of ``depth`` blocks has these."""
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(f"there is no block {block}: the model has blocks 0 to {depth - 1}.")


def _panels(observation: Observation, block: int) -> list[Image.Image]:
    view, grid, scale = observation.blocks[block], observation.grid, _scale(observation)
    return [token_panel(observation.image, view, grid, scale), score_panel(view, grid, scale)]


def _scale(observation: Observation) -> int:
    return -(-_SIDE // max(observation.image.shape[:2]))


def _spread(blocks: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` of the blocks, evenly spread from the first to the last."""
    if len(blocks) <= count:
        return list(blocks)
    return [blocks[round(i * (len(blocks) - 1) / (count - 1))] for i in range(count)]


def _percent(observation: Observation) -> str:
    return f"{100 * observation.reduction:.1f} %"


def _count(observation: Observation, block: int) -> str:
    return f"{observation.blocks[block].tokens} of {observation.tokens} tokens"


def _title(observation: Observation) -> str:
    return f"{observation.backbone}  ·  {observation.policy}  ·  {_percent(observation)} of FLOPs removed"


def _label(title: str, text: str = "") -> Image.Image:
    """A line in ink, and fainter, smaller ones below it."""
    return _stacked([_lines(title, _NORMAL, INK), _lines(text, _SMALL, FAINT)], 0)


def _lines(text: str, size: int, colour: tuple[int, int, int]) -> Image.Image:
    lines = text.split("\n") if text else []
    width = max((round(font(size).getlength(line)) + 2 for line in lines), default=0)
    picture = Image.new("RGB", (width, len(lines) * (size + 6)), PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, i * (size + 6)), line, fill=colour, font=font(size))
    return picture


def _stacked(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures one below the other."""
    whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height + gap for p in parts) - gap), PAPER)
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height + gap
    return whole


def _page(title: str, rows: Sequence[Sequence[Image.Image]], note: str) -> Image.Image:
    """Rows of equally many panels, a title above them and a note below."""
    widths = [max(panel.width for panel in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        line = Image.new("RGB", (sum(widths) + _GAP * (len(widths) - 1), max(panel.height for panel in row)), PAPER)
        x = 0
        for panel, width in zip(row, widths, strict=True):
            line.paste(panel, (x, 0))
            x += width + _GAP
        lines.append(line)
    body = _stacked([_lines(title, _LARGE, INK), *lines, _lines(note, _SMALL, FAINT)], _GAP)
    page = Image.new("RGB", (body.width + 2 * _MARGIN, body.height + 2 * _MARGIN), PAPER)
    page.paste(body, (_MARGIN, _MARGIN))
    return page
