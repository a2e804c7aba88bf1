"""Cutting a long sample short, because the sweep was stopped: what ran meanwhile is to be told, and the user waits.

A signal does it, for a sampler does not look at anything else. It never cuts what is being done to the database.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNAL = signal.SIGTERM


class SamplingInterrupted(BaseException):
    """No error: samplers and search spaces that handle those let it pass."""


class Interruption:
    """Of one process, which is sent SIGNAL. Used in its main thread."""

    def __init__(self) -> None:
        self._wanted = False
        self._sampling = False
        self._storing = 0

    def listen(self) -> None:
        """Heed the signal from now on."""
        signal.signal(SIGNAL, lambda signum, frame: self._arrived())

    def forget(self) -> None:
        """Whoever sent a signal before this has said why, and will be heard."""
        self._wanted = False

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Raises SamplingInterrupted, here or within, if the signal arrives or has arrived."""
        self._sampling = True
        try:
            self._cut()
            yield
        finally:
            self._sampling = False

    @contextmanager
    def storing(self) -> Iterator[None]:
        """While entered, nothing is cut: what is done to the database is done to its end."""
        self._storing += 1
        try:
            yield
        finally:
            self._storing -= 1
            self._cut()

    def _arrived(self) -> None:
        self._wanted = True
        self._cut()

    def _cut(self) -> None:
        if self._wanted and self._sampling and not self._storing:
            self._wanted = self._sampling = False  # what is done about it is not cut again
            raise SamplingInterrupted
