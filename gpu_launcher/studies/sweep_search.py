"""The search of a Hydra sweep, as the source of its jobs. See `gpu_launcher.jobs.source.JobSource`.

Theory of operation. Sampling can take seconds, and must neither stop the display nor make jobs wait. So one thread of
the head, the worker, does the search's work, and only the worker uses the study. The head's main thread tells the
worker what happens to jobs, and receives statements from it: trials to run, verdicts, lines for the user. In each turn
the worker handles all events (`search_engine.py`), and then samples one trial if one is wanted.

If the user stops the sweep while the worker samples a trial, the sweep does not wait for the sampler. A new worker
takes over and tells the study about the running trials. The old worker must not use the study any more: its next
attempt raises SamplingInterrupted. A database operation that has already begun is waited for.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from optuna.exceptions import StorageInternalError

from gpu_launcher.errors import GpuLauncherError, StudyError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.node_messages import Heard
from gpu_launcher.model import Device
from gpu_launcher.studies.optimize_messages import ShouldPrune
from gpu_launcher.studies.rank_reporters import Attribute, Intermediate, Verdict
from gpu_launcher.studies.search_engine import SearchEngine
from gpu_launcher.studies.stopping import SearchEnded
from gpu_launcher.studies.storage_retry import StorageRetry
from gpu_launcher.studies.study_session import (
    CHECK_SECONDS,
    AskedTrial,
    SearchSummary,
    StudySession,
    TrialEnding,
    UnusablePoint,
)


class SamplingInterrupted(BaseException):
    """Another worker has taken over, so this thread must not use the study any more.

    It is a BaseException, so samplers that handle errors let it pass.
    """


class SweepSearch(SearchEngine):
    """Runs the search of one sweep in a worker thread; see the module."""

    def __init__(
        self,
        session: StudySession,
        make_job: Callable[[AskedTrial], Job],
        ending: Callable[[JobResult], TrialEnding],
        finish: Callable[[StudySession, SearchSummary], list[str]],
        *,
        kill_pruned: bool = False,
    ) -> None:
        """Start the worker.

        `make_job` turns a trial into a job. `ending` says how a trial ended, from the result of its job. `finish` is
        called at the end and returns lines for the user. With `kill_pruned`, a trial that is to be pruned is ended even
        if it does not ask.
        """
        super().__init__(session)
        self._make_job = make_job
        self._ending = ending
        self._finish = finish
        self._kill_pruned = kill_pruned
        self.failed: str | None = None
        """Why the search failed, if it did."""
        self._changed = threading.Condition()
        """Guards the fields that the main thread and the worker exchange: `_events` to `_error`."""
        self._events: deque[Heard | Callable[[], None]] = deque()
        self._wanted = 0
        self._closing = False
        self._statements: list[s.Statement] = []
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._error: GpuLauncherError | None = None
        self._result: tuple[SearchSummary, list[str]] | None = None
        self._using = threading.RLock()
        """Held by the worker during each operation on the study. `close` holds it to replace the worker.

        So a worker is never replaced in the middle of an operation. It also guards `_sampling` and `_hurried`.
        """
        self._sampling = False
        """Whether the worker is sampling a trial. `close` replaces the worker only if it is."""
        self._hurried = False
        """Whether `close` has a time limit. If so, no further trial is sampled."""
        self._facts: tuple[tuple[str, str], ...] = ()
        self._warm = False
        """Whether the imports that the sampler needs later have been started or done."""
        session.storage.uninterrupted = self._use
        session.storage.retry = StorageRetry(lambda text: self._say(s.Remark(text)))
        self._worker: threading.Thread | None = self._new_worker()
        self._worker.start()

    # Methods of the main thread.

    def fileno(self) -> int:
        """See `JobSource`."""
        return self._wakeup

    def receive(self) -> list[s.Statement]:
        """See `JobSource`."""
        with self._changed:
            os.eventfd_read(self._wakeup)
            statements, self._statements = self._statements, []
            if self._error is not None:
                os.eventfd_write(self._wakeup, 1)
                if not statements:
                    raise self._error
        return statements

    def request_jobs(self, count: int) -> None:
        """See `JobSource`."""
        with self._changed:
            self._wanted += count
            self._changed.notify()

    def coming(self) -> range:
        """See `JobSource`. A trial is known only when it is offered."""
        return range(0)

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """See `JobSource`."""
        directory = None if log is None else os.path.dirname(log)  # noqa: PTH120
        labels = [device.label for device in devices]
        self._post(lambda: self._session.started(job.number, labels, directory, log))

    def on_message(self, number: int, what: Any) -> None:
        """See `JobSource`."""
        match what:
            case Intermediate(step):
                self._post(Heard(number, what), Heard(number, ShouldPrune(step)))  # every report gets a verdict
            case Attribute(name, text):
                self._post(lambda: self._session.annotate(number, name, json.loads(text)))

    def ended(self, result: JobResult) -> None:
        """See `JobSource`."""
        ending = self._ending(result)
        self._post(lambda: self._tell(result.number, ending, lost=result.unsupervised))

    def retry(self, jobs: Sequence[Job]) -> None:
        """See `JobSource`. The study knows how these trials ended, and that cannot be changed."""
        raise ValueError(
            f"a trial of a search ends once: `gpu-launcher rerun {jobs[0].number}` prints the command that runs the "
            "program alone with the trial's parameters"
        )

    def tick(self) -> None:
        """See `JobSource`."""

    def close(self, patience: float | None = None) -> tuple[SearchSummary, list[str]]:
        """Tell the study about all trials that have not been told; returns the summary and lines for the user.

        `patience` is the time limit in seconds. With a limit, a trial that is being sampled is given up, and StudyError
        is raised when the time is over. None waits as long as it takes.
        """
        until = None if patience is None else time.monotonic() + patience
        with self._changed:
            self._closing = True
            self._changed.notify()
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
                f"the search did not end within {patience:.0f} s and was abandoned; the next sweep on the study marks "
                "the running trials as failed"
            )
        os.close(self._wakeup)
        return self._result

    def abandon(self) -> None:
        """Stop using the study. The next sweep on it fails the trials that are running."""
        self._worker = None

    def _post(self, *what: Heard | Callable[[], None]) -> None:
        with self._changed:
            self._events.extend(what)
            self._changed.notify()

    # Methods of the worker.

    def _new_worker(self) -> threading.Thread:
        return threading.Thread(target=self._work, name="gpu-launcher search", daemon=True)

    @property
    def _is_mine(self) -> bool:
        """Whether the calling thread is the worker, and so may use the study."""
        return threading.current_thread() is self._worker

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Context for an operation on the study. Raises SamplingInterrupted if another worker has taken over."""
        with self._using:
            if not self._is_mine:
                raise SamplingInterrupted
            yield

    def _say(self, statement: s.Statement) -> None:
        with self._changed:
            self._statements.append(statement)
            os.eventfd_write(self._wakeup, 1)

    def _work(self) -> None:
        try:
            while self._work_on():
                pass
            self._session.close()
            summary = self._session.summary()
            self._result = (summary, self._report(summary))
        except SamplingInterrupted:
            return
        except BaseException as error:  # a sampler, a storage or the user's search space can raise anything
            if self._is_mine:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        failed = error if isinstance(error, GpuLauncherError) else None
        if failed is None:
            traceback.print_exc()
            failed = StudyError(f"the search failed: {type(error).__name__}: {error}")
        if not isinstance(error, StorageInternalError):  # that was already retried for the longest time
            try:
                self._session.close()
            except Exception:  # from the storage; the next sweep fails the trials that cannot be told now
                traceback.print_exc()
        with self._changed:
            self._error = failed
            os.eventfd_write(self._wakeup, 1)

    def _report(self, summary: SearchSummary) -> list[str]:
        """Call `finish`; returns its lines, or one that says why it failed. The search has succeeded in either case."""
        try:
            return self._finish(self._session, summary)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return [f"the report on the study failed: {type(error).__name__}: {error}"]

    def _work_on(self) -> bool:
        """Do the pending work, or wait for some. Returns False when the search is to close."""
        with self._changed:
            if not (self._events or self._wanted or self._closing):
                self._changed.wait(CHECK_SECONDS)
            events, self._events = self._events, deque()
            wanted, closing = self._wanted, self._closing
        self._turn(events)
        if closing:
            return False
        if wanted:
            self._ask()
        elif not self._warm and self._session.running:
            # A good moment, because nothing waits for a trial.
            self._warm = True
            self._session.warm_up()
        return True

    def _handle(self, event: Callable[[], None]) -> None:
        event()

    def _answer(self, job: int, question: int, verdict: bool | Exception) -> None:
        if isinstance(verdict, Exception):
            raise verdict
        self._say(s.Reply(job, Verdict(question, verdict)))
        if verdict and self._kill_pruned:
            self._say(s.Cancel(job, "was ended because its trial was pruned", pruned=True))

    def _tell(self, number: int, ending: TrialEnding, *, lost: bool) -> None:
        self._trials.pop(number, None)
        if lost and self._session.retry_lost(number, ending.message or "was lost") is not None:
            self._say(s.Remark(f"trial {number} was lost, and is queued again"))
            return
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
                if message is not None:
                    self._say(s.Remark(message))
                return  # the next turn asks again, after handling what has arrived meanwhile
            case AskedTrial():
                self._trials[answer.trial.number] = answer.trial  # the job has the same number
                self._say(s.Offer(self._make_job(answer)))
                with self._changed:
                    self._wanted -= 1
            case SearchEnded(reason, failed):
                if failed:
                    self.failed = reason
                self._say(s.Exhausted(reason))
                with self._changed:
                    self._wanted = 0
