"""Helpers that wait for other processes and threads."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def until(condition: Callable[[], T], what: str = "it did not happen", seconds: float = 400.0) -> T:
    """Wait until the condition is true and return its value. After `seconds`, fail with the message `what`."""
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if value := condition():
            return value
        now = time.monotonic()
        assert now < deadline, what
        time.sleep(min(0.1, max(0.005, 4 * (now - began))))  # a condition may read all of /proc


def alive(process: psutil.Process | int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
