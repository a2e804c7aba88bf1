"""What the pool has to say to programs that have no display: it is logged."""

from __future__ import annotations

import logging
import math
import time
from collections import deque

from gpu_launcher.jobs.node_messages import Remarked

logger = logging.getLogger("gpu_launcher")

EVERY = 60.0
"""Seconds between two remarks about how things are at the moment. Each of thousands of calls may wait for somebody."""

_said: set[str] = set()
"""What this process has said."""
_told: deque[str] = deque(maxlen=64)
"""What the latest that passed were about."""
_last = -math.inf
"""When it last said something that passes."""

# What the user has asked for is no news.
_ASKED_FOR = (" simulated: no real GPU is reserved", "(spawn): start_method=spawn")


def log(remark: Remarked) -> None:
    """Log it as a warning: a notice once, what passes from time to time, and once for all that it is repeated."""
    global _last
    if remark.passing:
        now = time.monotonic()
        if now - _last >= EVERY and remark.about not in _told:
            _last = now
            if remark.about:
                _told.append(remark.about)
            logger.warning("%s", remark.text)
    elif remark.text not in _said:
        _said.add(remark.text)
        level = logging.INFO if any(words in remark.text for words in _ASKED_FOR) else logging.WARNING
        logger.log(level, "%s", remark.text)
