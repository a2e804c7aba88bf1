"""Wait for what other processes and threads do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def until(condition: Callable[[], T], what: str = "it did not happen", seconds: float = 60.0) -> T:
    """Wait until the condition holds, and return what it returned; after `seconds`, fail and say `what` is wrong."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return value


def alive(process: psutil.Process | int) -> bool:
    """Whether this process exists and has not ended. A zombie has."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
