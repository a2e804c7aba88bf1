"""What the manager of jobs remarks, for a program that shows no sweep: its log."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("gpu_launcher")

_said: set[str] = set()


def remark(text: str, *, expected: bool = False) -> None:
    """Log it, once for the program: as a warning unless the user is likely to have expected it."""
    if text not in _said:
        _said.add(text)
        LOGGER.log(logging.INFO if expected or _about_simulated(text) else logging.WARNING, "%s", text)


def _about_simulated(text: str) -> bool:
    return "simulated: no real GPU is reserved" in text
