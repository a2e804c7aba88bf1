"""Running the measured programs: each in a directory and a pool of its own, all its processes accounted for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from overhead.machine import Others, wait_until_idle

PROGRAMS = Path(__file__).parents[1] / "programs"
LIMIT = 600.0
"""Seconds that one run may take."""
_PR_SET_CHILD_SUBREAPER = 36


class ProgramError(Exception):
    """A measured program failed, so that there is nothing to measure."""


@dataclass(frozen=True)
class Usage:
    """What one run took."""

    wall: float
    """Seconds from start to end."""
    cpu: float
    """Seconds of CPU of all its processes."""
    others: float
    """Cores that everybody else used meanwhile."""


class Run:
    """A program that runs. Use as a context manager, which ends whatever is left of it."""

    patience: ClassVar[float] = 0.0
    """Seconds to wait before each run for an idle machine."""

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        environment: dict[str, str],
        elsewhere: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Start it. `elsewhere` returns seconds of CPU that others have used for it: Slurm's jobs are not below it."""
        # Workers that outlive their launcher become our children, to be counted and ended.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
        wait_until_idle(self.patience)
        self._output = directory / "output.txt"
        self._others = Others()
        self._elsewhere = elsewhere
        self._cpu_before = _children_cpu() + elsewhere()
        self._started = time.monotonic()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                env={**_clean_environment(), "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        self._reap(kill=True)

    @property
    def ended(self) -> bool:
        """Whether its first process has ended."""
        return self._process.poll() is not None

    def tree(self) -> list[int]:
        """Process ids of all its processes that are alive."""
        return descendants(self._process.pid)

    def wait(self) -> Usage:
        """Wait for its end. Raises ProgramError if that is a failure, or does not come."""
        try:
            status = self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise ProgramError(f"{self._process.args} is not done after {LIMIT:.0f} s") from None
        wall = time.monotonic() - self._started
        self._reap(kill=False)
        if status != 0:
            tail = self._output.read_text(errors="replace")[-2000:]
            raise ProgramError(f"{self._process.args} ended with status {status}:\n{tail}")
        cpu = _children_cpu() + self._elsewhere() - self._cpu_before
        return Usage(wall, cpu, self._others.cores(cpu))

    def _reap(self, *, kill: bool) -> None:
        """Wait for what our program has left us, which is about to end by itself, or is killed."""
        deadline = time.monotonic() + 10
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                if kill or time.monotonic() > deadline:
                    for left in descendants(os.getpid())[1:]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(left, signal.SIGKILL)
                time.sleep(0.01)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for one run."""
    with tempfile.TemporaryDirectory(prefix="launch-overhead-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def program(name: str, *arguments: str) -> list[str]:
    """Command line of one of the programs."""
    return [sys.executable, str(PROGRAMS / name), *arguments]


def descendants(pid: int) -> list[int]:
    """Process ids of the process and all below it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found.extend(int(child) for child in (task / "children").read_text().split())
    return found


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _clean_environment() -> dict[str, str]:
    """Ours, without what would change what is measured."""
    dropped = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTHONWARNINGS")
    return {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("BENCH_")}
