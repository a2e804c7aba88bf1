"""Groups jobs that failed in the same way, so that each failure is shown once. Pure."""

from __future__ import annotations

import os
import re
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.jobs.control import ranges_of
from gpu_launcher.wording import device_names, duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Set

    from gpu_launcher.jobs.events import JobEnded

MAX_GROUPS = 1000
"""Maximum number of distinct failures to remember. Later ones are shown in full each time."""
MAX_RANGES = 12
"""Maximum number of ranges of job numbers in one line."""

_VARYING = re.compile(
    r"""0x[0-9a-fA-F]+                                           # addresses of objects
      | \b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b # UUIDs
      | /tmp[a-z0-9_]{8}\b                                       # what tempfile makes
      | \b(?:pid|process)[ =:]*\d+
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(slots=True)
class Group:
    """Jobs that failed in the same way."""

    first: JobEnded
    others: array[int] = field(default_factory=lambda: array("q"))
    """Numbers of the other jobs, in the order in which they ended."""


class Failures:
    """The failed jobs of a sweep, grouped."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], Group] = {}
        self._quoted: set[tuple[str, str]] = set()

    def add(self, ended: JobEnded) -> Group | None:
        """Add a failed job. Returns the group of jobs that failed in the same way before, or None."""
        key = (what_failed(ended), ended.origin)
        group = self.groups.get(key)
        if group is not None:
            group.others.append(ended.number)
        elif len(self.groups) < MAX_GROUPS:
            self.groups[key] = Group(ended)
        return group

    def restore(self, first: JobEnded, others: array[int]) -> None:
        """Take over a group of failed jobs whose first failure was shown elsewhere."""
        self.groups[what_failed(first), first.origin] = Group(first, others)
        self.tells_more(first)

    def discard(self, numbers: Set[int]) -> None:
        """Remove jobs that run again."""
        for key, group in list(self.groups.items()):
            group.others = array("q", (number for number in group.others if number not in numbers))
            if group.first.number not in numbers:
                continue
            if group.others:  # only the number of that job is kept
                group.first = replace(group.first, number=group.others.pop(0), label="", duration=None, log=None)
            else:
                del self.groups[key]

    def tells_more(self, ended: JobEnded) -> bool:
        """Whether the end of the job's log is worth showing: the job failed at a new place or with a new error.

        The failure counts as known from now on.
        """
        place = _place(ended)
        new = place not in self._quoted
        if len(self._quoted) < MAX_GROUPS:
            self._quoted.add(place)
        return new

    def in_one_place(self) -> bool:
        """Whether all jobs failed at the same line with the same kind of error, even if their messages differ."""
        return len({_place(group.first) for group in self.groups.values()}) == 1


def _place(ended: JobEnded) -> tuple[str, str]:
    what = what_failed(ended)
    return (what.partition(":")[0] if ended.origin else what, ended.origin)


def what_failed(ended: JobEnded) -> str:
    """Return the message of a failure without the parts that differ between jobs, such as the job's number."""
    said = ended.message or ""
    if ended.duration is not None:
        said = said.replace(f" after {duration(ended.duration)}", "")
    if ended.devices:
        said = said.replace(f" on {device_names(ended.devices)}", "")
    if ended.log:
        directory = str(Path(ended.log).parent)
        for path in (ended.log, directory, os.path.relpath(directory)):
            if len(path) > 2:  # `.` and `..` may occur in any text
                said = said.replace(path, "<output>")
    said = re.sub(rf"(\bjob |#){ended.number}\b", r"\1N", said)
    return _VARYING.sub("<...>", said)


def ranges(numbers: Iterable[int]) -> str:
    """Format numbers in order, with consecutive ones as ranges: `0-3, 7`."""
    runs = ranges_of(numbers)
    texts = []
    for first, last in runs[:MAX_RANGES]:
        joint = "-" if last - first > 1 else ", "
        texts.append(str(first) if first == last else f"{first}{joint}{last}")
    return ", ".join(texts) + (", ..." if len(runs) > MAX_RANGES else "")
