"""The values of a sweep by two of its columns, such as `lr` and `seed`. Pure."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.result_table import ResultColumn, ResultTable, csv_text, rank, shown


@dataclass(frozen=True, slots=True)
class Pivot:
    """The values of completed jobs by two columns of the table."""

    down: str
    """Name of the column whose values are the rows."""
    across: str
    """Name of the column whose values are the columns."""
    value: str
    """Name of the column with the values."""
    rows: tuple[Any, ...]
    columns: tuple[Any, ...]
    cells: dict[tuple[Any, Any], tuple[float, ...]]
    """The values of all jobs of a cell. Combinations without a value are not in it."""

    def mean(self, row: Any, column: Any) -> float | None:
        """Return the mean of a cell; None if it has no value."""
        found = self.cells.get((row, column))
        if found is None:
            return None
        try:
            return math.fsum(found) / len(found)
        except (OverflowError, ValueError):  # the sum is beyond the largest float, or of infinities of both signs
            return sum(map(float, found)) / len(found)

    def to_csv(self) -> str:
        """Return the means as CSV."""
        rows = ([row, *(self.mean(row, column) for column in self.columns)] for row in self.rows)
        return csv_text([self.down, *map(shown, self.columns)], rows)


def pivoted(table: ResultTable, names: str, value: str | None = None) -> Pivot:
    """Arrange the values of a table by two of its columns, whose `names` are separated by a comma.

    `value` names the column with the values. Raises OptionError.
    """
    wanted = [name.strip() for name in names.split(",")]
    if len(wanted) != 2:
        raise OptionError("pivot", f"give the names of two columns, such as lr,seed, not {names!r}")
    down, across = (table.column(name, "pivot") for name in wanted)
    column = number_column(table, value)
    cells: dict[tuple[Any, Any], list[float]] = defaultdict(list)
    for row in table:
        if (number := column.get(row)) is not None:
            cells[_key(down.get(row)), _key(across.get(row))].append(number)
    return Pivot(
        down.name,
        across.name,
        column.name,
        _in_order({row for row, _ in cells}),
        _in_order({column for _, column in cells}),
        {place: tuple(found) for place, found in cells.items()},
    )


def number_column(table: ResultTable, value: str | None) -> ResultColumn:
    """Return the column with the numbers to show, by default that of the only value.

    Raises OptionError if there are several values, or none, or one that is not a number.
    """
    if value is None:
        names = table.value_columns
        if len(names) != 1:
            listed = ", ".join(names)
            raise OptionError("value", f"choose from {listed}" if names else "no job has returned a value")
        (value,) = names
    column = table.column(value, "value")
    for row in table:
        found = column.get(row)
        if found is not None and not is_number(found):
            what = "a number that a float can hold" if isinstance(found, int) else "a number"
            raise OptionError("value", f"{value} of job {row.number} is not {what}: {shown(found)[:60]!r}")
    return column


def is_number(value: Any) -> bool:
    """Whether a value is a number that fits into a float. Booleans are numbers."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def _key(value: Any) -> Any:
    """The value, or its text if it is a list or a mapping."""
    return shown(value) if isinstance(value, (list, dict, tuple)) else value


def _in_order(keys: set[Any]) -> tuple[Any, ...]:
    known = [key for key in keys if rank(key) is not None]
    return (*sorted(known, key=rank), *(key for key in keys if rank(key) is None))  # type: ignore[arg-type]
