"""A reading that is shared: pages ask every second or two, each tab for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

FRESH_SECONDS = 0.9
"""Seconds for which a reading is used."""


class Fresh(Generic[T]):
    """What a function returned at most FRESH_SECONDS ago. One thread calls it, and those that ask meanwhile wait."""

    def __init__(self, read: Callable[[], T], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._latest: tuple[float, T] | None = None

    def __call__(self) -> T:
        """Raises what the function raises."""
        with self._lock:
            if self._latest is None or self._clock() - self._latest[0] > FRESH_SECONDS:
                found = self._read()
                self._latest = self._clock(), found  # the time after it: those that waited do not read again
            return self._latest[1]
