"""Reporters of a job's processes: the main process reports to the sweep, the others do not.

Verdicts must be the same in all ranks of a distributed job, or the ranks would wait for each other for ever. So the
first rank decides, and the others follow.
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
"""Seconds for which `should_prune` waits for the verdict on the last report. What comes later counts the next time."""


# From a job.


@dataclass(frozen=True, slots=True)
class Intermediate:
    """A value reported."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class Attribute:
    """A user attribute set."""

    name: str
    text: str
    """Its value as JSON, which means the same in any process."""


# To a job.


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to prune, after what was reported up to this step."""

    step: int
    prune: bool


class Reporter(Protocol):
    """Reports for the trial of a job, and gets verdicts. Safe to use from several threads."""

    def report(self, value: float, step: int) -> None:
        """See `JobTrial`."""

    def should_prune(self) -> bool:
        """See `JobTrial`. Asked only in a study with a pruner."""

    def set_user_attr(self, key: str, value: Any) -> None:
        """See `JobTrial`."""


class NullReporter:
    """Reports nothing: for a process that does not matter to the sweep."""

    def report(self, value: float, step: int) -> None:
        """Do nothing."""

    def should_prune(self) -> bool:
        """Never."""
        return False

    def set_user_attr(self, key: str, value: Any) -> None:
        """Do nothing."""


class MainReporter:
    """Reports for the job's main process, which is the first rank if there are several."""

    def __init__(self, channel: JobChannel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        """Keeps decisions in the order in which they are made."""
        self._reported: int | None = None
        """The step that was reported last."""
        self._judged: int | None = None
        """The step that the latest verdict is about."""
        self._prune = False

    def report(self, value: float, step: int) -> None:
        """One message to the sweep."""
        with self._lock:
            self._reported = step
            self._channel.say(Intermediate(step, value))
            self._listen(0.0)  # or verdicts would pile up in a job that does not ask for them

    def should_prune(self) -> bool:
        """What the sweep said of the last report. Raises OSError if the other ranks cannot be told."""
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
        """One message to the sweep. Raises TypeError or ValueError for what JSON has not."""
        self._channel.say(Attribute(key, json.dumps(value)))


class FollowerReporter(NullReporter):
    """Follows the first rank: for the later ones."""

    def __init__(self, decisions: RankDecisions, *, anew: bool) -> None:
        """`anew` if this process runs the program from its beginning, as Lightning's ranks do."""
        self._decisions = decisions
        self._anew = anew
        self._lock = threading.Lock()
        self._next = decisions.first_index(anew)

    def should_prune(self) -> bool:
        """What the same call of the first rank returned; waits for that."""
        with self._lock:
            prune = self._decisions.wait_for(self._next)
            self._next += 1
            if prune and self._anew:
                _end_as_if_all_were_well()
                self._anew = False
            return prune


class DetachedReporter(NullReporter):
    """Prunes nothing: for a first rank that is not the job's main process, as torchrun starts it.

    The later ranks are told so, for they ask.
    """

    def __init__(self, decisions: RankDecisions) -> None:
        self._decisions = decisions
        self._lock = threading.Lock()
        self._warned = False

    def report(self, value: float, step: int) -> None:
        """Warn the user that the sweep does not hear it."""
        self._warn()

    def should_prune(self) -> bool:
        """Never."""
        self._warn()
        with self._lock:
            self._decisions.append(False)
        return False

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "the sweep does not hear what this process reports, and prunes nothing: it is the first rank of a "
                "distributed job, but not the job's own process. Let that be the first rank, as Lightning's ddp does"
            )


def _end_as_if_all_were_well() -> None:
    """Have this process exit with 0 however it ends: a rank that leaves because the trial is pruned has not failed.

    Lightning kills the first rank as soon as it sees one that exited with something else, which TrialPruned out of the
    program does, and the first rank may not have said yet that it was pruned.
    """

    def leave() -> None:
        atexit.unregister(leave)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        os._exit(0)

    atexit.register(leave)
