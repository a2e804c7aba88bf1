"""Tables as lines of text: wide and complete for pipes, fitted to the width of a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells, set_cell_size

from gpu_launcher.text import CONTROL

GAP = "  "
ROOM = 16
"""Columns of text that the last column of a table should have at least."""
NOTHING = "-"
"""What an empty cell is where nobody sees the columns, as in a pipe."""

Piece = tuple[str, str]
"""Text, and a style as rich writes it."""
Line = list[Piece]


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    right: bool = False
    """Whether its cells are aligned to the right."""
    optional: int = 0
    """Columns with higher numbers go first where there is little room; those with 0 stay."""


@dataclass(frozen=True, slots=True)
class Row:
    cells: Sequence[str]
    """As many as there are columns, or fewer."""
    rest: Piece | None = None
    """What stands in place of the columns that have no cell, as wide as it is."""
    known: int = 0
    """So many of the first cells say the same as in the row above; a terminal does not show them again."""


def lay_out(
    columns: Sequence[Column], rows: Sequence[Row], width: int | None, *, one_line_each: bool = False
) -> list[Line]:
    """The table, with its head. For `width` None every row says everything, on one line.

    Otherwise no line is wider than `width`: columns without content go, then optional ones, then the end of the last
    column; what stands in place of columns is wrapped, or cut for `one_line_each`.
    """
    head = Row([column.title for column in columns])
    if width is None:
        whole = [Row([cell or NOTHING for cell in row.cells], row.rest) for row in rows]
        sheet = _Sheet(columns, list(range(len(columns))), [head, *whole])
        return [sheet.line(head.cells, "dim"), *(sheet.row(row) for row in whole)]
    filled = [
        place for place in range(len(columns)) if not place or any("".join(row.cells[place:][:1]) for row in rows)
    ]
    sheet = _Sheet(columns, filled, [head, *rows])
    sheet.narrow(width)
    lines = [sheet.line(head.cells, "dim", width)]
    for row in rows:
        cells = [""] * row.known + list(row.cells[row.known :])
        if row.rest is None:
            lines.append(sheet.line(cells, "", width))
        elif one_line_each:
            lines.append(sheet.followed(cells, row.rest, width))
        else:
            lines += sheet.wrapped(cells, row.rest, width)
    return lines


class _Sheet:
    """The columns that are shown, and how wide they are."""

    def __init__(self, columns: Sequence[Column], shown: list[int], rows: Sequence[Row]) -> None:
        self._columns = columns
        self._shown = shown
        self._widths = {place: max(cell_len(cell) for row in rows for cell in row.cells[place:][:1]) for place in shown}

    def narrow(self, width: int) -> None:
        """Do without optional columns where the others need the room."""
        for place in sorted(self._shown, key=lambda place: self._columns[place].optional, reverse=True):
            *fixed, last = self._shown
            needed = sum(self._widths[one] + len(GAP) for one in fixed) + min(self._widths[last], ROOM)
            if needed <= width or not self._columns[place].optional:
                break
            self._shown.remove(place)

    def line(self, cells: Sequence[str], style: str, width: int | None = None) -> Line:
        """The cells, of which the last one is cut if it is too wide."""
        places = [place for place in self._shown if place < len(cells)]
        line = [(self._padded(place, cells[place]) + GAP, style) for place in places[:-1]]
        last = cells[places[-1]]
        if self._columns[places[-1]].right:
            last = self._padded(places[-1], last)
        left = cell_len(last) if width is None else max(1, width - sum(cell_len(text) for text, _ in line))
        return [*line, (cut(last, left), style)]

    def row(self, row: Row) -> Line:
        if row.rest is None:
            return self.line(row.cells, "")
        return [*self._before(row.cells), row.rest]

    def followed(self, cells: Sequence[str], rest: Piece, width: int) -> Line:
        before = self._before(cells)
        left = width - sum(cell_len(text) for text, _ in before)
        return [*before, (cut(rest[0], max(1, left)), rest[1])]

    def wrapped(self, cells: Sequence[str], rest: Piece, width: int) -> list[Line]:
        before = self._before(cells)
        indent = sum(cell_len(text) for text, _ in before)
        first, *more = wrap(rest[0], max(ROOM, width - indent))
        return [[*before, (first, rest[1])], *([(" " * indent, ""), (text, rest[1])] for text in more)]

    def _before(self, cells: Sequence[str]) -> Line:
        return [(self._padded(place, cells[place]) + GAP, "") for place in self._shown if place < len(cells)]

    def _padded(self, place: int, cell: str) -> str:
        pad = " " * (self._widths[place] - cell_len(cell))
        return pad + cell if self._columns[place].right else cell + pad


def cut(text: str, width: int) -> str:
    """The text, or as much of it as fits, with an ellipsis."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` columns, broken between words where that is possible; at least one."""
    lines = [""]
    for word in text.split():
        for piece in chop_cells(word, width) if cell_len(word) > width else [word]:
            joined = f"{lines[-1]} {piece}".strip()
            if cell_len(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines


def plain(line: Line) -> str:
    return CONTROL.sub("?", "".join(text for text, _ in line)).rstrip()
