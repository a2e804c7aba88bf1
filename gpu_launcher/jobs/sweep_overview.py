"""Describes a sweep as a whole: what runs it, how far it is, and what it has found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_launcher.errors import ManifestError, SteeringError
from gpu_launcher.jobs.launches import launches_in
from gpu_launcher.jobs.manifest import Entry, State, read
from gpu_launcher.safe_files import read_regular

STATUS_SECONDS = 1.0
"""Maximum seconds to wait for the head of a sweep. Without its answer, the description has what the manifest says."""
MAX_RESULTS_BYTES = 2**20
_BEST = re.compile(rb"^best_value: (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class DescribedSweep:
    """One sweep."""

    directory: Path
    state: str
    """`running`, `paused`, `stopping` or `ended`. `elsewhere` if it may run on another machine."""
    jobs: Mapping[State, int]
    """How many of its jobs are in each state. While it runs, those of this run; otherwise all that are known."""
    total: int | None
    """How many jobs it will have, if that is known."""
    facts: Sequence[tuple[str, str]]
    """What a search has found."""
    command: str | None
    pid: int | None
    host: str | None


def describe(directory: Path, entries: Iterable[Entry] | None = None) -> DescribedSweep | None:
    """Describe the sweep in a directory. None if it cannot be read.

    `entries` are its jobs, if the caller has read them.
    """
    try:
        jobs = Counter(entry.state for entry in (read(directory).values() if entries is None else entries))
        launches = [launch for launch in launches_in(directory) if launch.is_alive is not False]
    except (ManifestError, OSError):
        return None
    if not launches:
        facts = [] if (best := _best_of(directory)) is None else [("best", best)]
        return DescribedSweep(directory, "ended", jobs, None, facts, None, None, None)
    launch = launches[-1]
    from gpu_launcher.jobs.steering import Sweep  # `sweeps` starts sooner if no sweep runs

    status: dict[str, Any] = {}
    with suppress(SteeringError):
        status = Sweep(directory).status(seconds=STATUS_SECONDS)
    state = (
        "stopping"
        if status.get("stopping")
        else "paused"
        if status.get("paused")
        else "elsewhere"
        if launch.is_alive is None
        else "running"
    )
    facts = [(name, value) for name, value in status.get("facts", ())]
    if status:
        jobs = _jobs_of(status)
    return DescribedSweep(directory, state, jobs, status.get("total"), facts, launch.command, launch.pid, launch.host)


def _jobs_of(status: Mapping[str, Any]) -> Counter[State]:
    """How many jobs of a run are in each state. The head knows more than the manifest: jobs that were not offered."""
    jobs = Counter({State(outcome): number for outcome, number in status["ended"].items()})
    jobs[State.RUNNING] = status["running"]
    if status["total"] is not None:
        jobs[State.WAITING] = max(0, status["total"] - jobs.total())
    return jobs


def _best_of(directory: Path) -> str | None:
    """The best value of a search that has ended, as its sweeper wrote it."""
    with suppress(OSError):
        if found := _BEST.search(read_regular(directory / "optimization_results.yaml", MAX_RESULTS_BYTES)):
            return found[1].decode(errors="replace")
    return None
