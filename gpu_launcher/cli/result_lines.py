"""Formats the results of a sweep as lines or as JSON. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from gpu_launcher.cli.table import Column, Line, Row, cut, lay_out
from gpu_launcher.jobs.pivot import Pivot
from gpu_launcher.jobs.result_table import JobRow, ResultTable, shown
from gpu_launcher.sizes import show_memory
from gpu_launcher.text import one_line
from gpu_launcher.wording import count, duration

SCHEMA = 1
MAX_CELL = 32
"""Maximum width of a parameter or value on a terminal."""


def lines(table: ResultTable, width: int | None, total: int | None = None) -> list[Line]:
    """A line for each job, and a head. On a terminal, the first line names the sweep.

    `total` is the number of its jobs, by default that of the table.
    """
    params, values = table.param_columns, table.value_columns
    columns = [
        Column("number", right=True),
        *(Column(_text(name), optional=2) for name in params),
        *(Column(_text(name), right=True, optional=1) for name in values),
        Column("outcome"),
        Column("duration", right=True, optional=3),
        Column("peak_memory", right=True, optional=4),
        Column("peak_device_memory", right=True, optional=5),
        Column("attempts", right=True, optional=6),
        Column("node", optional=7),
        Column("directory", optional=8),
    ]
    getters = [column.get for column in (*params.values(), *values.values())]
    here = f"{os.getcwd()}/"  # noqa: PTH109
    rows = [
        Row(
            [
                str(row.number),
                *(_cell(get(row), width) for get in getters),
                row.outcome,
                "" if row.duration is None else duration(row.duration),
                _memory(row.peak_memory),
                _memory(row.peak_device_memory),
                str(row.attempts or ""),
                _text(row.node or ""),
                _text((row.directory or "").removeprefix(here)),
            ]
        )
        for row in table
    ]
    some = "" if total in (None, len(table)) else f"{len(table)} of "
    title: Line = [(f"{_text(str(table.directory))}: {some}{count(total or len(table), 'job')}", "bold")]
    return [*([] if width is None else [title]), *lay_out(columns, rows, width)]


def pivot_lines(pivot: Pivot, width: int | None) -> list[Line]:
    """A line for each row of the pivot, and a head. A mean of several values is followed by their number."""
    head = [f"{pivot.down} \\ {pivot.across}", *map(_cell, pivot.columns)]
    columns = [Column(_text(name), right=place > 0) for place, name in enumerate(head)]
    rows = [Row([_cell(row), *(_mean(pivot, row, column) for column in pivot.columns)]) for row in pivot.rows]
    return lay_out(columns, rows, width)


def _mean(pivot: Pivot, row: Any, column: Any) -> str:
    if (mean := pivot.mean(row, column)) is None:
        return ""
    number = len(pivot.cells[row, column])
    return f"{mean:.6g}" + (f" ({number})" if number > 1 else "")


def _cell(value: Any, width: int | None = None) -> str:
    text = "" if value is None else _text(shown(value))
    return text if width is None else cut(text, MAX_CELL)


def _text(text: str) -> str:
    return text if text.isprintable() and len(text) <= 200 else one_line(text)


def _memory(size: int | None) -> str:
    return "" if size is None else show_memory(size)


def to_json(table: ResultTable) -> dict[str, Any]:
    """The JSON data that docs/results.md documents."""
    return {
        "schema": SCHEMA,
        "directory": str(table.directory.absolute()),
        "varying": list(table.varying),
        "values": list(table.value_names),
        "directions": dict(table.directions),
        "jobs": list(rows_to_json(table)),
    }


def rows_to_json(table: ResultTable) -> Iterator[dict[str, Any]]:
    """A JSON object for each job."""
    return map(_row_to_json, table)


def _row_to_json(row: JobRow) -> dict[str, Any]:
    return {
        "number": row.number,
        "outcome": row.outcome,
        "params": row.params,
        "values": row.values,
        "duration": row.duration,
        "attempts": row.attempts,
        "peak_memory": row.peak_memory,
        "peak_device_memory": row.peak_device_memory,
        "devices": list(row.devices),
        "node": row.node,
        "directory": row.directory,
        "message": row.message,
        "started": row.started,
        "ended": row.ended,
    }


def cells(pivot: Pivot) -> list[dict[str, Any]]:
    """A JSON object for each cell of a pivot."""
    return [
        {pivot.down: row, pivot.across: column, "mean": pivot.mean(row, column), "jobs": len(pivot.cells[row, column])}
        for row in pivot.rows
        for column in pivot.columns
        if (row, column) in pivot.cells
    ]
