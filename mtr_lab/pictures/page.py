"""Compose panels and labels to pages, and write pages to files."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw

from mtr_lab.errors import UserError
from mtr_lab.pictures.panels import FAINT, INK, PAPER, font
from mtr_lab.results.atomic import replace_file

_GAP, _MARGIN = 16, 24
_LARGE, _NORMAL, _SMALL = 24, 19, 16  # font sizes in pixels


def label(title: str, text: str = "", *, key: Sequence[tuple[str, tuple[int, int, int]]] = ()) -> Image.Image:
    """A title, smaller grey text below it, and a colour key: (word, colour) pairs in one line."""
    words = [_lines(word, _SMALL, colour) for word, colour in key]
    below = [_row(words, [word.width for word in words])] if words else []
    return _stacked([_lines(title, _NORMAL, INK), _lines(text, _SMALL, FAINT), *below], 0)


def _lines(text: str, size: int, colour: tuple[int, int, int]) -> Image.Image:
    lines = text.split("\n") if text else []
    width = max((round(font(size).getlength(line)) + 2 for line in lines), default=0)
    picture = Image.new("RGB", (width, len(lines) * (size + 6)), PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, i * (size + 6)), line, fill=colour, font=font(size))
    return picture


def _row(parts: Sequence[Image.Image], widths: Sequence[int]) -> Image.Image:
    """Pictures side by side, in columns of the given widths."""
    whole = Image.new("RGB", (sum(widths) + _GAP * (len(widths) - 1), max(part.height for part in parts)), PAPER)
    x = 0
    for part, width in zip(parts, widths, strict=True):
        whole.paste(part, (x, 0))
        x += width + _GAP
    return whole


def _stacked(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures one below the other."""
    whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height + gap for p in parts) - gap), PAPER)
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height + gap
    return whole


def legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Image.Image:
    """A square of its colour before each word, in lines at most ``width`` pixels wide."""
    lines: list[list[Image.Image]] = [[]]
    for word, colour in entries:
        text = _lines(word, _SMALL, INK)
        entry = Image.new("RGB", (text.width + _SMALL + 6, text.height), PAPER)
        entry.paste(colour, (0, 2, _SMALL, _SMALL + 2))
        entry.paste(text, (_SMALL + 6, 0))
        if lines[-1] and sum(part.width + _GAP for part in lines[-1]) + entry.width > width:
            lines.append([])
        lines[-1].append(entry)
    return _stacked([_row(line, [part.width for part in line]) for line in lines if line], 2)


def page(
    title: str,
    rows: Sequence[Sequence[Image.Image]],
    note: str,
    entries: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> Image.Image:
    """Rows of equally many panels, a title above them; below them the ``legend`` of ``entries``, and a note."""
    widths = [max(panel.width for panel in column) for column in zip(*rows, strict=True)]
    lines = [_row(row, widths) for row in rows]
    key = [legend(entries, sum(widths) + _GAP * (len(widths) - 1))] if entries else []
    body = _stacked([_lines(title, _LARGE, INK), *lines, *key, _lines(note, _SMALL, FAINT)], _GAP)
    sheet = Image.new("RGB", (body.width + 2 * _MARGIN, body.height + 2 * _MARGIN), PAPER)
    sheet.paste(body, (_MARGIN, _MARGIN))
    return sheet


def write_gif(pages: Sequence[Image.Image], stream: BinaryIO, page_ms: int, last_page_ms: int) -> None:
    """Write pages of one size as an endlessly looping animation; durations are in milliseconds."""
    first, *others = [picture.quantize(256) for picture in pages]
    durations = [page_ms] * len(others) + [last_page_ms]
    first.save(stream, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def save_picture(picture: Image.Image, file: Path) -> Path:
    """Write a PNG file, and return its path.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(file) as stream:
        picture.save(stream, "PNG", optimize=True)
    return file


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, which replaces it atomically on success; missing folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replace_file(file) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}") from error
