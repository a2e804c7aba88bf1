"""Makes a static page: the page of a sweep as one file that needs neither a server nor other files. Pure.

It has the templates, the style and the charts of the page that a server shows. Its jobs and charts are compressed JSON,
of which `static/static_page.js` makes a table and charts. What is chosen in the table is after the # of the address,
instead of after the ?.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from gpu_launcher.jobs.pivot import number_column
from gpu_launcher.jobs.result_table import ResultColumn, ResultTable, rank, shown
from gpu_launcher.web.catalogue import SweepReading
from gpu_launcher.web.charts import Chart, charts
from gpu_launcher.web.table_page import ROWS, TableQuery, cell_of, select, title_of
from gpu_launcher.web.templating import templates

MAX_CHARTED_VALUES = 8
"""Maximum number of values that a static page has charts of. Those of thousands of jobs take half a MB each."""
SEARCHED = ("number", "message", "node")
"""Columns that are searched for a text, besides the parameters."""


def static_page(
    sweep: SweepReading, reports: Sequence[Chart] = (), *, sort: str | None = None, value: str | None = None
) -> str:
    """Return the page of a sweep as one file of HTML. `sort` and `value` are what its table and charts show first.

    `reports` are charts of what its jobs reported while they ran. Raises OptionError if one of them cannot be shown.
    """
    table = sweep.table
    if sort is not None:
        table.sorted_by(sort)
    if value is not None:
        number_column(table, value)
    ordered = sorted(sweep.values, key=lambda name: name != value)
    sweep = replace(sweep, values=ordered[:MAX_CHARTED_VALUES])
    page = select(table, TableQuery(sort=sort or ""))
    data = {
        "columns": [_column(table, column, prefix) for column, prefix in _prefixes(table)],
        "usual": [name for name, is_shown in page.columns if is_shown],
        "sort": page.query.sort,
        "rows": ROWS,
        "common": " ".join(_common(table)),
        "charts": {name: charts(table, name) for name in sweep.values},
        "reports": reports,
    }
    has_charts = bool(sweep.values or reports)
    scripts = ["charts.js", "static_page.js"]
    if has_charts:
        scripts.insert(0, "echarts.min.js")
    style, *texts = (_static(name) for name in ("page.css", *scripts))
    return (
        templates(is_static=True)
        .get_template("static_page.html")
        .render(
            sweep=sweep,
            page=page,
            reports=reports,
            best=None if sweep.best is None else table.best,
            read_only=True,
            left_out=len(ordered) - len(sweep.values),
            policy=_policy(style, texts),
            style=Markup(style),
            scripts=[Markup(text) for text in texts],
            icon=base64.b64encode(_static("icon.svg").encode()).decode(),
            licence=_static("echarts.LICENSE") if has_charts else "",
            data=base64.b64encode(gzip.compress(json.dumps(data, allow_nan=False).encode(), mtime=0)).decode(),
        )
    )


def _prefixes(table: ResultTable) -> list[tuple[ResultColumn, str | None]]:
    """The columns, each with what a search finds before a cell's text. None: it is not searched."""
    prefixes = {name: f"{param}=" for name, param in zip(table.param_columns, table.varying, strict=True)}
    prefixes.update(dict.fromkeys(SEARCHED, ""))
    return [(column, prefixes.get(column.name)) for column in table.columns]


def _column(table: ResultTable, column: ResultColumn, prefix: str | None) -> dict[str, Any]:
    """A column as data: its different texts in the order in which they are sorted, and which of them each job has."""
    values = [column.get(row) for row in table]
    keys = [(type(value), value if value.__hash__ else shown(value)) for value in values]
    different = dict(zip(keys, values, strict=True))
    ranks = {key: place for key, value in different.items() if (place := rank(value)) is not None}
    ranked = sorted(ranks, key=ranks.__getitem__)
    order = [*ranked, *(key for key in different if key not in ranks)]
    cells = [cell_of(column, different[key]) for key in order]
    places = {key: place for place, key in enumerate(order)}
    return {
        "name": column.name,
        "title": title_of(column),
        "prefix": prefix,
        "number": all(cell.is_number or not cell.text for cell in cells),
        "texts": [[cell.text, cell.whole] if cell.whole else cell.text for cell in cells],
        "ranked": len(ranked),
        "cells": [places[key] for key in keys],
    }


def _common(table: ResultTable) -> list[str]:
    """The parameters that are the same for all jobs."""
    first = table[0].params if len(table) else {}
    return [f"{name}={shown(value)}" for name, value in first.items() if name not in table.varying]


def _static(name: str) -> str:
    return files("gpu_launcher.web").joinpath("static").joinpath(name).read_text("utf-8")


def _policy(style: str, scripts: list[str]) -> str:
    """What the page may do: run its own scripts, and load nothing."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_source, scripts))}",
            f"style-src {_source(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _source(text: str) -> str:
    """A text as a source that a content security policy admits."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
