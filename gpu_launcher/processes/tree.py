"""The process tree of a job or command: all descendants of its supervisor, which is a subreaper.

When the main process has ended, its descendants have LINGER_SECONDS to end too. Then those that are the supervisor's
children get SIGTERM. TERMINATE_SECONDS later, all remaining processes get SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from typing import Protocol

from gpu_launcher.processes.linux import children, command_lines, descendants, kill

LINGER_SECONDS = 0.5
"""Seconds that descendants may outlive the main process before SIGTERM. multiprocessing's helpers need some time."""
TERMINATE_SECONDS = 2.0
"""Seconds between SIGTERM and SIGKILL for descendants that outlive LINGER_SECONDS."""

HIDDEN_CHILD_SECONDS = 0.1
"""Seconds between checks for children that cannot be killed because /proc does not show them."""


class SignalSource(Protocol):
    """A source of signals, including SIGCHLD."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when a signal has arrived."""

    def read(self) -> object:
        """Consume the signals that have arrived. Never waits."""


class ProcessTree:
    """A main process and its descendants. The calling process must be a subreaper and have no other children."""

    def __init__(self, main: int, signals: SignalSource, *, note_stops: bool = False) -> None:
        """Manage the tree of `main`, a child. `signals` is readable when a child may have ended.

        With `note_stops`, `stopped` and `stops` say whether and how often the main process was stopped.
        """
        self.main = main
        self._signals = signals
        self._options = os.WNOHANG | (os.WUNTRACED | os.WCONTINUED if note_stops else 0)
        self.status: int | None = None
        """Status of the main process, as `os.waitpid` returns it; None while it lives."""
        self.stopped: int | None = None
        """The signal that stopped the main process; None while it runs."""
        self.stops = 0
        """How often the main process was stopped."""
        self.left_behind: list[str] = []
        """Command lines of processes that outlived the main process and were terminated."""
        self.peak_memory = 0
        """Most bytes that one process of the tree had resident, of those that have ended and been waited for."""
        self._terminated = False
        self._terminate_at: float | None = None
        self._kill_at: float | None = None

    def is_gone(self) -> bool:
        """Return whether no process is left. Ends descendants that outlive the main process too long."""
        if not self.reap():
            return True
        self._end_leftovers()
        return False

    def reap(self) -> bool:
        """Reap dead children. Returns whether any child is left."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, self._options)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self._note(pid, status, usage)

    def kill(self) -> None:
        """Kill all processes with SIGKILL, and wait until they are gone."""
        while self.reap():
            killed = children()
            for pid in killed:
                kill(pid)
            for pid in killed:  # afterwards their own children are ours
                self._note(*os.wait4(pid, 0))
            if not killed:  # /proc does not show the child, for example because of its mount option hidepid
                select.select([self._signals], [], [], HIDDEN_CHILD_SECONDS)
                self._signals.read()

    def until_deadline(self) -> float | None:
        """Milliseconds after which to call `is_gone` even if no signal arrives, for poll(2); None to wait forever."""
        deadline = self._kill_at if self._terminated else self._terminate_at
        if deadline is None:
            return None
        return max(0.0, deadline - time.monotonic()) * 1000 + 1

    def _note(self, pid: int, status: int, usage: resource.struct_rusage) -> None:
        self.peak_memory = max(self.peak_memory, usage.ru_maxrss * 1024)
        if pid != self.main:
            return
        if os.WIFSTOPPED(status):
            self.stopped = os.WSTOPSIG(status)
            self.stops += 1
        elif os.WIFCONTINUED(status):
            self.stopped = None
        else:
            self.stopped = None
            self.status = status

    def _end_leftovers(self) -> None:
        if self.status is None:
            return
        now = time.monotonic()
        if self._terminate_at is None:
            self._terminate_at = now + LINGER_SECONDS
            self._kill_at = now + LINGER_SECONDS + TERMINATE_SECONDS
        assert self._kill_at is not None
        if now >= self._kill_at:
            self.kill()
        elif now >= self._terminate_at and not self._terminated:
            self._terminated = True
            self.left_behind = command_lines(descendants())
            for pid in children():
                with contextlib.suppress(PermissionError):
                    os.kill(pid, signal.SIGTERM)
