"""Forks processes: flushes output, pauses monitor threads, runs a function in the child, and marks internal forks."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

from gpu_launcher.processes.linux import flush_c_streams, is_thread

MONITOR_JOIN_SECONDS = 1.0
"""Seconds to wait for a tqdm monitor to end. If it waits for a lock that this thread holds, it keeps running."""

_thread = threading.local()


@contextlib.contextmanager
def internal_fork() -> Iterator[None]:
    """Mark forks that this thread makes in this block as internal helpers. They do not inherit the program's leases.

    Forks by the user's code, such as a data loader's workers, do.
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
    """Stop the monitor threads of tqdm's progress bars in this block, because forking with other threads is not safe.

    These threads outlive their progress bars.
    """
    module = sys.modules.get("tqdm._monitor")
    monitors = [] if module is None else [one for one in threading.enumerate() if type(one) is module.TMonitor]
    for monitor in monitors:
        monitor.was_killed.set()  # type: ignore[attr-defined]
        monitor.join(MONITOR_JOIN_SECONDS)
        # Before Python 3.13, `join` may return a moment before the kernel's thread has ended.
        end = time.monotonic() + MONITOR_JOIN_SECONDS
        while not monitor.is_alive() and is_thread(monitor.native_id) and time.monotonic() < end:
            time.sleep(0.001)
    try:
        yield
    finally:
        for monitor in monitors:
            bars = monitor.tqdm_cls  # type: ignore[attr-defined]
            if bars.monitor is monitor and bars.monitor_interval:
                bars.monitor = type(monitor)(bars, bars.monitor_interval)


def fork_child(main: Callable[[], object], *, internal: bool = False) -> int:
    """Fork a process that runs only `main`, and return its process id. Raises OSError if no process can be created.

    The child never returns to the caller's code and does not run exit handlers. It ends with exit code 0 when `main`
    returns. If `main` raises, it prints the traceback and ends with 1. See `internal_fork` for `internal`.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns if the process has other threads. Callers check that where it matters.
        warnings.simplefilter("ignore", DeprecationWarning)
        with internal_fork() if internal else contextlib.nullcontext():
            pid = os.fork()
    if pid > 0:
        return pid
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def flush_all(*, ignore_errors: bool = False) -> None:
    """Flush stdout and stderr of Python and C. Call this before a fork, or each process writes the buffered data.

    Raises OSError unless `ignore_errors`.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with contextlib.suppress(OSError) if ignore_errors else contextlib.nullcontext():
                stream.flush()
    flush_c_streams()
