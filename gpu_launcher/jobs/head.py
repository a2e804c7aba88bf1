"""The head: the user's program while a node runs its jobs. It decides what runs, and owns the results.

Theory of operation. A node asks for jobs when it has room (`Wanted`). The head offers the jobs of a list, in order, and
then those of a `JobSource`, if there is one. Everything that happens comes back as messages, most of which are events:
the head writes them to the manifest and shows them. Signals arrive here, and the head tells the node to stop. A head
that is suspended or busy only delays new jobs: the node never waits for it.

Once no more jobs are started (a stop, the node gave up, or it died), the head concludes the jobs that were not offered
itself. The node concludes the others; if it died, the head does so from the reports that the jobs left.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Protocol

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import NodeDiedError, ReportError
from gpu_launcher.jobs.events import (
    GaveUp,
    JobEnded,
    JobRetried,
    JobReturned,
    JobStarted,
    JobWaiting,
    NodesChanged,
    Notice,
    Outcome,
    Progress,
    SearchStatus,
    StopRequested,
    SweepEnded,
    SweepStarted,
)
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.manifest import Entry, Recorded, Recorder, finished_before, new_reports, read
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Heard, Message, Opened, Wanted
from gpu_launcher.jobs.outcome import not_started
from gpu_launcher.jobs.progress import open_progress
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.jobs.source import Exhausted, Facts, JobSource, Offer, Remark, Statement, Stop
from gpu_launcher.jobs.sweep import Options, portable
from gpu_launcher.processes.signals import StopSignals
from gpu_launcher.wording import count, device_names

_log = get_logger("jobs.head")

MAX_SKIPPED = 5
"""Maximum number of unusable earlier results that are reported one by one."""
TICK_SECONDS = 0.125
"""Maximum seconds between two updates of the live view."""
ENDED = "was ended because the process that starts jobs was killed"
NOT_RUN = "was not run: the process that starts jobs was killed"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The results of a sweep, and what stopped it."""

    results: list[JobResult]
    """Results of the listed jobs, in order. A source gets the results of its own jobs."""
    stopped_by: Signals | None
    """The signal that stopped the sweep, if one did."""
    stopped: bool = False
    """Whether a signal or failures stopped the sweep."""
    given_up: str | None = None
    """Why no more jobs were started although the sweep was not stopped, as a sentence whose subject is a job."""


class JobRunner(Protocol):
    """What runs the jobs of a head: a node, or several nodes that share the jobs."""

    early: list[Message]
    """Messages that arrived before `open` returned."""

    def open(self) -> Opened:
        """Wait until jobs can run. Raises the error that prevents that, such as PoolDirectoryError."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive_ready` has something to return."""

    def receive_ready(self) -> list[Message]:
        """Return messages that have arrived. Raises NodeDiedError if no more can arrive."""

    def say(self, what: Statement | BeginRun) -> None:
        """Send a message, such as the offer of a job that was wanted. Raises NodeDiedError."""

    def tick(self) -> None:
        """Called at least a few times a second."""

    def close(self) -> None:
        """End every job that still runs. Idempotent."""


def run_jobs(
    jobs: Sequence[Job],
    node: JobRunner,
    options: Options,
    directory: Path,
    command: str,
    *,
    source: JobSource | None = None,
    total: int | None = None,
    display: Progress | None = None,
    notices: Sequence[str] = (),
    closing: Callable[[Sequence[Job], int], Sequence[str]] = lambda failed, incomplete: (),
) -> SweepResult:
    """Run `jobs` on `node`, and show progress on `display`, by default on stderr. The display is closed at the end.

    `directory` is the sweep's directory, which keeps its manifest and reports. `command` names this program to others
    who wait for devices. If there is a `source`, its jobs are run, too: `total` in all, if that is known. Their results
    go to the source alone. `notices` are shown first. `closing` returns the last lines; it is called with one job for
    each way in which jobs failed, and with the number of jobs that did not complete.

    Raises OptionError, PoolDirectoryError and ManifestError before any job is started. If anything is raised, the node
    is closed.
    """
    try:
        return _run_jobs(
            jobs,
            node,
            options,
            directory,
            command,
            source=source,
            total=total,
            display=display,
            notices=notices,
            closing=closing,
        )
    except BaseException:
        node.close()
        raise


def _run_jobs(
    jobs: Sequence[Job],
    node: JobRunner,
    options: Options,
    directory: Path,
    command: str,
    *,
    source: JobSource | None,
    total: int | None,
    display: Progress | None,
    notices: Sequence[str],
    closing: Callable[[Sequence[Job], int], Sequence[str]],
) -> SweepResult:
    with contextlib.ExitStack() as cleanup:
        if display is not None:
            cleanup.callback(display.close)
        reports = new_reports(directory)
        node.say(BeginRun(portable(options), reports, command, shown=True, listed=source is None))
        opened = node.open()
        before: dict[int, Entry] = {}
        finished: dict[int, JobResult] = {}
        skipped: dict[int, str] = {}
        if options.resume:
            before = read(directory)
            finished, skipped = finished_before(jobs, before)
        left = [_with_attempts(job, before) for job in jobs if job.number not in finished]
        progress = display or open_progress()
        if display is None:
            cleanup.callback(progress.close)

        def notice(text: str) -> None:
            progress.handle(Notice(time.monotonic(), text))

        recorder = Recorder(directory, left, command, launch=reports.launch, warn=notice)
        cleanup.callback(recorder.close)
        expected = len(left) if source is None else total
        progress.handle(SweepStarted(time.monotonic(), expected, opened.devices, options.max_parallel))
        if before:
            notice(f"resumed: {len(finished)} of {count(len(jobs), 'job')} completed before, and not run again")
        for number, why in list(skipped.items())[:MAX_SKIPPED]:
            notice(f"job {number} is run again, because its earlier result is not used: {why}")
        if len(skipped) > MAX_SKIPPED:
            notice(f"{count(len(skipped) - MAX_SKIPPED, 'more job')} are run again for such reasons")
        for text in notices:
            notice(text)
        _log.info("%s runs %s jobs in %s", command, "any number of" if expected is None else expected, directory)
        head = _Head(left, node, source, recorder, progress, options.grace)
        head.run()
        progress.handle(SweepEnded(time.monotonic(), tuple(closing(recorder.failed, recorder.incomplete))))
        results = {**finished, **head.results}
        return SweepResult([results[job.number] for job in jobs], head.stopped_by, head.stopped, head.given_up)


def _with_attempts(job: Job, before: Mapping[int, Entry]) -> Job:
    entry = before.get(job.number)
    return replace(job, attempts_before=entry.attempts) if entry is not None and entry.attempts else job


class _Head:
    """The state of one run in the head."""

    def __init__(
        self,
        jobs: Sequence[Job],
        node: JobRunner,
        source: JobSource | None,
        recorder: Recorder,
        progress: Progress,
        grace: float,
    ) -> None:
        self._waiting = deque(jobs)
        """Jobs of the list that have not been offered."""
        self._listed = {job.number for job in jobs}
        self._node = node
        self._arrived: deque[Message] = deque()
        """Messages of the node that were received and not handled. They hold even if the node has died since."""
        self._source = source
        self._recorder = recorder
        self._progress = progress
        self._shown = Recorded(recorder, progress)
        self._grace = grace
        self._offered: dict[int, Job] = {}
        """Jobs that were offered to the node and have not ended."""
        self._running: dict[int, JobStarted] = {}
        self._exhausted = False
        """Whether the node knows, or need not know, that there are no more jobs."""
        self._stopping: str | None = None
        """What stopped the run: the name of a signal, or text such as "3 failures". None if it was not stopped."""
        self.given_up: str | None = None
        """Why the node gave up starting jobs, or that it died. None otherwise, even if the run was stopped."""
        self._signals = StopSignals()
        self._closed = False
        self.results: dict[int, JobResult] = {}
        """Results of the listed jobs, by number."""
        self.stopped = False
        self.stopped_by: Signals | None = None

    def run(self) -> None:
        """Run all jobs until they have ended. Raises GpuLauncherError if the node or the source cannot continue."""
        self._arrived.extend(self._node.early)
        self._node.early = []
        with self._signals, selectors.DefaultSelector() as selector:
            selector.register(self._signals.fileno(), selectors.EVENT_READ, self._on_signals)
            selector.register(self._node.fileno(), selectors.EVENT_READ, self._on_node)
            if self._source is not None:
                selector.register(self._source.fileno(), selectors.EVENT_READ, self._on_source)
            try:
                self._take_arrived()
                if self._source is None and not self._waiting:  # a node that asks for jobs may be hours away
                    self._exhaust()
                while not self._closed:
                    for key, _ in selector.select(TICK_SECONDS):
                        if not self._closed:
                            key.data()
                    if self._source is not None:
                        self._source.tick()
                    self._node.tick()
                    self._progress.tick(time.monotonic())
                if self._signals.take() or self._signals.last is not None:  # may be too late for the node
                    self.stopped, self.stopped_by = True, self._signals.last
            except NodeDiedError as error:
                self._lose_node(str(error))
            except BaseException:
                self._node.close()  # end the jobs before anything reports that the run is over
                raise

    # Signals

    def _on_signals(self) -> None:
        for _ in range(self._signals.take()):
            assert self._signals.last is not None
            self._stop(self._signals.last.name)

    def _stop(self, why: str) -> None:
        """Interrupt the running jobs. The second call kills them."""
        self._node.say(Stop())
        forced = self._stopping is not None
        _log.info("stop because of %s%s", why, ", for the second time" if forced else "")
        self._show_stop(StopRequested(time.monotonic(), len(self._running), self._grace, forced, why))

    def _show_stop(self, event: StopRequested) -> None:
        self._stopping = self._stopping or event.signal
        self._shown.handle(event)
        self._drop_waiting(None)

    # The node

    def _on_node(self) -> None:
        self._arrived.extend(self._node.receive_ready())
        self._take_arrived()

    def _take_arrived(self) -> None:
        while self._arrived and not self._closed:
            self._take(self._arrived.popleft())

    def _take(self, message: Message) -> None:
        match message:
            case Wanted(count):
                self._deal(count)
            case JobStarted(number=number):
                _log.info("job %d runs on %s, log %s", number, device_names(message.devices), message.log)
                self._running[number] = message
                self._shown.handle(message)
                if self._source is not None and number not in self._listed:
                    self._source.started(self._offered[number], message.devices, message.log)
            case JobRetried(number=number) | JobReturned(number=number):
                self._running.pop(number, None)
                self._shown.handle(message)
            case Heard(number, what):
                if self._source is not None:
                    self._source.on_message(number, what)
            case Ended(result):
                self._end(result)
            case StopRequested():
                self._show_stop(message)
            case GaveUp(problem=problem):
                self.given_up = problem
                self._shown.handle(Notice(message.time, message.text))
                self._drop_waiting(problem)
            case Notice() | JobWaiting() | NodesChanged():
                self._shown.handle(message)
            case Closed():
                self._close(message)

    def _close(self, closed: Closed) -> None:
        self._closed = True
        if closed.error is not None:
            raise closed.error
        self.stopped = closed.stopped
        self.stopped_by = self._signals.last if closed.stopped else None
        # These offers were on their way when the node decided to start no more jobs.
        self._waiting.extend(self._offered.values())
        self._drop_waiting(self.given_up)

    def _end(self, result: JobResult) -> None:
        number = result.number
        _log.info("job %d attempt %d has its result: %s", number, result.attempts, result.outcome.value)
        self._running.pop(number, None)
        self._offered.pop(number, None)
        self._shown.handle(
            JobEnded(
                time=time.monotonic(),
                number=number,
                label=result.label,
                devices=result.devices,
                outcome=result.outcome,
                duration=result.duration,
                message=result.message if result.outcome is Outcome.FAILED else None,
                log=result.log,
                origin=result.origin,
                left_behind=result.left_behind,
            )
        )
        if (text := result.left_behind_text) is not None:
            self._shown.handle(Notice(time.monotonic(), text))
        if number in self._listed:
            self.results[number] = result
        elif self._source is not None:
            self._source.ended(result)
            self._recorder.discard_report(number)

    def _lose_node(self, problem: str) -> None:
        """Conclude all jobs after the node was killed. Jobs that left a report of success count as completed."""
        with contextlib.suppress(NodeDiedError):
            while not self._closed:  # messages that the node sent before it died
                while self._arrived and not self._closed:
                    message = self._arrived.popleft()
                    if not isinstance(message, Wanted):
                        self._take(message)
                self._arrived.extend(self._node.receive_ready())
        self._node.close()
        if self._closed:
            return
        _log.error("%s", problem)
        self._shown.handle(Notice(time.monotonic(), f"{problem}. No more jobs are started"))
        self.stopped = self._stopping is not None
        self.stopped_by = self._signals.last
        self.given_up = NOT_RUN
        for job in list(self._offered.values()):
            self._end(self._left_by(job))
        self._drop_waiting(NOT_RUN)

    def _left_by(self, job: Job) -> JobResult:
        """Make the result of a job whose node died before it sent one."""
        started = self._running.get(job.number)
        devices = () if started is None else started.devices
        duration = None if started is None else time.monotonic() - started.time
        log = None if started is None else started.log
        outcome, cause, payload = Outcome.FAILED, None if started is None else Cause.CRASH, None
        message: str | None = NOT_RUN if started is None else ENDED
        with contextlib.suppress(FileNotFoundError, ReportError):
            report = read_report(self._recorder.report_path(job.number))
            if report.ok:
                outcome, cause, message, payload = Outcome.COMPLETED, None, None, report.payload
        # A source may run a job later that never began, so the job counts as cancelled.
        if outcome is Outcome.FAILED and (self.stopped or (started is None and job.number not in self._listed)):
            outcome, cause = Outcome.CANCELLED, None
        return JobResult(
            number=job.number,
            label=job.label,
            outcome=outcome,
            payload=payload,
            message=message,
            devices=devices,
            duration=duration,
            log=log,
            cause=cause,
            attempts=job.attempts_before + 1,
            unsupervised=cause is Cause.CRASH,
        )

    # What to run

    def _deal(self, count: int) -> None:
        """Offer `count` jobs from the list, or ask the source for them."""
        while count and self._waiting:
            count -= 1
            self._offer(self._waiting.popleft())
        if self._source is not None:
            if count:
                self._source.request_jobs(count)
        elif not self._waiting:
            self._exhaust()

    def _offer(self, job: Job) -> None:
        self._offered[job.number] = job
        self._node.say(Offer(job))

    def _exhaust(self) -> None:
        if not self._exhausted:
            self._exhausted = True
            self._node.say(Exhausted())

    def _on_source(self) -> None:
        assert self._source is not None
        for statement in self._source.receive():
            match statement:
                case Offer(job):
                    self._recorder.add(job)
                    self._offer(job)
                case Exhausted(reason):
                    if reason is not None:
                        self._shown.handle(Notice(time.monotonic(), reason))
                    self._exhaust()
                case Remark(text):
                    self._shown.handle(Notice(time.monotonic(), text))
                case Facts(facts):
                    self._shown.handle(SearchStatus(time.monotonic(), facts))
                case _:
                    self._node.say(statement)

    def _drop_waiting(self, problem: str | None) -> None:
        """Conclude the listed jobs that were not offered, because no more jobs are started.

        `problem` is the reason, as a sentence without its subject: each of these jobs fails with it. None if the run
        was stopped: they are then cancelled.
        """
        stopped = problem is None
        while self._waiting:
            job = self._waiting.popleft()
            # A source may run a job later that never began, so the job counts as cancelled.
            cancelled = job.number not in self._listed
            result = not_started(job, job.attempts_before + 1, problem, cancelled=cancelled)
            if stopped and self._stopping is not None and self._signals.last is None:
                result = replace(result, message=f"was stopped because of {self._stopping}")
            self._end(result)
        # The node starts no more jobs, so it ends without Exhausted. If its request for jobs is still on the way, the
        # answer would come when the run is over.
        if self._source is None:
            self._exhausted = True
