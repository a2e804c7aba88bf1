"""Logging of notices from the pool, for programs that have no display."""

from __future__ import annotations

import logging
import math
import time
from collections import deque

from gpu_launcher.jobs.node_messages import Remarked

logger = logging.getLogger("gpu_launcher")

REPEAT_SECONDS = 60.0
"""Minimum seconds between two passing lines. Thousands of calls may each wait for devices."""

_said: set[str] = set()
"""Notices that this process has logged."""
_told: deque[str] = deque(maxlen=64)
"""The `about` of the passing lines that were logged most recently."""
_last = -math.inf
"""Monotonic time of the last passing line that was logged."""

# Notices about what the user asked for are logged at INFO.
_ASKED_FOR = (" simulated: no real GPU is reserved", "(spawn): start_method=spawn")


def log(remark: Remarked) -> None:
    """Log a notice once, and a passing line at most once per interval and state."""
    global _last
    if remark.passing:
        now = time.monotonic()
        if now - _last >= REPEAT_SECONDS and remark.about not in _told:
            _last = now
            if remark.about:
                _told.append(remark.about)
            logger.warning("%s", remark.text)
    elif remark.text not in _said:
        _said.add(remark.text)
        level = logging.INFO if any(words in remark.text for words in _ASKED_FOR) else logging.WARNING
        logger.log(level, "%s", remark.text)
