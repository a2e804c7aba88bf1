"""The programs that the pages start: sweeps, which continue without the server, and the dry runs that check them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from gpu_launcher.web.log_text import read_part
from gpu_launcher.web.new_sweep import Plan

MAX_RUNNING = 16
"""Maximum number of programs that have not ended. A sweep that has begun does not count: it is a process of its own."""
MAX_KEPT = 32
"""Number of programs whose output is kept."""
ENDING_SECONDS = 2.0
"""Seconds that checks have to end when the server ends. Then they are killed."""


@dataclass(frozen=True, slots=True)
class ProgramReading:
    """A program at one moment."""

    id: str
    line: str
    """The command line that starts the sweep."""
    is_check: bool
    """Whether it only checks the sweep."""
    code: int | None
    """Its exit code. None if it runs."""
    output: str
    """What it has written, or the last part of it."""


class Programs:
    """Starts programs and keeps what they write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, _Program] = {}

    def run(self, plan: Plan, *, is_check: bool) -> str:
        """Start the sweep, or check it, and return an id. A check ends the one before. Raises OSError."""
        with self._lock:
            if is_check:
                self._end_checks()
            running = sum(program.process.poll() is None for program in self._kept.values())
            if running >= MAX_RUNNING:
                raise OSError(None, f"{running} programs have not begun yet: wait until one has")
            for id in [id for id, program in self._kept.items() if program.process.poll() is not None]:
                if len(self._kept) >= MAX_KEPT:
                    self._kept.pop(id).output.close()
            id = secrets.token_hex(8)
            self._kept[id] = _start(plan, is_check=is_check)
            return id

    def read(self, id: str) -> ProgramReading:
        """Raises KeyError if the id is unknown."""
        with self._lock:
            return self._read(id)

    def starts(self) -> list[ProgramReading]:
        """The sweeps that were started, the last one first."""
        with self._lock:
            return [self._read(id) for id in reversed(self._kept) if not self._kept[id].is_check]

    def close(self) -> None:
        """End what only checks. Sweeps continue."""
        with self._lock:
            self._end_checks()
            deadline = time.monotonic() + ENDING_SECONDS
            while self._running_checks() and time.monotonic() < deadline:
                time.sleep(0.02)
            self._end_checks()

    def _read(self, id: str) -> ProgramReading:
        program = self._kept[id]
        code = program.process.poll()  # before the output, so that this is all of it if the program has ended
        part = read_part(program.output.fileno())
        output = part.text + part.tail
        return ProgramReading(id, program.line, program.is_check, code, output)

    def _running_checks(self) -> list[_Program]:
        return [program for program in self._kept.values() if program.is_check and program.process.poll() is None]

    def _end_checks(self) -> None:
        """Let checks end, and kill those that were told to and did not."""
        for program in self._running_checks():
            with suppress(ProcessLookupError):
                os.killpg(program.process.pid, signal.SIGKILL if program.is_told else signal.SIGTERM)
            program.is_told = True


@dataclass(slots=True)
class _Program:
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    line: str
    is_check: bool
    is_told: bool = False
    """Whether it was told to end."""


def _start(plan: Plan, *, is_check: bool) -> _Program:
    """Start a program in a session of its own: neither Ctrl-C nor the end of the server ends it.

    It writes to a file and not to the server, so it can still write when the server has ended.
    """
    output = tempfile.TemporaryFile()
    try:
        directory = plan.open_in()
        try:
            process = subprocess.Popen(
                plan.check if is_check else plan.start,
                cwd=f"/proc/self/fd/{directory}",  # the directory that was checked, whatever has its name by now
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **plan.environ, "PWD": str(plan.directory)},
                start_new_session=True,
            )
        finally:
            os.close(directory)
    except BaseException:
        output.close()
        raise
    return _Program(process, output, plan.line, is_check)
