"""Threads that serve a display and may be stopped for a moment, lest a program that has no others cannot be forked."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

PATIENCE = 1.0
"""Seconds in which one must have ended. It may wait for a lock that this thread has; then it is left alone."""


@contextlib.contextmanager
def helpers_paused() -> Iterator[None]:
    """While entered, the monitors of tqdm's progress bars, of which one is left by every bar, do not run."""
    module = sys.modules.get("tqdm._monitor")
    monitors = [] if module is None else [one for one in threading.enumerate() if type(one) is module.TMonitor]
    for monitor in monitors:
        monitor.was_killed.set()  # type: ignore[attr-defined]
        monitor.join(PATIENCE)
    try:
        yield
    finally:
        for monitor in monitors:
            bars = monitor.tqdm_cls  # type: ignore[attr-defined]
            if bars.monitor is monitor and bars.monitor_interval:
                bars.monitor = type(monitor)(bars, bars.monitor_interval)
