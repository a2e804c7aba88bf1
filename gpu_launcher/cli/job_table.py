"""Formats the jobs of a sweep as a table or as JSON. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_launcher.cli.table import Column, Line, Row, lay_out
from gpu_launcher.jobs.manifest import Entry, State
from gpu_launcher.text import one_line
from gpu_launcher.wording import count, duration

SCHEMA = 1
COLUMNS = (
    Column("job", right=True),
    Column("state"),
    Column("attempts", right=True, optional=3),
    Column("time", right=True, optional=2),
    Column("devices", optional=1),
    Column("overrides"),
    Column("why"),
)


def unfinished(entry: Entry) -> bool:
    """Whether the job ended without completing."""
    return entry.state in (State.FAILED, State.CANCELLED, State.LOST)


def lines(directory: Path, entries: Sequence[Entry], shown: Sequence[Entry], width: int | None) -> list[Line]:
    """A line with the number of jobs in each state, and a table of the jobs `shown`."""
    counts = Counter(entry.state for entry in entries)
    said = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    head: Line = [(f"{one_line(str(directory))}: {count(len(entries), 'job')}: {said}", "bold")]
    rows = [
        Row(
            [
                str(entry.number),
                entry.state.value,
                str(entry.counted_attempts or ""),
                "" if entry.seconds is None else duration(entry.seconds),
                one_line(", ".join(entry.devices)),
                one_line(entry.label),
                one_line(entry.message or ""),
            ]
        )
        for entry in shown
    ]
    return [head, *(lay_out(COLUMNS, rows, width) if rows else [])]


def to_json(directory: Path, shown: Sequence[Entry]) -> dict[str, Any]:
    """Make the JSON data that docs/resume.md documents."""
    return {"schema": SCHEMA, "directory": str(directory.absolute()), "jobs": [_job(entry) for entry in shown]}


def _job(entry: Entry) -> dict[str, Any]:
    return {
        "number": entry.number,
        "state": entry.state.value,
        "overrides": entry.spec,
        "attempts": entry.counted_attempts,
        "moves": entry.moves,
        "devices": list(entry.devices),
        "pid": entry.pid,
        "started": entry.started,
        "ended": entry.ended,
        "message": entry.message,
        "log": entry.log,
    }
