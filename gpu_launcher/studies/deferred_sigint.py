"""Defers Ctrl-C while `optimize` works, and handles it while `optimize` waits.

A KeyboardInterrupt in the middle of a transaction would leave the database locked, even for this process.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

MAX_DEFERRED_SECONDS = 10.0
"""Seconds for which SIGINT is deferred at most.

An operation that takes longer may never end, for example if a driver does not release a process."""


class DeferredSigint:
    """Context in which SIGINT is deferred, except within `allowed`.

    It has no effect outside the main thread, because Python runs signal handlers only there.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._held_since: float | None = None
        self._waiting = 0
        """Number of signals that arrived while they were deferred."""

    def __enter__(self) -> DeferredSigint:
        self._held_since = time.monotonic()
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handler is None:
            return
        if signal.getsignal(signal.SIGINT) == self._arrived:  # false if a callback has set another one
            signal.signal(signal.SIGINT, self._handler)
        if self._waiting and not isinstance(error, KeyboardInterrupt):
            self._handler(signal.SIGINT, None)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Context in which SIGINT calls its handler, starting with a deferred one."""
        try:
            self._held_since = None
            if self._waiting:
                self._waiting -= 1
                self._arrived(signal.SIGINT, None)
            yield
        finally:
            self._held_since = time.monotonic()

    def _arrived(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._held_since is not None and now - self._held_since < MAX_DEFERRED_SECONDS:
            self._waiting += 1
            return
        before, self._held_since = self._held_since, now
        self._handler(signum, frame)
        self._held_since = before  # the handler did not raise
