"""Reporters for a job's processes. The main process reports to the head, the others do not.

All ranks of a distributed job must get the same verdicts, or the ranks would wait for each other forever. So the first
rank decides, and the others follow it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_launcher.processes.job_channel import JobChannel
from gpu_launcher.processes.rank_decisions import RankDecisions

log = logging.getLogger("gpu_launcher")

VERDICT_SECONDS = 0.05
"""Seconds that `should_prune` waits for the verdict on the last report. A later verdict counts at the next call."""


# From a job.


@dataclass(frozen=True, slots=True)
class Intermediate:
    """An intermediate value that a job reports."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class Attribute:
    """A user attribute that a job sets."""

    name: str
    text: str
    """The value as JSON, which means the same in every process."""


# To a job.


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to prune a trial, judged by its reports up to this step."""

    step: int
    prune: bool


class Reporter(Protocol):
    """Sends reports for a job's trial and receives verdicts. Several threads may use it."""

    def report(self, value: float, step: int) -> None:
        """See `JobTrial`."""

    def should_prune(self) -> bool:
        """See `JobTrial`. Called only if the study has a pruner."""

    def set_user_attr(self, key: str, value: Any) -> None:
        """See `JobTrial`."""


class NullReporter:
    """Ignores all reports. For processes that the sweep does not listen to."""

    def report(self, value: float, step: int) -> None:
        """Do nothing."""

    def should_prune(self) -> bool:
        """Return False."""
        return False

    def set_user_attr(self, key: str, value: Any) -> None:
        """Do nothing."""


class MainReporter:
    """Reports for a job's main process, which is the first rank if there are several."""

    def __init__(self, channel: JobChannel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        """Keeps decisions in the order in which they are made."""
        self._reported: int | None = None
        """The step of the last report."""
        self._judged: int | None = None
        """The step of the latest verdict."""
        self._prune = False

    def report(self, value: float, step: int) -> None:
        """Send one message to the head."""
        with self._lock:
            self._reported = step
            self._channel.say(Intermediate(step, value))
            self._listen(0.0)  # otherwise verdicts would pile up in a job that does not ask for them

    def should_prune(self) -> bool:
        """Return the verdict on the last report. Raises OSError if it cannot be passed on to the other ranks."""
        with self._lock:
            if self._judged != self._reported:
                self._listen(VERDICT_SECONDS)
            self._channel.decisions.append(self._prune)
            return self._prune

    def _listen(self, patience: float) -> None:
        for answer in self._channel.hear(patience):
            if isinstance(answer, Verdict):
                self._judged, self._prune = answer.step, self._prune or answer.prune

    def set_user_attr(self, key: str, value: Any) -> None:
        """Send one message to the head. Raises TypeError or ValueError if JSON cannot represent the value."""
        self._channel.say(Attribute(key, json.dumps(value)))


class FollowerReporter(NullReporter):
    """Follows the decisions of the first rank. For the later ranks."""

    def __init__(self, decisions: RankDecisions, *, anew: bool) -> None:
        """`anew` means that this process runs the program from its beginning, as Lightning's ranks do."""
        self._decisions = decisions
        self._anew = anew
        self._lock = threading.Lock()
        self._next = decisions.first_index(anew)

    def should_prune(self) -> bool:
        """Wait for the same call of the first rank, and return its result."""
        with self._lock:
            prune = self._decisions.wait_for(self._next)
            self._next += 1
            if prune and self._anew:
                _end_as_if_all_were_well()
                self._anew = False
            return prune


class DetachedReporter(NullReporter):
    """Prunes nothing. For a first rank that is not the job's main process, as torchrun starts it.

    It passes each decision on to the later ranks, because they wait for it.
    """

    def __init__(self, decisions: RankDecisions) -> None:
        self._decisions = decisions
        self._lock = threading.Lock()
        self._warned = False

    def report(self, value: float, step: int) -> None:
        """Warn the user that the sweep does not receive this report."""
        self._warn()

    def should_prune(self) -> bool:
        """Return False, and pass that on to the later ranks."""
        self._warn()
        with self._lock:
            self._decisions.append(False)
        return False

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "reports of this process are ignored and its trial is not pruned: this process is the first rank of a "
                "distributed job, but not the job's main process; make the main process the first rank, as "
                "Lightning's ddp does"
            )


def _end_as_if_all_were_well() -> None:
    """Make this process exit with status 0 however it ends, because a rank of a pruned trial has not failed.

    If TrialPruned ends the program, its exit status is not 0. Lightning kills the first rank as soon as another rank
    exits like that, and the first rank may not yet have reported that the trial was pruned.
    """

    def leave() -> None:
        atexit.unregister(leave)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        os._exit(0)

    atexit.register(leave)
