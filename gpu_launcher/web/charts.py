"""Charts of a sweep's values, as options of ECharts. Pure.

Texts in them are drawn on a canvas, so they are never read as HTML. `renderMode: richText` makes that true of tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.manifest import State
from gpu_launcher.jobs.pivot import is_number
from gpu_launcher.jobs.result_panels import Panel, assignments, panels
from gpu_launcher.jobs.result_table import ResultTable, shown
from gpu_launcher.studies.report_curves import Curve
from gpu_launcher.text import one_line
from gpu_launcher.wording import count

MAX_LINES = 1000
"""Maximum number of jobs among the parallel coordinates: more of them cannot be told apart."""
MAX_AXES = 10
MAX_POINTS = 2000
"""Maximum number of jobs in another chart: the latest."""

Chart = dict[str, Any]


def numeric_values(table: ResultTable) -> list[str]:
    """The names of the values that can be drawn."""
    return [
        name
        for name, column in table.value_columns.items()
        if all(value is None or is_number(value) for value in map(column.get, table))
        and any(column.get(row) is not None for row in table)
    ]


def charts(table: ResultTable, value: str) -> list[Chart]:
    """Return charts of a value, each with a title, a description and options. Raises OptionError."""
    name, found = panels(table, value)
    over_time, *by_param = found
    drawn = [] if not by_param else [_parallel(table, value, name)]
    return [*drawn, _points(over_time, name), *(_points(panel, name) for panel in by_param)]


def report_charts(table: ResultTable, curves: Sequence[Curve], *, are_all: bool) -> list[Chart]:
    """Return a chart of what jobs reported while they ran, if any did. `are_all`: whether these are all curves."""
    rows = {row.number: row for row in table}
    series = [
        {
            "type": "line",
            "name": one_line(" ".join([f"job {curve.number}:", *assignments(table, rows[curve.number].params)]), 120),
            "data": [[step, None if value is None else float(f"{value:.6g}")] for step, value in curve.points],
            "symbolSize": 4,
            "lineStyle": {"width": 1.5},
            "emphasis": {"focus": "series"},
        }
        for curve in sorted(curves, key=lambda curve: curve.number)
        if curve.number in rows
    ]
    if not series:
        return []
    which = "" if are_all else ": of the running ones and the latest others"
    return [
        {
            "title": "Reports",
            "about": f"What {count(len(series), 'job')} reported by step{which}.",
            "wide": True,
            "option": {
                "tooltip": {"trigger": "item", "renderMode": "richText"},
                "grid": {"left": 60, "right": 20, "top": 16, "bottom": 44},
                "xAxis": {"type": "value", "scale": True, "name": "step", "nameLocation": "middle", "nameGap": 26},
                "yAxis": {"type": "value", "scale": True},
                "series": series,
            },
        }
    ]


def _parallel(table: ResultTable, value: str, name: str) -> Chart:
    column = table.value_columns.get(value)
    if column is None:
        raise OptionError("value", f"there is no value {value!r}")
    rows = [row for row in table if row.outcome == State.COMPLETED.value and _finite(column.get(row))]
    direction = table.directions.get(value)
    rows.sort(key=lambda row: column.get(row), reverse=direction == "maximize")
    kept = rows[:MAX_LINES]
    params = sorted(table.param_columns.values(), key=lambda param: -len({shown(param.get(row)) for row in kept}))
    params = params[: MAX_AXES - 1]
    columns = [[param.get(row) for row in kept] for param in params]
    axes = [_axis(one_line(param.name, 40), values) for param, values in zip(params, columns, strict=True)]
    results = [column.get(row) for row in kept]
    axes.append({"type": "value", "name": name, "scale": True})
    data = [[*map(_point, cells), result] for *cells, result in zip(*columns, results, strict=True)]
    low, high = min(results, default=0.0), max(results, default=0.0)
    number = len(params)
    better = "" if direction is None else f", {'low' if direction == 'minimize' else 'high'} values are best"
    which = "" if len(rows) == len(kept) else f"; the first {MAX_LINES} of {len(rows)} jobs"
    return {
        "title": f"{name} and parameters",
        "about": f"Parallel coordinates of {count(len(kept), 'completed job')}{better}{which}.",
        "wide": True,
        "option": {
            "parallelAxis": [{"dim": place, **axis} for place, axis in enumerate(axes)],
            "parallel": {"left": 70, "right": 110, "top": 40, "bottom": 30, "parallelAxisDefault": {"nameGap": 12}},
            "visualMap": {
                "show": low < high,
                "type": "continuous",
                "dimension": number,
                "min": low,
                "max": high,
                "right": 0,
                "top": "middle",
                "precision": 4,
                "itemHeight": 100,
                "inRange": {"color": ["#35b779", "#31688e", "#c46be0"]},
            },
            "series": [
                {
                    "type": "parallel",
                    "data": data,
                    "lineStyle": {"width": 1.5, "opacity": 0.8 if len(kept) < 100 else 0.35},
                    "progressive": 200,
                }
            ],
        },
    }


def _axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if known and all(is_number(value) and not isinstance(value, bool) and math.isfinite(value) for value in known):
        is_log = min(known) > 0 and max(known) >= 100 * min(known)
        return {"name": name, "type": "log" if is_log else "value", **({} if is_log else {"scale": True})}
    return {"name": name, "type": "category", "data": list(dict.fromkeys(_point(value) for value in values))}


def _points(panel: Panel, name: str) -> Chart:
    x, y, labels = (values[-MAX_POINTS:] for values in (panel.x, panel.y, panel.labels))
    is_number_axis = all(is_number(value) and not isinstance(value, bool) for value in x)
    axis = {"type": "log"} if panel.is_log else {"type": "value", "scale": True} if is_number_axis else _categories(x)
    data = [
        {"value": [_point(at), value], "name": label}
        for at, value, label in zip(x, y, labels, strict=True)
        if _finite(value)
    ]
    return {
        "title": f"{name} by {panel.title}" if panel.labels and panel.title[:7] != "seconds" else f"{name} over time",
        "about": f"{count(len(data), 'job')}.",
        "wide": False,
        "option": {
            "tooltip": {"trigger": "item", "renderMode": "richText"},
            "grid": {"left": 60, "right": 20, "top": 16, "bottom": 44},
            "xAxis": {**axis, "name": panel.title, "nameLocation": "middle", "nameGap": 26},
            "yAxis": {"type": "value", "scale": True},
            "series": [{"type": "scatter", "data": data, "symbolSize": 6, "itemStyle": {"opacity": 0.7}}],
        },
    }


def _categories(values: Sequence[Any]) -> dict[str, Any]:
    return {"type": "category", "data": list(dict.fromkeys(map(_point, values)))}


def _point(value: Any) -> float | str | None:
    """A value on an axis."""
    if is_number(value) and not isinstance(value, bool):
        return value if math.isfinite(value) else None
    return one_line(shown(value), 40)


def _finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
