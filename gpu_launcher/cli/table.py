"""Lays out tables as lines of text: complete for pipes, fitted to the width of a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells, set_cell_size

from gpu_launcher.text import CONTROL

GAP = "  "
ROOM = 16
"""Smallest width of a table's last column, in characters."""
NOTHING = "-"
"""Text of an empty cell in a pipe, so that programs can split lines into columns."""

Piece = tuple[str, str]
"""A text and its style, in rich's notation."""
Line = list[Piece]


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    right: bool = False
    """Whether cells are right-aligned."""
    optional: int = 0
    """Order in which columns are dropped on narrow terminals: highest first, of equals the last. 0 is never dropped."""


@dataclass(frozen=True, slots=True)
class Row:
    cells: Sequence[str]
    """The cells of the first columns, at most one per column."""
    rest: Piece | None = None
    """Text that replaces the remaining columns. It may be wider than they are."""
    known: int = 0
    """Number of leading cells that repeat the row above. Terminals do not show them again."""


def lay_out(
    columns: Sequence[Column], rows: Sequence[Row], width: int | None, *, one_line_each: bool = False
) -> list[Line]:
    """Lay out a table with its head. If `width` is None, every row is complete and on one line.

    Otherwise no line is wider than `width`: empty columns are dropped, then optional ones, and the last column is cut.
    Text that replaces columns is wrapped; with `one_line_each`, it is cut.
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
    """The visible columns and their widths."""

    def __init__(self, columns: Sequence[Column], shown: list[int], rows: Sequence[Row]) -> None:
        self._columns = columns
        self._shown = shown
        self._widths = {
            place: max(map(width_of, [row.cells[place] for row in rows if place < len(row.cells)])) for place in shown
        }

    def narrow(self, width: int) -> None:
        """Drop optional columns until the others fit."""
        for place in sorted(self._shown, key=lambda place: (self._columns[place].optional, place), reverse=True):
            *fixed, last = self._shown
            needed = sum(self._widths[one] + len(GAP) for one in fixed) + min(self._widths[last], ROOM)
            if needed <= width or not self._columns[place].optional:
                break
            self._shown.remove(place)

    def line(self, cells: Sequence[str], style: str, width: int | None = None) -> Line:
        """The cells as a line; the last cell is cut if it is too wide."""
        *before, last = [place for place in self._shown if place < len(cells)]
        padded = [self._padded(place, cells[place]) for place in before]
        text = self._padded(last, cells[last]) if self._columns[last].right else cells[last]
        if width is not None:
            text = cut(text, max(1, width - sum(self._widths[place] + len(GAP) for place in before)))
        return [(GAP.join([*padded, text]), style)]

    def row(self, row: Row) -> Line:
        if row.rest is None:
            return self.line(row.cells, "")
        return [*self._before(row.cells), row.rest]

    def followed(self, cells: Sequence[str], rest: Piece, width: int) -> Line:
        before = self._before(cells)
        left = width - sum(width_of(text) for text, _ in before)
        return [*before, (cut(rest[0], max(1, left)), rest[1])]

    def wrapped(self, cells: Sequence[str], rest: Piece, width: int) -> list[Line]:
        before = self._before(cells)
        indent = sum(width_of(text) for text, _ in before)
        first, *more = wrap(rest[0], max(ROOM, width - indent))
        return [[*before, (first, rest[1])], *([(" " * indent, ""), (text, rest[1])] for text in more)]

    def _before(self, cells: Sequence[str]) -> Line:
        return [(self._padded(place, cells[place]) + GAP, "") for place in self._shown if place < len(cells)]

    def _padded(self, place: int, cell: str) -> str:
        width = self._widths[place] - width_of(cell) + len(cell)
        return cell.rjust(width) if self._columns[place].right else cell.ljust(width)


def width_of(text: str) -> int:
    """The width of a text on a terminal, in characters."""
    return len(text) if text.isascii() else cell_len(text)


def cut(text: str, width: int) -> str:
    """The text, shortened with an ellipsis if it is wider than `width`."""
    return text if width_of(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def wrap(text: str, width: int) -> list[str]:
    """Wrap text to lines of at most `width` columns, between words if possible. Returns at least one line."""
    lines = [""]
    for word in text.split():
        for piece in chop_cells(word, width) if width_of(word) > width else [word]:
            joined = f"{lines[-1]} {piece}".strip()
            if width_of(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines


def plain(line: Line) -> str:
    return CONTROL.sub("?", "".join(text for text, _ in line)).rstrip()
