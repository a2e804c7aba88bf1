"""What both searches do in each turn: pass what happens to jobs on to the study, and the study's verdicts to jobs.

Theory of operation. One thread works on the study, in turns. Each turn stores the reports of all jobs in one
transaction, then handles the other events in the order in which they arrived, and then judges the trials that wait for
a verdict from one reading of the study. In this order pruners see what ended before they were asked. Every few seconds
the engine looks for trials that were ended elsewhere, for example from a dashboard, and cancels their jobs.

There are two searches. `sweep_search.SweepSearch` knows the parameters of a trial before there is a job, and works in a
thread of its own. `search_loop.SearchLoop` asks for a trial when a job has its devices, and works in the thread that
called `optimize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.node_messages import Heard
from gpu_launcher.studies.optimize_messages import ShouldPrune
from gpu_launcher.studies.rank_reporters import Intermediate
from gpu_launcher.studies.study_session import CHECK_SECONDS, StudySession
from gpu_launcher.studies.trial import TrialInfo


class SearchEngine(ABC):
    """The turns of a search; see the module."""

    def __init__(self, session: StudySession) -> None:
        """Nothing else may use the session from now on."""
        self._session = session
        self._trials: dict[int, TrialInfo] = {}
        """The trials that have not ended, by job number."""
        self._cancelled: set[int] = set()
        """Jobs that were told to end."""
        self._next_check = session.clock() + CHECK_SECONDS

    def _turn(self, events: deque[Any]) -> None:
        """Handle all events. Each is removed when it is handled, so that an interruption does not lose the others."""
        self._store(events)
        questions: dict[int, int] = {}
        while events:
            match events.popleft():
                case Heard(_, Intermediate()):
                    pass  # it is stored
                case Heard(job, ShouldPrune(call)):
                    questions[job] = call
                case event:
                    self._handle(event)
        self._judge(questions)
        if (now := self._session.clock()) >= self._next_check:
            self._next_check = now + CHECK_SECONDS
            self._check_trials()

    def _store(self, events: Iterable[Any]) -> None:
        reports: dict[int, dict[int, float]] = {}
        for event in events:
            match event:
                case Heard(job, Intermediate(step, value)) if job in self._trials:
                    reports.setdefault(self._trials[job].number, {})[step] = value
        self._cancel_trials(self._session.report(reports))

    def _judge(self, questions: Mapping[int, int]) -> None:
        """Answer all trials that ask. Those that are cancelled are not judged: a pruner may fail on an ended trial."""
        asking = {job: self._trials[job].number for job in questions if job in self._trials}
        judged = [number for job, number in asking.items() if job not in self._cancelled]
        verdicts: Mapping[int, bool | Exception]
        try:
            verdicts = self._session.judge(judged)
        except Exception as error:  # from the storage
            verdicts = dict.fromkeys(judged, error)
        for job, number in asking.items():
            self._answer(job, questions[job], verdicts.get(number, False))

    def _check_trials(self) -> None:
        self._cancel_trials(self._session.ended_elsewhere())

    def _cancel_trials(self, ended: list[int]) -> None:
        """End the jobs of trials that were ended elsewhere."""
        for job in [job for job, trial in self._trials.items() if trial.number in ended]:
            self._cancel(job, "was ended because its trial was ended elsewhere")

    def _cancel(self, job: int, why: str) -> None:
        if job not in self._cancelled:
            self._cancelled.add(job)
            self._say(s.Cancel(job, why))

    @abstractmethod
    def _say(self, statement: s.Statement) -> None:
        """Tell the node something about a job."""

    @abstractmethod
    def _handle(self, event: Any) -> None:
        """Handle an event that is neither a report nor a question for a verdict."""

    @abstractmethod
    def _answer(self, job: int, question: int, verdict: bool | Exception) -> None:
        """Answer a job whether to prune its trial.

        `question` is the step of the report or the number of the call. An exception is what the pruner or the storage
        raised.
        """
