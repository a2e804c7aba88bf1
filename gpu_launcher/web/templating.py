"""Fills the templates of the pages and of reports. All text in them is escaped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from gpu_launcher.allocation.survey import label
from gpu_launcher.jobs.control import spell
from gpu_launcher.jobs.manifest import State
from gpu_launcher.jobs.result_table import shown
from gpu_launcher.sizes import show_memory
from gpu_launcher.text import one_line
from gpu_launcher.version import find_version
from gpu_launcher.web.catalogue import SweepSummary, id_of
from gpu_launcher.web.pool_watch import leased
from gpu_launcher.wording import count, duration, join_labels, rough_duration


def templates(*, is_static: bool = False) -> Environment:
    """The templates. All text is escaped. In a static page, links lead to places in it, and nothing asks a server."""
    found = Environment(
        loader=PackageLoader("gpu_launcher.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(
        State=State, id_of=id_of, label=label, leased=leased, ranges=spell, now=time.time, version=find_version()
    )
    found.globals.update(
        is_static=is_static,
        sweep_url=_sweep_url_in_static_page if is_static else _sweep_url,
        job_url=_job_url_in_static_page if is_static else _job_url,
    )
    filters: dict[str, Callable[..., str]] = {
        "line": lambda text, limit=4096: one_line(str(text), limit),
        "path": lambda path: one_line(_short(Path(path))),
        "value": lambda value: one_line(shown(value)),
        "memory": show_memory,
        "duration": lambda seconds: duration(seconds, tenths=False),
        "rough": rough_duration,
        "labels": join_labels,
        "counted": count,
        "clock": _clock,
        "url": lambda text: quote(str(text), safe="", errors="surrogateescape"),
    }
    found.filters.update(filters)
    return found


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OSError, OverflowError, ValueError):  # owners of files set their times to anything
        return "?"


def _sweep_url(sweep: SweepSummary, query: str = "") -> str:
    return f"/sweeps/{sweep.id}{query}"


def _job_url(sweep: SweepSummary, number: int) -> str:
    return f"/sweeps/{sweep.id}/jobs/{number}"


def _sweep_url_in_static_page(sweep: SweepSummary, query: str = "") -> str:
    return f"#{query}"


def _job_url_in_static_page(sweep: SweepSummary, number: int) -> str:
    return f"#job-{number}"


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)
