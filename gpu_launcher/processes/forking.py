"""Forking a process safely: what holds a fork up, and which forks are ours."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

MONITOR_JOIN_SECONDS = 1.0
"""Seconds to wait for a tqdm monitor to end. It may wait for a lock that this thread holds; then it keeps running."""

_thread = threading.local()


@contextlib.contextmanager
def internal_fork() -> Iterator[None]:
    """Mark forks that this thread makes in the block as internal processes: they do not inherit the program's leases.

    A fork of the user's, such as a data loader's worker, does.
    """
    _thread.internal = True
    try:
        yield
    finally:
        _thread.internal = False


def in_internal_fork() -> bool:
    """Whether this thread is in an `internal_fork` block."""
    return bool(getattr(_thread, "internal", False))


@contextlib.contextmanager
def tqdm_monitors_paused() -> Iterator[None]:
    """Stop the monitor threads of tqdm's progress bars in the block, because a program with threads cannot be forked.

    Every bar leaves one behind.
    """
    module = sys.modules.get("tqdm._monitor")
    monitors = [] if module is None else [one for one in threading.enumerate() if type(one) is module.TMonitor]
    for monitor in monitors:
        monitor.was_killed.set()  # type: ignore[attr-defined]
        monitor.join(MONITOR_JOIN_SECONDS)
    try:
        yield
    finally:
        for monitor in monitors:
            bars = monitor.tqdm_cls  # type: ignore[attr-defined]
            if bars.monitor is monitor and bars.monitor_interval:
                bars.monitor = type(monitor)(bars, bars.monitor_interval)
