"""The engine of a search: it passes what happens to jobs on to the study, and the study's verdicts to jobs.

Theory of operation. One thread works on the study, in turns. Events arrive between turns, or from other threads. In
each turn the engine first stores the reports of all jobs in one transaction, because they were sent before what follows
them. Then it judges all trials that wait for a verdict from one reading of the study, because jobs wait for it. Then it
handles all other events, in order. Every few seconds it looks for trials that were ended elsewhere, and cancels them.

There are two searches. `sweep_search.SweepSearch` knows the parameters of a trial before there is a job, and works in a
thread of its own. `search_loop.SearchLoop` asks for a trial when a job has its devices, and works in the thread that
called `optimize`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from gpu_launcher.jobs import source as s
from gpu_launcher.studies.optimize_messages import ShallPrune
from gpu_launcher.studies.rank_reporters import Intermediate
from gpu_launcher.studies.study_session import LOOK_SECONDS, StudySession


class SearchEngine(ABC):
    """What both searches have in common; see the module."""

    _judges_reports: bool
    """Whether every report gets a verdict. If not, jobs ask for it."""

    def __init__(self, session: StudySession, say: Callable[[s.Statement], None]) -> None:
        """`say` tells the node something about a job. Nothing else may use the session from now on."""
        self._session = session
        self._say = say
        self._news = threading.Condition()
        """Guards the fields that threads exchange. It is notified of every event."""
        self._reports: dict[int, dict[int, float]] = {}
        """Reports that have not been stored: `{job: {step: value}}`."""
        self._questions: dict[int, int] = {}
        """Jobs that wait for a verdict, with the step or the number of the call that the verdict answers."""
        self._happened: deque[Callable[[], object]] = deque()
        """Other events that have not been handled."""
        self._wanted = 0
        """Number of jobs that the node still wants."""
        self._trial_of: dict[int, int] = {}
        """Numbers of the trials that have not ended, by job number."""
        self._withdrawn: set[int] = set()
        """Jobs that were told to end."""
        self._next_look = session.clock()

    # Events

    def request_jobs(self, count: int) -> None:
        """See `JobSource`."""
        with self._news:
            self._wanted += count
            self._news.notify()

    def on_message(self, number: int, what: Any) -> None:
        """See `JobSource`."""
        with self._news:
            match what:
                case Intermediate(step, value):
                    self._reports.setdefault(number, {})[step] = value
                    if self._judges_reports:
                        self._questions[number] = step
                case ShallPrune(call):
                    self._questions[number] = call
                case _:
                    self._happened.append(lambda: self._heard(number, what))
            self._news.notify()

    def _happens(self, what: Callable[[], object]) -> None:
        with self._news:
            self._happened.append(what)
            self._news.notify()

    # Turns

    def _turn(self) -> None:
        """Handle the events that have arrived."""
        with self._news:
            reports, self._reports = self._reports, {}
            questions, self._questions = self._questions, {}
            happened = len(self._happened)
        self._store(reports)
        self._judge(questions)
        for _ in range(happened):  # one by one, because an interruption must not lose the others
            self._happened.popleft()()
        if (now := self._session.clock()) >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._withdraw_trials(self._session.ended_elsewhere())

    def _store(self, reports: Mapping[int, Mapping[int, float]]) -> None:
        known = {self._trial_of[job]: steps for job, steps in reports.items() if job in self._trial_of}
        self._withdraw_trials(self._session.report(known))

    def _judge(self, questions: Mapping[int, int]) -> None:
        asking = {job: self._trial_of[job] for job in questions if job in self._trial_of}
        try:
            verdicts = self._session.judge(asking.values())
        except Exception as error:  # from the storage
            verdicts = dict.fromkeys(asking.values(), error)
        for job, number in asking.items():
            self._verdict(job, questions[job], verdicts.get(number, False))

    def _withdraw_trials(self, ended: list[int]) -> None:
        for job in [job for job, number in self._trial_of.items() if number in ended]:
            self._withdraw(job, "was ended because its trial was ended elsewhere")

    def _withdraw(self, job: int, why: str, *, pruned: bool = False) -> None:
        if job not in self._withdrawn:
            self._withdrawn.add(job)
            self._say(s.Withdrawn(job, why, pruned))

    @abstractmethod
    def _heard(self, job: int, what: Any) -> None:
        """Handle a message of a job that is neither a report nor a question for a verdict."""

    @abstractmethod
    def _verdict(self, job: int, about: int, verdict: bool | Exception) -> None:
        """Answer a job whether to prune its trial. An exception is what the pruner or the storage raised."""
