"""The end of a job's log, for display."""

from __future__ import annotations

import os
import stat

from gpu_launcher.text import CONTROL, ESCAPE_SEQUENCE


def log_tail(path: str | None, *, lines: int = 10, width: int = 300, window: int = 32 * 1024) -> list[str]:
    """Return the last lines of a log, cleaned for display. Empty if the log cannot be read for any reason.

    Reads at most `window` bytes from the end. A line that was rewritten with carriage returns, such as a progress bar,
    is returned as it looked last. Not promised: that a line longer than `window` is returned from its beginning.
    """
    if path is None:
        return []
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return []
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return []
        start = max(0, status.st_size - window)
        data = os.pread(descriptor, window, start)
    except OSError:
        return []
    finally:
        os.close(descriptor)
    raw = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    if start > 0 and len(raw) > 1:
        del raw[0]
    shown: list[str] = []
    for line in reversed(raw):
        line = as_it_looked(line)
        if not line and not shown:
            continue
        shown.append(line if len(line) <= width else line[: width - 1] + "…")
        if len(shown) == lines:
            break
    shown.reverse()
    return shown


def as_it_looked(line: str) -> str:
    line = ESCAPE_SEQUENCE.sub("", line).expandtabs(4)
    last = next((part for part in reversed(line.split("\r")) if part.strip()), "")
    return CONTROL.sub("", last).rstrip()
