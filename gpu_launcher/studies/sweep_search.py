"""The search of a Hydra sweep, as the source of its jobs. See `gpu_launcher.jobs.source.JobSource`.

Theory of operation. Sampling takes up to seconds, and must neither stop the display nor make the jobs wait, so that a
thread of the program works for the search, and it alone uses the study. The program's main thread hands it what
happens to jobs, and gets statements from it: trials to run, verdicts, lines for the user. Reports are stored and judged
first, then comes what else happened, and then one trial is sampled, if one is wanted.

When the user stops the sweep while a trial is sampled, nobody waits for that: another thread takes over, which tells
what ran. The one that samples may not use the study any more, and finds that out when it next wants to. An operation
on the database that has begun is waited for.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from optuna.exceptions import StorageInternalError

from gpu_launcher.errors import GpuLauncherError, StudyError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.model import Device
from gpu_launcher.studies.rank_reporters import Attribute, Intermediate, Verdict
from gpu_launcher.studies.stopping import SearchEnded
from gpu_launcher.studies.storage_retry import StorageRetry
from gpu_launcher.studies.study_session import (
    LOOK_SECONDS,
    AskedTrial,
    SearchSummary,
    StudySession,
    TrialEnding,
    UnusablePoint,
)
from gpu_launcher.studies.trial import TrialSeen


class SamplingInterrupted(BaseException):
    """Raised in a thread that may not use the study any more. Samplers that handle errors let it pass."""


class SweepSearch:
    """See the module. The session must not be used by others from now on."""

    def __init__(
        self,
        session: StudySession,
        make_job: Callable[[AskedTrial], Job],
        ending: Callable[[JobResult], TrialEnding],
        finish: Callable[[StudySession, SearchSummary], list[str]],
        *,
        kill_pruned: bool = False,
    ) -> None:
        """`make_job` makes a trial a job, `ending` says what to tell of a job that ended.

        `finish` is called in the end, and returns lines for the user. With `kill_pruned` a trial that is to be pruned
        is ended, whether it asks or not.
        """
        self._session = session
        self._make_job = make_job
        self._ending = ending
        self._finish = finish
        self._kill_pruned = kill_pruned
        self.failed: str | None = None
        """Why the search ended as a failure, if it did."""
        self._news = threading.Condition()
        """Guards what the threads hand each other."""
        self._reports: dict[int, dict[int, float]] = {}
        self._happened: list[Callable[[], None]] = []
        self._wanted = 0
        self._closing = False
        self._said: list[s.Statement] = []
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._error: GpuLauncherError | None = None
        self._result: tuple[SearchSummary, list[str]] | None = None
        self._using = threading.RLock()
        """Held while the study is used; guards which thread works."""
        self._sampling = False
        self._hurried = False
        """Nothing is to be sampled any more."""
        self._cancelled: set[int] = set()
        self._facts: tuple[tuple[str, str], ...] = ()
        self._next_look = 0.0
        self._warm = False
        """Whether what later samples need has been imported."""
        session.storage.uninterrupted = self._use
        session.storage.retry = StorageRetry(lambda text: self._say(s.Remark(text)))
        self._worker: threading.Thread | None = self._new_worker()
        self._worker.start()

    # In the main thread.

    def fileno(self) -> int:
        """See `JobSource`."""
        return self._wakeup

    def receive(self) -> list[s.Statement]:
        """See `JobSource`."""
        with self._news:
            os.eventfd_read(self._wakeup)
            said, self._said = self._said, []
            if self._error is not None:
                os.eventfd_write(self._wakeup, 1)
                if not said:
                    raise self._error
        return said

    def request_jobs(self, count: int) -> None:
        """See `JobSource`."""
        with self._news:
            self._wanted += count
            self._news.notify()

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """See `JobSource`."""
        directory = None if log is None else os.path.dirname(log)  # noqa: PTH120
        labels = [device.label for device in devices]
        self._happens(lambda: self._session.started(job.number, labels, directory, log))

    def on_message(self, number: int, what: Any) -> None:
        """See `JobSource`."""
        match what:
            case Intermediate(step, value):
                with self._news:
                    self._reports.setdefault(number, {})[step] = value
                    self._news.notify()
            case Attribute(name, text):
                self._happens(lambda: self._session.annotate(number, name, json.loads(text)))

    def ended(self, result: JobResult) -> None:
        """See `JobSource`."""
        ending = self._ending(result)
        self._happens(lambda: self._tell(result.number, ending))

    def tick(self) -> None:
        """See `JobSource`."""

    def close(self, patience: float | None = None) -> tuple[SearchSummary, list[str]]:
        """Have everything told that has not been, and return what came of it, with lines for the user.

        With `patience`, in seconds, a trial that is being sampled is given up, and StudyError raised after that time;
        None waits for as long as it takes.
        """
        until = None if patience is None else time.monotonic() + patience
        with self._news:
            self._closing = True
            self._news.notify()
        if patience is not None and self._using.acquire(timeout=patience):
            try:
                self._hurried = True
                if self._sampling:
                    self._sampling = False
                    self._worker = self._new_worker()
                    self._worker.start()
            finally:
                self._using.release()
        worker = self._worker
        assert worker is not None
        worker.join(None if until is None else max(0.0, until - time.monotonic()))
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise StudyError(
                f"the search did not end in {patience:.0f} s, and is left alone; the next sweep on the study fails the "
                "trials that ran"
            )
        os.close(self._wakeup)
        return self._result

    def abandon(self) -> None:
        """Use the study no more; the next sweep on it fails the trials that run."""
        self._worker = None

    def _happens(self, what: Callable[[], None]) -> None:
        with self._news:
            self._happened.append(what)
            self._news.notify()

    # In the thread that works.

    def _new_worker(self) -> threading.Thread:
        return threading.Thread(target=self._work, name="gpu-launcher search", daemon=True)

    @property
    def _is_mine(self) -> bool:
        """Whether the study is the calling thread's to use."""
        return threading.current_thread() is self._worker

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Use the study. Raises SamplingInterrupted if another thread has taken over."""
        with self._using:
            if not self._is_mine:
                raise SamplingInterrupted
            yield

    def _say(self, statement: s.Statement) -> None:
        with self._news:
            self._said.append(statement)
            os.eventfd_write(self._wakeup, 1)

    def _work(self) -> None:
        try:
            while self._turn():
                pass
            self._session.close()
            summary = self._session.summary()
            self._result = (summary, self._report(summary))
        except SamplingInterrupted:
            return
        except BaseException as error:  # of a sampler, a storage, or the user's search space: anything
            if self._is_mine:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        failed = error if isinstance(error, GpuLauncherError) else None
        if failed is None:
            traceback.print_exc()
            failed = StudyError(f"the search ended: {type(error).__name__}: {error}")
        if not isinstance(error, StorageInternalError):  # which was retried for as long as anything is
            try:
                self._session.close()
            except Exception:  # of the storage; what cannot be told now is failed by the next sweep
                traceback.print_exc()
        with self._news:
            self._error = failed
            os.eventfd_write(self._wakeup, 1)

    def _report(self, summary: SearchSummary) -> list[str]:
        """The search has succeeded, whatever becomes of the words about it."""
        try:
            return self._finish(self._session, summary)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return [f"the report on the study could not be made: {type(error).__name__}: {error}"]

    def _turn(self) -> bool:
        """Do what there is to do, or wait for it. False in the end."""
        with self._news:
            if not (self._reports or self._happened or self._wanted or self._closing):
                self._news.wait(LOOK_SECONDS)
            reports, self._reports = self._reports, {}
            happened, self._happened = self._happened, []
            wanted, closing = self._wanted, self._closing
        if reports:
            self._judge(reports)
        for happens in happened:
            happens()
        if closing:
            return False
        if wanted:
            self._ask()
        elif not self._warm and self._session.running:
            # While nobody waits for a trial.
            self._warm = True
            self._session.warm_up()
        if (now := self._session.clock()) >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            for number in set(self._session.ended_elsewhere()) - self._cancelled:
                self._cancelled.add(number)
                self._say(s.Withdrawn(number, "was ended because its trial was ended elsewhere"))
        return True

    def _judge(self, reports: dict[int, dict[int, float]]) -> None:
        """Store what was reported, and answer."""
        ended = self._session.report(reports)
        for number, verdict in self._session.judge(reports.keys() - ended).items():
            if isinstance(verdict, Exception):
                raise verdict
            self._say(s.Reply(number, Verdict(max(reports[number]), verdict)))
            if verdict and self._kill_pruned:
                self._say(s.Withdrawn(number, "was ended because it was to be pruned", pruned=True))

    def _tell(self, number: int, ending: TrialEnding) -> None:
        self._session.tell(number, ending)
        if ending.remarkable:
            self._say(s.Remark(f"trial {number} failed: it {ending.message}"))
        if (facts := self._session.facts()) != self._facts:
            self._facts = facts
            self._say(s.Facts(facts))

    def _ask(self) -> None:
        with self._using:
            if self._hurried:
                return
            self._sampling = True
        try:
            answer = self._session.ask()
        finally:
            with self._use():
                self._sampling = False
        match answer:
            case UnusablePoint(message):
                self._say(s.Remark(message))
                return  # and ask again, after what has come meanwhile
            case AskedTrial():
                self._say(s.Offer(self._make_job(answer)))
                with self._news:
                    self._wanted -= 1
            case SearchEnded(reason, failed):
                if failed:
                    self.failed = reason
                self._say(s.Exhausted(reason))
                with self._news:
                    self._wanted = 0


def seen(asked: AskedTrial) -> TrialSeen:
    """What a trial's job is told of it."""
    trial = asked.trial
    return TrialSeen(
        number=trial.number,
        study=asked.study,
        params=dict(trial.params),
        distributions=dict(trial.distributions),
        user_attrs=dict(trial.user_attrs),
        datetime_start=trial.datetime_start,
        prunes=asked.prunes,
        objectives=len(asked.directions),
    )
