"""The progress bar of a `parallel_map`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Protocol

EVERY = 0.1
"""Minimum seconds between two updates of the bar."""


class Bar(Protocol):
    """Shows how many records are done."""

    patience: float | None
    """Seconds after which `show` should be called even if nothing happened. None: no need."""

    def show(self, done: int, errors: int, workers: int, *, last: bool = False) -> None:
        """Show these numbers, if an update is due or this is the `last` one."""

    def close(self) -> None:
        """Restore the terminal. Idempotent."""


def open_bar(wanted: bool, total: int | None) -> Bar:
    """Return a bar on stderr if that is a terminal and a bar is `wanted`; otherwise one that shows nothing."""
    stream = sys.stderr
    if not wanted or stream is None or stream.closed or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return _NoBar()
    return _RichBar(total)


class _NoBar:
    patience: float | None = None

    def show(self, done: int, errors: int, workers: int, *, last: bool = False) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class _RichBar:
    patience: float | None = 0.25

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=Console(file=sys.stderr),
            auto_refresh=False,  # it would start a thread, and programs with threads cannot be forked
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # else it would go to stderr
            transient=False,
        )
        self._task = self._bar.add_task("records", total=total, rate="", state="")
        self._gone = False
        """Whether the terminal is gone. The work continues without a bar."""
        self._began = time.monotonic()
        self._due = self._began
        self._bar.start()

    def show(self, done: int, errors: int, workers: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if self._gone or (now < self._due and not last):
            return
        self._due = now + EVERY
        rate = done / max(now - self._began, 1e-3)
        state = f"{workers} worker{'' if workers == 1 else 's'}"
        if errors:
            state += f", {errors} error{'' if errors == 1 else 's'}"
        self._bar.update(self._task, completed=done, rate=f"{rate:,.{0 if rate >= 100 else 1}f}/s", state=state)
        try:
            self._bar.refresh()
        except OSError:
            self._gone = True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.stop()
