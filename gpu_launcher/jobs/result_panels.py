"""Diagrams of a value of a sweep's jobs as data: by each parameter that differs, and over time. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.pivot import is_number, number_column
from gpu_launcher.jobs.result_table import ResultTable, shown
from gpu_launcher.text import one_line

MAX_PANELS = 12
"""Maximum number of parameters that are drawn: those that have the most different values."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram of points."""

    title: str
    x: list[Any]
    y: list[float]
    labels: list[str]
    """What to say about each point."""
    is_log: bool = False
    """Whether the numbers of `x` are of very different sizes."""


def panels(table: ResultTable, value: str | None) -> tuple[str, list[Panel]]:
    """Return the name of the value, and a panel for each parameter and for the time. Raises OptionError."""
    column = number_column(table, value)
    rows = sorted((row for row in table if column.get(row) is not None), key=lambda row: (row.ended or 0.0, row.number))
    if not rows:
        raise OptionError("plot", f"no job has a {column.name}")
    y = [column.get(row) for row in rows]
    labels = [one_line(f"job {row.number}: {' '.join(assignments(table, row.params))}") for row in rows]
    start = min((row.started for row in rows if row.started is not None), default=0.0)
    found = [Panel("seconds since the start", [(row.ended or start) - start for row in rows], y, labels)]
    params = sorted(table.param_columns.values(), key=lambda param: -len({shown(param.get(row)) for row in rows}))
    for param in params[:MAX_PANELS]:
        x = [param.get(row) for row in rows]
        if all(is_number(one) and not isinstance(one, bool) for one in x):
            is_log = min(x) > 0 and max(x) >= 100 * min(x)
            found.append(Panel(one_line(param.name), x, y, labels, is_log))
        else:
            found.append(Panel(one_line(param.name), [one_line(shown(one), 40) for one in x], y, labels))
    return one_line(column.name), found


def assignments(table: ResultTable, params: dict[str, Any]) -> list[str]:
    """Return `name=value` of the parameters that differ between jobs."""
    return [f"{name}={shown(params[name])}" for name in table.varying if name in params]
