"""Compose panels and labels to pages, and write pages to files."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from mtr_lab.pictures.marks import FAINT, INK, Colour, Frame, Sheet, Text, raster
from mtr_lab.results.atomic import replace_output

_GAP, _MARGIN = 16, 24
_LARGE, _NORMAL, _SMALL = 24, 19, 16  # font sizes in pixels
Entry = tuple[str, Colour]
"""A word of a legend and its colour."""


def label(title: str, text: str = "") -> Sheet:
    """A title, and smaller grey text below it."""
    return _stacked([_lines(title, _NORMAL, INK), _lines(text, _SMALL, FAINT)], 0)


def _lines(text: str, size: int, colour: Colour) -> Sheet:
    texts = [Text(line, size, colour) for line in text.split("\n")] if text else []
    width = max((line.width for line in texts), default=0)
    return Sheet(width, len(texts) * (size + 6), tuple((0, i * (size + 6), line) for i, line in enumerate(texts)))


def _row(parts: Sequence[Sheet], widths: Sequence[int]) -> Sheet:
    """Sheets side by side, in columns of the given widths."""
    lefts = [sum(widths[:i]) + i * _GAP for i in range(len(parts))]
    placed = [(left, 0, part) for left, part in zip(lefts, parts, strict=True)]
    return _together(sum(widths) + _GAP * (len(widths) - 1), max(part.height for part in parts), placed)


def _stacked(parts: Sequence[Sheet], gap: int) -> Sheet:
    """Sheets one below the other."""
    tops = [sum(part.height + gap for part in parts[:i]) for i in range(len(parts))]
    placed = [(0, top, part) for top, part in zip(tops, parts, strict=True)]
    return _together(max(part.width for part in parts), tops[-1] + parts[-1].height, placed)


def _together(width: int, height: int, placed: Sequence[tuple[int, int, Sheet]]) -> Sheet:
    marks = tuple((left + x, top + y, mark) for left, top, part in placed for x, y, mark in part.marks)
    return Sheet(width, height, marks)


def legend(entries: Sequence[Entry], width: int) -> Sheet:
    """A square of its colour before each word, in lines at most ``width`` pixels wide."""
    lines: list[list[Sheet]] = [[]]
    for word, colour in entries:
        text = Text(word, _SMALL)
        square = Frame(_SMALL - 1, _SMALL - 1, colour, filled=True)
        entry = Sheet(text.width + _SMALL + 6, _SMALL + 6, ((0, 2, square), (_SMALL + 6, 0, text)))
        if lines[-1] and sum(part.width + _GAP for part in lines[-1]) + entry.width > width:
            lines.append([])
        lines[-1].append(entry)
    return _stacked([_row(line, [part.width for part in line]) for line in lines if line], 2)


def page(title: str, rows: Sequence[Sequence[Sheet | Image.Image]], note: str, entries: Sequence[Entry] = ()) -> Sheet:
    """Rows of equally many panels, a title above them; below them the ``legend`` of ``entries``, and a note."""
    panels = [[raster(panel) if isinstance(panel, Image.Image) else panel for panel in row] for row in rows]
    widths = [max(panel.width for panel in column) for column in zip(*panels, strict=True)]
    lines = [_row(row, widths) for row in panels]
    key = [legend(entries, sum(widths) + _GAP * (len(widths) - 1))] if entries else []
    body = _stacked([_lines(title, _LARGE, INK), *lines, *key, _lines(note, _SMALL, FAINT)], _GAP)
    return _together(body.width + 2 * _MARGIN, body.height + 2 * _MARGIN, [(_MARGIN, _MARGIN, body)])


def write_gif(pages: Sequence[Sheet], stream: BinaryIO, page_ms: int, last_page_ms: int) -> None:
    """Write pages as an endlessly looping animation of the largest page's size; durations are in milliseconds."""
    size = max(page.width for page in pages), max(page.height for page in pages)
    first, *others = [Sheet(*size, page.marks).image().quantize(256) for page in pages]
    durations = [page_ms] * len(others) + [last_page_ms]
    first.save(stream, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def save_picture(sheet: Sheet, stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.svg, and return their paths.

    Raises:
        UserError: a file cannot be written.
    """
    png, svg = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".svg"))
    with replace_output(png) as stream:
        sheet.image().save(stream, "PNG")  # the smallest file would take five times as long
    with replace_output(svg) as stream:
        stream.write(sheet.svg().encode())
    return [png, svg]
