"""What `gpu-launcher sweeps` says about each sweep, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_launcher.cli.table import Column, Line, Row, lay_out
from gpu_launcher.jobs.manifest import State
from gpu_launcher.jobs.sweep_overview import DescribedSweep
from gpu_launcher.text import one_line, short_path
from gpu_launcher.wording import count

SCHEMA = 1
COLUMNS = (
    Column("state"),
    Column("jobs"),
    Column("found", optional=2),
    Column("program", optional=1),
    Column("directory"),
)


def lines(sweeps: Sequence[DescribedSweep], width: int | None) -> list[Line]:
    """A table with a row for each sweep."""
    rows = [
        Row(
            [
                sweep.state,
                _progress(sweep),
                ", ".join(f"{name} {one_line(value)}" for name, value in sweep.facts),
                "" if sweep.command is None else f"{sweep.command} (process {sweep.pid} on {sweep.host})",
                one_line(short_path(sweep.directory.absolute())),
            ]
        )
        for sweep in sweeps
    ]
    return lay_out(COLUMNS, rows, width)


def _progress(sweep: DescribedSweep) -> str:
    said = ", ".join(f"{sweep.jobs[state]} {state.value}" for state in State if sweep.jobs.get(state))
    if sweep.total is None:
        return said or "none yet"
    return f"of {count(sweep.total, 'job')}: {said or 'none yet'}"


def to_json(sweeps: Sequence[DescribedSweep]) -> dict[str, Any]:
    """Make the JSON data that docs/steering.md documents."""
    return {
        "schema": SCHEMA,
        "sweeps": [
            {
                "directory": str(sweep.directory.absolute()),
                "state": sweep.state,
                "jobs": {state.value: sweep.jobs.get(state, 0) for state in State},
                "total": sweep.total,
                "facts": dict(sweep.facts),
                "command": sweep.command,
                "pid": sweep.pid,
                "host": sweep.host,
            }
            for sweep in sweeps
        ],
    }
