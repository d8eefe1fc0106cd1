"""The layout of every table for a terminal: two lines a cell from 80 columns on, one line where the window has room."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

ONE_LINE_COLUMNS = 110
"""The width of a window from which on a row may be one line."""


class Cell(NamedTuple):
    """A figure, and what qualifies it: below it in a paler line, or right of it."""

    figure: str
    qualifier: str = ""
    best: bool = False
    """Whether it is the best of its column, which is written in bold."""


TwoLines = tuple[str, str] | Cell
"""A cell without or with emphasis."""


class Saving(NamedTuple):
    """What a narrow window does without: the qualifiers of a column, or all of it."""

    column: int
    whole: bool = False
    stacked: bool = True
    """Whether two-line rows become narrower by it, too."""


@dataclass(frozen=True)
class TwoLineTable:
    """A table; long names in the first column are folded to leave room for the others.

    Rows are one line each in a window of ``ONE_LINE_COLUMNS`` or more, if they fit after savings.
    """

    title: str
    remarks: Sequence[str]
    """Lines below it."""
    headings: Sequence[TwoLines]
    rows: Sequence[Sequence[TwoLines]]
    savings: Sequence[Saving] = ()
    """In the order in which they are made, as many as it takes."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def fits(table: Table) -> bool:
            return Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width

        one_line = [self._table(True, self.savings[:count]) for count in range(len(self.savings) + 1)]
        stacked = [saving for saving in self.savings if saving.stacked]
        two_lines = [self._table(False, stacked[:count]) for count in range(len(stacked) + 1)]
        candidates = [*(one_line if options.max_width >= ONE_LINE_COLUMNS else []), *two_lines]
        yield next(filter(fits, candidates), self._table(False, []))

    def _table(self, one_line: bool, savings: Sequence[Saving]) -> Table:
        table = Table(
            title=escape(self.title),
            caption=escape("\n".join(self.remarks)),
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=0,
            title_justify="left",
            caption_justify="left",
            title_style="bold",
            header_style="",
        )
        hidden = {saving.column for saving in savings if saving.whole}
        bare = {saving.column for saving in savings} - hidden
        kept = [i for i in range(len(self.headings)) if i not in hidden]
        for i in kept:
            table.add_column(
                _text(self.headings[i], one_line, i in bare, "bold"),
                justify="right" if i else "left",
                no_wrap=bool(i),
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(_text(row[i], one_line, i in bare) for i in kept))
        return table


def two_line_table(
    title: str,
    remarks: Sequence[str],
    headings: Sequence[TwoLines],
    rows: Iterable[Iterable[TwoLines]],
    savings: Sequence[Saving] = (),
) -> TwoLineTable:
    """Lay out a table.

    Args:
        title: above it.
        remarks: lines below it.
        headings: of the columns.
        rows: one cell per column.
        savings: see ``TwoLineTable``.
    """
    return TwoLineTable(title, remarks, headings, [list(row) for row in rows], savings)


def _text(cell: TwoLines, one_line: bool, bare: bool, style: str = "") -> Text:
    figure, qualifier, *best = cell
    emphasis = "bold" if best and best[0] else style
    below = "" if bare or not qualifier else f"{' ' if one_line else chr(10)}{qualifier}"
    return Text.assemble((figure, emphasis), (below, "dim"))
