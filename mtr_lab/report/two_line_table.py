"""The layout of every table for a terminal: two lines a cell, 80 columns or wider."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

TwoLines = tuple[str, str]
"""A cell: its figure, and below it in a paler line what qualifies the figure, which may be empty."""


def two_line_table(
    title: str, remarks: Sequence[str], headings: Sequence[TwoLines], rows: Iterable[Iterable[TwoLines]]
) -> Table:
    """Lay out a table; long names in the first column are folded to leave room for the others.

    Args:
        title: above it.
        remarks: lines below it.
        headings: of the columns.
        rows: one cell a column.
    """
    table = Table(
        title=escape(title),
        caption=escape("\n".join(remarks)),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        header_style="",
    )
    for i, heading in enumerate(headings):
        names = i == 0
        table.add_column(
            _text(heading, "bold"), justify="left" if names else "right", no_wrap=not names, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(lines: TwoLines, style: str = "") -> Text:
    first, second = lines
    return Text.assemble((first, style), ("\n" + second, "dim") if second else "")
