"""Telling our own forks from the user's: a fork server does not use what its program holds, a worker may."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_thread = threading.local()


@contextlib.contextmanager
def own_fork() -> Iterator[None]:
    """Fork in it what serves the program and is no part of it, and so is not to keep the leases that it holds."""
    _thread.own = True
    try:
        yield
    finally:
        _thread.own = False


def is_own_fork() -> bool:
    """Whether this thread is in `own_fork`."""
    return bool(getattr(_thread, "own", False))
