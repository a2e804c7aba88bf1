"""Directs a job's output: first into memory, then into its log.

1. The supervisor creates a file in memory (`early_output`), which becomes standard output and error of the job that it
   forks. If the job dies before it has a log, the end of that file becomes part of the failure's message.
2. A prepared job proposes a log: Hydra's `job.log` in its output directory (`gpu_pool_launcher/_program.py`), or
   `stdout` and `stderr` of a run of `gpu-launcher map` (`cli/mapping`).
3. The node answers with the path, which differs if another job of the sweep has that log (`jobs/directory.py`).
4. `JobOutput.redirect` appends what was printed so far to the log, and everything printed later.

Calls and records do not have a log: their output goes where the program's output goes. A trial of `optimize` has one if
the search has a directory. It is chosen when the trial is known, which is after the job has its devices.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gpu_launcher.processes.forking import flush_all
from gpu_launcher.safe_files import open_regular

MAX_EARLY_OUTPUT = 4096
"""Maximum number of bytes of a job's early output that a failure's message contains."""


def early_output() -> int:
    """Create a file in memory for what a job prints before it has a log. Returns its descriptor."""
    return os.memfd_create("gpu-launcher-early-output")


def end_of(early: int) -> bytes:
    """Return the end of what a job printed before it had a log."""
    size = os.fstat(early).st_size
    return os.pread(early, MAX_EARLY_OUTPUT, max(0, size - MAX_EARLY_OUTPUT))


class JobOutput:
    """Standard input, output and error of a job's process."""

    def __init__(self) -> None:
        """Read standard input from /dev/null. Output goes where the supervisor has directed it."""
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self._early = os.dup(1)

    def redirect(self, log: Path) -> None:
        """Append what was printed so far, and all later output, to `log`."""
        self._redirect(log, self.early_output)

    def redirect_from_now_on(self, log: Path) -> None:
        """Append all later output to `log`. What was printed so far may have gone to the program's terminal."""
        self._redirect(log, lambda: b"")

    @staticmethod
    def _redirect(log: Path, before: Callable[[], bytes]) -> None:
        flush_all(ignore_errors=True)
        target = open_regular(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(target, before())
        for descriptor in (1, 2):
            os.dup2(target, descriptor)
        os.close(target)

    def early_output(self) -> bytes:
        """Return what was printed before `redirect`."""
        return os.pread(self._early, os.fstat(self._early).st_size, 0)


def use_descriptors() -> None:
    """Make `sys.stdout` and `sys.stderr` write to descriptors 1 and 2, line by line.

    A test runner or a notebook may have replaced them by objects that belong to the parent.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and _descriptor(stream) == descriptor:
            stream.reconfigure(line_buffering=True)
        else:
            stream = open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
            setattr(sys, name, stream)


def _descriptor(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # closed, or not backed by a descriptor
        return None
