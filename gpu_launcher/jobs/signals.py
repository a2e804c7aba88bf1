"""SIGINT, SIGTERM and SIGHUP during a sweep, delivered to the loop through a descriptor."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

TOGETHER = 0.3
"""Seconds within which signals count as one: programs that run others often pass on a Ctrl-C which those got, too."""


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP do nothing but make `fileno()` readable.

    One that the program ignores stays ignored, as SIGINT is in what a script starts with `&`, and SIGHUP under
    nohup(1). Outside the main thread, where Python allows no signal handlers, it changes nothing, and signals keep
    their effect on the program.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create the descriptor. `clock` tells the time in seconds."""
        self._clock = clock
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self.last: signal.Signals | None = None
        """The signal that counted last."""
        self._counted = -math.inf
        """When that was."""

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heeded = [signum for signum in _SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
            self._before = {signum: signal.signal(signum, self._note) for signum in heeded}
        if self._before:
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        for signum, handler in self._before.items():
            # None: the handler was not set from Python and cannot be restored from it
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self.close()

    def fileno(self) -> int:
        """Readable when a signal has arrived."""
        return self._read

    def take(self) -> int:
        """How many of them count that arrived since the last call. Others that Python handles wake the loop, too.

        SIGHUP counts only as the first: that a terminal is gone may be said several times, by the kernel, by a shell
        and by who manages the session, and is nobody's impatience.
        """
        arrived = [number for number in os.read(self._read, 4096) if number in _SIGNALS]
        now = self._clock()
        if self.last is not None:
            arrived = [number for number in arrived if number != signal.SIGHUP]
        if not arrived or now - self._counted < TOGETHER:
            return 0
        self._counted = now
        self.last = signal.Signals(arrived[0])
        return 1

    def close(self) -> None:
        """Close the descriptors, also in a forked child."""
        os.close(self._read)
        os.close(self._write)

    def _note(self, signum: int, frame: object) -> None:
        """The wakeup descriptor tells the loop."""
