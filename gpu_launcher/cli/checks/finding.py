"""What an examination comes to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    OK = "ok"
    WARNING = "warning"
    """Works, and probably not as somebody wants."""
    PROBLEM = "problem"
    """Does not work, or gives wrong results."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    """What was looked at, in a word; programs can rely on it."""
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
    """A message of ours as what is wrong and what to do: they are written `problem: remedy`."""
    wrong, _, remedy = message.partition(": ")
    return wrong, remedy or None
