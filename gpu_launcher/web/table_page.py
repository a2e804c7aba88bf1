"""What of a sweep's table is shown: which jobs, in which order, which columns. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.manifest import State
from gpu_launcher.jobs.result_table import JobRow, ResultColumn, ResultTable, shown
from gpu_launcher.sizes import show_memory
from gpu_launcher.text import middle_cut, one_line, read_digits
from gpu_launcher.wording import duration, join_labels

ROWS = 100
"""Number of jobs on a page."""
MAX_PAGE = 10**6
MAX_PARAMS = 8
"""Maximum number of parameters that are shown unless the user chooses columns."""
MAX_VALUES = 6
MAX_CELL = 40
"""Maximum number of characters in a cell."""
TITLES = {
    "number": "job",
    "outcome": "state",
    "peak_memory": "memory",
    "peak_device_memory": "GPU memory",
}
NUMBERS = ("number", "duration", "attempts", "peak_memory", "peak_device_memory")


@dataclass(frozen=True, slots=True)
class TableQuery:
    """What the user has chosen."""

    sort: str = ""
    """A column, with `-` before it for the largest first. Empty: by number."""
    state: str = ""
    text: str = ""
    """A text that each job shown has in its parameters, message or node."""
    columns: tuple[str, ...] = ()
    page: int = 1

    @classmethod
    def read(cls, query: Mapping[str, Sequence[str]]) -> TableQuery:
        """Read the query of a URL. What it does not know is ignored."""

        def one(name: str) -> str:
            return (query.get(name) or ("",))[0][:200]

        state = one("state")
        return cls(
            one("sort"),
            state if state in {known.value for known in State} else "",
            one("text").strip(),
            tuple(query.get("column") or ())[:100],
            read_digits(one("page"), MAX_PAGE) or 1,
        )

    def url(self, **changes: Any) -> str:
        """The query of the URL with these changes."""
        new = replace(self, **changes)
        pairs = [("sort", new.sort), ("state", new.state), ("text", new.text)]
        pairs += [("column", column) for column in new.columns]
        pairs += [("page", str(new.page))] if new.page > 1 else []
        return "?" + urlencode([(name, value) for name, value in pairs if value], errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    whole: str = ""
    """The text before it was cut, if it was."""
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a column."""

    name: str
    title: str
    is_number: bool
    order: str
    """How the table is sorted by it: `ascending`, `descending` or `none`."""
    url: str
    """Sorts by it."""


@dataclass(frozen=True, slots=True)
class TablePage:
    query: TableQuery
    heads: tuple[Head, ...]
    rows: tuple[tuple[JobRow, tuple[Cell, ...]], ...]
    matching: int
    """Number of jobs that the filter lets through."""
    pages: int
    columns: tuple[tuple[str, bool], ...]
    """All columns, each with whether it is shown."""


def select(table: ResultTable, query: TableQuery) -> TablePage:
    """Make the page that was asked for. An unknown column to sort by is ignored."""
    columns = {column.name: column for column in table.columns if column.name != "number"}
    chosen = [name for name in query.columns if name in columns] or _usual(table)
    query = replace(query, columns=tuple(chosen) if query.columns else ())
    found = table.where(_filter(query)) if query.state or query.text else table
    if query.sort:
        try:
            found = found.sorted_by(query.sort)
        except OptionError:
            query = replace(query, sort="")
    pages = max(1, -(-len(found) // ROWS))
    query = replace(query, page=min(max(1, query.page), pages))
    shown_columns = [ResultColumn("number", lambda row: row.number), *(columns[name] for name in chosen)]
    rows = found[(query.page - 1) * ROWS : query.page * ROWS]
    cells = tuple((row, tuple(cell_of(column, column.get(row)) for column in shown_columns)) for row in rows)
    return TablePage(
        query,
        tuple(
            _head(column, query, all(row_cells[place].is_number or not row_cells[place].text for _, row_cells in cells))
            for place, column in enumerate(shown_columns)
        ),
        cells,
        len(found),
        pages,
        tuple((name, name in chosen) for name in columns),
    )


def _usual(table: ResultTable) -> list[str]:
    """The columns that are shown unless the user chooses others."""
    params, values = list(table.param_columns)[:MAX_PARAMS], list(table.value_columns)[:MAX_VALUES]
    facts = ["duration"]
    facts += [name for name in ("peak_memory", "peak_device_memory") if any(getattr(row, name) for row in table)]
    facts += ["attempts"] if any(row.attempts > 1 for row in table) else []
    places = ["devices"] + (["node"] if any(row.node for row in table) else [])
    return ["outcome", *params, *values, *facts, *places]


def _filter(query: TableQuery) -> Any:
    words = query.text.lower().split()

    def keep(row: JobRow) -> bool:
        if query.state and row.outcome != query.state:
            return False
        if not words:
            return True
        said = [f"{name}={shown(value)}" for name, value in row.params.items()]
        text = " ".join([str(row.number), *said, row.message or "", row.node or ""]).lower()
        return all(word in text for word in words)

    return keep


def _head(column: ResultColumn, query: TableQuery, is_number: bool) -> Head:
    name = column.name
    rising, falling = query.sort == name or (name == "number" and not query.sort), query.sort == f"-{name}"
    order = "ascending" if rising else "descending" if falling else "none"
    return Head(
        name,
        title_of(column),
        is_number,
        order,
        query.url(sort=f"-{name}" if rising else name, page=1),
    )


def title_of(column: ResultColumn) -> str:
    """Return the title of a column."""
    return TITLES.get(column.name, one_line(column.name, 60))


def cell_of(column: ResultColumn, value: Any) -> Cell:
    """Return the cell for a value of a column."""
    if value is None or value == ():
        return Cell("")
    match column.name:
        case "duration":
            return Cell(duration(value), is_number=True)
        case "peak_memory" | "peak_device_memory":
            return Cell(show_memory(value), is_number=True)
        case "devices":
            text = join_labels(value)
        case _:
            text = shown(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = text if is_number else one_line(text)  # slow for thousands of numbers
    return Cell(text, is_number=is_number) if len(text) <= MAX_CELL else Cell(middle_cut(text, MAX_CELL), text)
