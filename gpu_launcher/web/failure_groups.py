"""Groups the failed jobs of a sweep by how they failed. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpu_launcher.jobs.events import JobEnded, Outcome
from gpu_launcher.jobs.manifest import Entry, State
from gpu_launcher.jobs.progress.alike import ranges, what_failed
from gpu_launcher.wording import join_labels


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Jobs that failed in the same way."""

    message: str
    """What the first of them said."""
    numbers: tuple[int, ...]

    @property
    def jobs(self) -> str:
        return ranges(self.numbers)


def failure_groups(entries: Iterable[Entry]) -> list[FailureGroup]:
    """Group failed and lost jobs, the largest group first."""
    groups: dict[tuple[State, str], list[Entry]] = {}
    for entry in entries:
        if entry.state in (State.FAILED, State.LOST):
            groups.setdefault((entry.state, _alike(entry)), []).append(entry)
    found = [
        FailureGroup(jobs[0].message or state.value, tuple(job.number for job in jobs))
        for (state, _), jobs in groups.items()
    ]
    return sorted(found, key=lambda group: -len(group.numbers))


def _alike(entry: Entry) -> str:
    """The message of a failed job without what differs between jobs."""
    message = entry.message or ""
    if entry.devices:
        message = message.replace(f" on {join_labels(entry.devices)}", "")
    ended = JobEnded(0.0, entry.number, entry.label, (), Outcome.FAILED, entry.seconds, message, entry.log)
    return what_failed(ended)
