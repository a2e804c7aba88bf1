"""What the pool has to say to the user of a function, who has no display."""

from __future__ import annotations

import logging

from gpu_launcher.jobs.remote import Remarked

logger = logging.getLogger("gpu_launcher")

_said: set[str] = set()
"""Notices of this process. They are about the machine or the program, and do not change."""

# What the user has asked for is no news.
_ASKED_FOR = (" simulated: no real GPU is reserved", "(spawn): start_method=spawn")


def log(remark: Remarked) -> None:
    """Log it as a warning, and only once."""
    if remark.text not in _said:
        _said.add(remark.text)
        level = logging.INFO if any(words in remark.text for words in _ASKED_FOR) else logging.WARNING
        logger.log(level, "%s", remark.text)
