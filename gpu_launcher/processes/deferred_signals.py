"""Code that no exception out of a signal's handler may cut in two."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
"""Those whose handlers are known to raise: Ctrl-C, programs that exit in order, time limits."""


class Deferred:
    """Signals that have arrived and whose handlers were not called yet."""

    def __init__(self) -> None:
        self.handlers: dict[signal.Signals, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take the place of their handlers."""
        self._arrived.append((number, frame))

    def forget(self) -> None:
        """In a forked process: they were its parent's."""
        self._arrived.clear()

    def handle(self) -> None:
        """Call the handlers now, which may raise."""
        while self._arrived:
            number, frame = self._arrived.pop(0)
            self.handlers[signal.Signals(number)](number, frame)


@contextlib.contextmanager
def uninterrupted() -> Iterator[Deferred]:
    """Call Python's handlers of signals that arrive meanwhile at the end.

    For milliseconds only. Python runs handlers in the main thread, so elsewhere there is nothing to put off. Blocking
    the signals would not do: another thread would take them, and the handlers would run here all the same.
    """
    deferred = Deferred()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return
    try:
        for signum in _SIGNALS:
            handler = signal.getsignal(signum)
            if callable(handler):
                deferred.handlers[signum] = handler
                signal.signal(signum, deferred.note)
        yield deferred
    finally:
        _restore(deferred.handlers)
        deferred.handle()


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    """Every one of them, though those that are back already may raise before the others are."""
    raised: BaseException | None = None
    while True:
        try:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            break
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised
