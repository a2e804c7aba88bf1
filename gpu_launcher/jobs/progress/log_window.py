"""The end of a job's log, and a window into it. It may be large, and may grow while it is read."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, dropwhile, islice
from pathlib import Path

from gpu_launcher.text import CONTROL, ESCAPE_SEQUENCE

REACH = 64 * 1024
"""Bytes that are read before and after the line that is shown first."""


@dataclass(frozen=True, slots=True)
class LogWindow:
    """Lines of a file around one of them. `starts` are their offsets."""

    starts: tuple[int, ...] = ()
    raw: tuple[bytes, ...] = ()
    has_end: bool = True
    """Whether the last line is the file's last one."""
    problem: str = ""
    """Why there is nothing to show."""

    def first(self, at: int | None, rows: int) -> int:
        """Return the place of the line to show first: the one at offset `at`, or so that the last `rows` are shown."""
        last = max(0, len(self.starts) - rows)
        if at is None:
            return last
        place = max(0, bisect_right(self.starts, at) - 1)
        return min(place, last) if self.has_end else place

    def lines(self, at: int | None, rows: int) -> list[str]:
        """Return at most `rows` lines, cleaned for display."""
        first = self.first(at, rows)
        return [_cleaned(line) for line in self.raw[first : first + rows]]


def read_window(path: str | None, at: int | None) -> LogWindow:
    """Read the lines around the offset `at`, or the last ones if it is None. Never waits, and reads a bounded part.

    A line that is longer than REACH is shown in pieces.
    """
    if path is None:
        return LogWindow(problem="the job has no log")
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "its name is invalid"
        return LogWindow(problem=f"the log cannot be read: {why}")
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return LogWindow(problem="the log is not a file")
        middle = status.st_size if at is None else min(at, status.st_size)
        start = max(0, middle - REACH)
        data = os.pread(descriptor, 2 * REACH, start)
    except OSError as error:
        return LogWindow(problem=f"the log cannot be read: {error.strerror}")
    finally:
        os.close(descriptor)
    if not data:
        return LogWindow(problem="the log is empty")
    return _window(data, start, middle, has_end=start + len(data) >= status.st_size)


def _window(data: bytes, start: int, middle: int, *, has_end: bool) -> LogWindow:
    """Split what was read into lines. The one at the offset `middle` begins there, even if it is a piece of a line."""
    pieces = [*_lines(data[: middle - start]), *_lines(data[middle - start :])]
    starts = list(accumulate(map(len, pieces), initial=start))
    if has_end:
        starts.pop()
    else:
        pieces.append(b"")  # where the next piece begins, if all that was read is one line
    return LogWindow(tuple(starts), tuple(pieces), has_end)


def _lines(data: bytes) -> list[bytes]:
    """Split data after each newline, and only there."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def log_tail(path: str | None, *, lines: int = 10, width: int = 300) -> list[str]:
    """Return the last lines of a log, cleaned for display. Empty if the log cannot be read for any reason.

    Not promised: that a line longer than REACH is returned from its beginning.
    """
    window = read_window(path, None)
    cut_off = len(window.raw) > 1 and window.starts[0] > 0
    cleaned = (_cleaned(line) for line in reversed(window.raw[cut_off:]))
    shown = list(islice(dropwhile(lambda line: not line, cleaned), lines))
    return [line if len(line) <= width else line[: width - 1] + "…" for line in reversed(shown)]


def _cleaned(line: bytes) -> str:
    """Return a line as a terminal showed it last, after it was rewritten with carriage returns."""
    text = ESCAPE_SEQUENCE.sub("", line.decode("utf-8", "replace")).expandtabs(4)
    last = next((part for part in reversed(text.split("\r")) if part.strip()), "")
    return CONTROL.sub("", last).rstrip()


def files_of(log: str | None) -> list[tuple[str, str]]:
    """Return the files with what a job printed, as name and path. A command of a map has two.

    The one that a person wants to see first comes first.
    """
    if log is None:
        return []
    path = Path(log)
    if not path.name.startswith("stderr"):
        return [("log", log)]
    stdout = str(path.with_name(path.name.replace("stderr", "stdout", 1)))
    return [("stdout", stdout), ("stderr", log)]
