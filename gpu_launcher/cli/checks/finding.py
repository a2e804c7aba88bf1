"""The finding of a check: its level, text and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    OK = "ok"
    WARNING = "warning"
    """Works, but probably not as the user wants."""
    PROBLEM = "problem"
    """Does not work or gives wrong results."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    """The name of the check. It is stable, so programs can rely on it."""
    level: Level
    text: str
    remedy: str | None = None


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, remedy: str | None = None) -> Finding:
    return Finding(check, Level.WARNING, text, remedy)


def problem(check: str, text: str, remedy: str | None = None) -> Finding:
    return Finding(check, Level.PROBLEM, text, remedy)


def halves(message: str) -> tuple[str, str | None]:
    """Split a message of the form `problem: remedy` into problem and remedy."""
    wrong, _, remedy = message.partition(": ")
    return wrong, remedy or None
