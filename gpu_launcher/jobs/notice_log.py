"""Logging of what a node says, for programs that have no display."""

from __future__ import annotations

import logging
import math
from collections import deque
from time import monotonic

from gpu_launcher.jobs.events import GaveUp, JobWaiting, Notice
from gpu_launcher.jobs.job import JobResult

logger = logging.getLogger("gpu_launcher")

REPEAT_SECONDS = 60.0
"""Minimum seconds between two lines about waits. Thousands of calls may each wait for devices."""

_said: set[str] = set()
"""Notices that this process has logged."""
_told: deque[JobWaiting] = deque(maxlen=64)
"""The waits that were logged most recently."""
_last = -math.inf
"""Monotonic time of the last wait that was logged."""

# Notices about what the user asked for are logged at INFO.
_ASKED_FOR = (" simulated: no real GPU is reserved", "(spawn): start_method=spawn")


def log(text: str) -> None:
    """Log a notice once in this process."""
    if text not in _said:
        _said.add(text)
        level = logging.INFO if any(words in text for words in _ASKED_FOR) else logging.WARNING
        logger.log(level, "%s", text)


def log_left_behind(result: JobResult) -> None:
    """Log which processes a job left behind, if any."""
    if (text := result.left_behind_text) is not None:
        log(text)


def log_event(event: Notice | GaveUp | JobWaiting) -> None:
    """Log an event of a run: a wait for devices once, and at most one per interval."""
    global _last
    if not isinstance(event, JobWaiting):
        log(event.text)
    elif event.reason and event not in _told and (now := monotonic()) - _last >= REPEAT_SECONDS:
        _last = now
        _told.append(event)
        logger.warning("waiting for devices: %s", event.reason)
