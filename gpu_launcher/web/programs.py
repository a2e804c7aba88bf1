"""The programs that the pages start: sweeps, which continue without the server, and the dry runs that check them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.jobs.leaving import detached_directory
from gpu_launcher.processes.linux import dying_with_parent
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
    """Its exit code. None if it has not ended."""
    output: str
    """What it has written, or the last part of it."""
    sweep: Path | None
    """The directory of the sweep that has begun, if the output says it."""


class Programs:
    """Starts programs and keeps what they write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Never held while something is opened or started: a file system that hangs must not stop the pages."""
        self._kept: dict[str, _Program] = {}

    def check(self, plan: Plan) -> str:
        """Check a sweep, and return an id. Ends the check before. Raises OSError."""
        with self._lock:
            self._end_checks()
            id, program = self._add(plan, is_check=True)
        return self._run(id, program)

    def start(self, check: str) -> str:
        """Start the sweep that was checked, once, and return the id of the start. Raises OSError and KeyError."""
        with self._lock:
            checked = self._kept[check]
            if not checked.is_check:
                raise KeyError(check)
            if checked.start is not None:
                return checked.start
            id, program = self._add(checked.plan, is_check=False)
            checked.start = id
        try:
            return self._run(id, program)
        except OSError:
            checked.start = None
            raise

    def _add(self, plan: Plan, *, is_check: bool) -> tuple[str, _Program]:
        running = sum(program.code is None for program in self._kept.values())
        if running >= MAX_RUNNING:
            raise OSError(None, f"{running} programs have not begun yet: wait until one has")
        for id in [id for id, program in self._kept.items() if program.code is not None]:
            if len(self._kept) >= MAX_KEPT:
                self._kept.pop(id).output.close()
        id = secrets.token_hex(8)
        self._kept[id] = _Program(plan, is_check)
        return id, self._kept[id]

    def _run(self, id: str, program: _Program) -> str:
        try:
            program.run()
        except BaseException:
            with self._lock:
                self._kept.pop(id).output.close()
            raise
        with self._lock:
            if program.is_told:  # while it was being started
                program.end()
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
            while self._kept:
                self._kept.popitem()[1].output.close()

    def _read(self, id: str) -> ProgramReading:
        program = self._kept[id]
        code = program.code  # before the output, so that this is all of it if the program has ended
        part = read_part(program.output.fileno())
        output = part.text + part.tail
        sweep = detached_directory(output, program.plan.directory) if code == 0 and not program.is_check else None
        return ProgramReading(id, program.plan.line, program.is_check, code, output, sweep)

    def _running_checks(self) -> list[_Program]:
        return [program for program in self._kept.values() if program.is_check and program.code is None]

    def _end_checks(self) -> None:
        """Let checks end, and kill those that were told to and did not."""
        for program in self._running_checks():
            program.end()


class _Program:
    """A program in a session of its own, which Ctrl-C does not reach.

    It writes to a file and not to the server, so it can still write when the server has ended.
    """

    def __init__(self, plan: Plan, is_check: bool) -> None:
        self.plan = plan
        self.is_check = is_check
        self.output = tempfile.TemporaryFile()
        self.start: str | None = None
        """The id of the start of the sweep that this has checked."""
        self._process: subprocess.Popen[bytes] | None = None
        self.is_told = False
        """Whether it was told to end."""

    @property
    def code(self) -> int | None:
        """Its exit code. None if it has not ended. Called only by one thread at a time, as `end` is."""
        return None if self._process is None else self._process.poll()

    def run(self) -> None:
        """Start it. A check ends with the server, however that ends; a sweep does not. Raises OSError."""
        if self.is_check:
            started: Future[None] = Future()
            threading.Thread(target=self._run_and_wait, args=(started,), daemon=True).start()
            started.result()
        else:
            self._process = self._popen()

    def _run_and_wait(self, started: Future[None]) -> None:
        # The kernel ends it with the thread that has started it, so this thread lives as long as the program.
        try:
            self._process = process = self._popen()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        with suppress(ChildProcessError):  # another thread has already seen that it ended
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def _popen(self) -> subprocess.Popen[bytes]:
        plan, directory = self.plan, self.plan.open_in()
        try:
            here = f"/proc/self/fd/{directory}"  # the directory that was checked, whatever has its name by now
            return subprocess.Popen(
                dying_with_parent(plan.check, signal.SIGKILL, here) if self.is_check else plan.start,
                cwd=here,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **plan.environ, "PWD": str(plan.directory)},
                start_new_session=True,
            )
        finally:
            os.close(directory)

    def end(self) -> None:
        """Ask it to end, and the next time kill it."""
        signum = signal.SIGKILL if self.is_told else signal.SIGTERM
        self.is_told = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signum)
