"""The head: the user's program while a node runs its jobs. It decides what runs, and owns the results.

Theory of operation. A node asks for jobs when it has room (`Wanted`). The head offers the jobs of a list, in order, and
then those of a `JobSource`, if there is one. Everything that happens comes back as messages, most of which are events:
the head writes them to the manifest and shows them. Signals arrive here, and the head tells the node to stop. A head
that is suspended or busy only delays new jobs: the node never waits for it. Requests from other terminals arrive at the
control socket (`jobs.control_socket`).

A job that did not complete is kept, so that the user can run it again (`RetryJobs`). So the node is told only that all
jobs were offered, and that there are no more when all of them have ended. Requests arrive before that or are refused:
none is lost.

Once no more jobs are started (a stop, the node gave up, or it died), the head concludes the jobs that were not offered
itself. The node concludes the others; if it died, the head does so from the reports that the jobs left.
"""

from __future__ import annotations

import contextlib
import itertools
import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Protocol

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import NodeDiedError, ReportError
from gpu_launcher.jobs.alone import AloneCommand
from gpu_launcher.jobs.control import (
    MAX_RANGES,
    Answer,
    CancelJobs,
    ContinueSweep,
    LimitDevices,
    PauseSweep,
    Ranges,
    RetryJobs,
    Steering,
    contains,
    is_one,
    merged,
    name_of,
    named,
    overlap,
    ranges_of,
    spell,
    without,
)
from gpu_launcher.jobs.controlled_sweep import ControlledSweep
from gpu_launcher.jobs.events import (
    Event,
    GaveUp,
    JobEnded,
    JobsRequeued,
    JobStarted,
    Notice,
    Outcome,
    Progress,
    SearchStatus,
    StopRequested,
    SweepEnded,
    SweepStarted,
)
from gpu_launcher.jobs.failures import set_aside
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.leaving import leave_while_running
from gpu_launcher.jobs.manifest import Entry, read
from gpu_launcher.jobs.node_messages import (
    BeginRun,
    Closed,
    Ended,
    Heard,
    Message,
    NodeReady,
    Opened,
    ThrottleConfirmed,
    Wanted,
)
from gpu_launcher.jobs.notifications import Notifier
from gpu_launcher.jobs.outcome import left_by, not_started
from gpu_launcher.jobs.progress import PlainProgress, open_progress
from gpu_launcher.jobs.progress.alike import Failures
from gpu_launcher.jobs.progress.interactive import Interactive
from gpu_launcher.jobs.progress.screen_state import Detach
from gpu_launcher.jobs.recorder import Recorder, finished_before, new_reports
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.jobs.source import (
    UNTHROTTLED,
    AllOffered,
    Cancel,
    Exhausted,
    Facts,
    JobSource,
    Offer,
    Remark,
    Statement,
    Stop,
    Throttle,
)
from gpu_launcher.jobs.sweep import Options, portable
from gpu_launcher.processes.signals import StopSignals
from gpu_launcher.wording import count, device_names

_log = get_logger("jobs.head")

KEYS = {"cancel": "key c", "retry": "key r", "pause": "key p", "continue": "key p", "limit": "key +, - or L"}
"""What to call the keys of the live view that ask for something."""
MAX_SKIPPED = 5
"""Maximum number of unusable earlier results that are reported one by one."""
MAX_FAILED = 10
"""Maximum number of failed jobs, one for each way of failing, for which the last lines are made."""
MAX_KEPT = 20_000
"""Maximum number of jobs of a source that are kept because they did not complete. Others cannot be run again."""
TICK_SECONDS = 0.125
"""Maximum seconds between two updates of the live view."""
INCOMPLETE = (Outcome.FAILED, Outcome.CANCELLED)
"""Outcomes of jobs that `resume` and `RetryJobs` run again."""
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
    throttle: Throttle = UNTHROTTLED
    """How much might run at the end."""


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
    how_to_resume: str = "",
    alone: AloneCommand | None = None,
    notifier: Notifier | None = None,
    begun: Callable[[], None] = lambda: None,
    anew: bool = False,
    throttle: Throttle = UNTHROTTLED,
) -> SweepResult:
    """Run `jobs` on `node`, and show progress on `display`, by default on stderr. The display is closed at the end.

    `directory` is the sweep's directory, which keeps its manifest and reports. `command` names this program to others
    who wait for devices. If there is a `source`, its jobs are run, too: `total` in all, if that is known. Their results
    go to the source alone. `notices` are shown first. `closing` returns the last lines; it is called with one job for
    each way in which jobs failed, and with the number of jobs that did not complete. `how_to_resume` is the command
    line that runs the rest when this sweep has ended; empty if there is none. `alone` is as for `Recorder`.
    `notifier` is told how jobs and the sweep end. `begun` is called when the sweep has begun, and other programs can
    watch it. `anew` is as for `Recorder`. `throttle` is how much may run at first: an earlier batch of the same sweep
    may have been paused.

    Raises OptionError, PoolDirectoryError and ManifestError before any job is started. If anything is raised, the node
    is closed.
    """
    with contextlib.ExitStack() as cleanup:
        cleanup.push(lambda error, *_: None if error is None else node.close())
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
        display = display or open_progress()
        cleanup.callback(display.close)
        show: Callable[[Event], None] = display.handle

        def notice(text: str) -> None:
            show(Notice(time.monotonic(), text))

        recorder = Recorder(
            directory,
            left,
            command,
            launch=reports.launch,
            how_to_resume=how_to_resume,
            alone=alone,
            directions=options.directions,
            objectives=options.objectives,
            anew=anew,
            warn=notice,
        )
        cleanup.callback(recorder.close)
        expected = len(left) if source is None else total
        leave = partial(leave_while_running, directory=directory, option=options.spell("detach"))
        head = _Head(left, node, source, recorder, display, options.grace, expected, notifier, leave)
        cleanup.callback(head.close)
        show = head.show
        is_search = bool(options.objectives)
        show(SweepStarted(time.monotonic(), expected, opened.devices, options.max_parallel, is_search))
        if before:
            notice(f"resumed: {len(finished)} of {count(len(jobs), 'job')} completed before, {len(left)} to run")
        for number, why in list(skipped.items())[:MAX_SKIPPED]:
            notice(f"job {number} is run again, because its earlier result is not used: {why}")
        if len(skipped) > MAX_SKIPPED:
            notice(f"{count(len(skipped) - MAX_SKIPPED, 'more job')} are run again for such reasons")
        for text in notices:
            notice(text)
        _log.info("%s runs %s jobs in %s", command, "any number of" if expected is None else expected, directory)
        if throttle != UNTHROTTLED:
            head.begin_with(throttle)
        begun()
        head.run()
        show(SweepEnded(time.monotonic(), tuple(closing(head.failed_jobs(), head.incomplete))))
        results = {**finished, **head.results}
        listed = [results[job.number] for job in jobs]
        return SweepResult(listed, head.stopped_by, head.stopped, head.given_up, head.throttle)


def _with_attempts(job: Job, before: Mapping[int, Entry]) -> Job:
    entry = before.get(job.number)
    return replace(job, attempts_before=entry.attempts) if entry is not None and entry.attempts else job


def _ended(result: JobResult) -> JobEnded:
    """Return the event that a job has ended."""
    return JobEnded(
        time=time.monotonic(),
        number=result.number,
        label=result.label,
        devices=result.devices,
        outcome=result.outcome,
        duration=result.duration,
        message=result.message if result.outcome is Outcome.FAILED else None,
        log=result.log,
        origin=result.origin,
        left_behind=result.left_behind,
        figures=result.figures,
    )


class _Head(ControlledSweep):
    """The state of one run in the head."""

    def __init__(
        self,
        jobs: Sequence[Job],
        node: JobRunner,
        source: JobSource | None,
        recorder: Recorder,
        display: Progress,
        grace: float,
        total: int | None,
        notifier: Notifier | None,
        leave: Callable[[Interactive], PlainProgress | str],
    ) -> None:
        super().__init__(recorder, total, grace)
        self._display = display
        self._notifier = notifier
        self._waiting = deque(jobs)
        """Jobs of the list that have not been offered."""
        self._listed = {job.number for job in jobs}
        self._node = node
        self._arrived: deque[Message] = deque()
        """Messages of the node that were received and not handled. They hold even if the node has died since."""
        self._source = source
        self._leave = leave
        self._offered: dict[int, Job] = {}
        """Jobs that were offered to the node and have not ended."""
        self._dropped: dict[str, Ranges] = {}
        """Ranges of jobs that were cancelled before the source offered them, by what cancelled them."""
        self._incomplete: dict[int, tuple[Job, JobResult]] = {}
        """Jobs that failed or were cancelled, by number."""
        self._earlier: dict[int, JobResult] = {}
        """The results of jobs before the user ran them again, until they are started."""
        self._all_offered = False
        """Whether the node knows, or need not know, that all jobs were offered."""
        self._exhausted = False
        """Whether the node was told that there are no more jobs, so that it ends the run."""
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
            if (control := self.fileno()) is not None:
                selector.register(control, selectors.EVENT_READ, self.serve)
            if self._notifier is not None:
                selector.register(self._notifier.begin(), selectors.EVENT_READ, self._on_notifier)
            if isinstance(self._display, Interactive) and (keys := self._display.fileno()) is not None:
                selector.register(keys, selectors.EVENT_READ, partial(self._on_keys, self._display, selector, keys))
            try:
                self._take_arrived()
                if self._source is None and not self._waiting:  # a node that asks for jobs may be hours away
                    self._note_all_offered()
                while not self._closed:
                    self._exhaust_if_done()
                    for key, _ in selector.select(TICK_SECONDS):
                        if not self._closed:
                            key.data()
                    if self._source is not None:
                        self._source.tick()
                    self._node.tick()
                    if self._notifier is not None:
                        self._on_notifier()
                    self._display.tick(time.monotonic())
                if self._signals.take() or self._signals.last is not None:  # may be too late for the node
                    self.stopped, self.stopped_by = True, self._signals.last
            except NodeDiedError as error:
                self._lose_node(str(error))
            except BaseException:
                self._node.close()  # end the jobs before anything reports that the run is over
                raise

        if self._notifier is not None:
            self._conclude(self._notifier)

    def close(self) -> None:
        """Close the control socket and the display."""
        super().close()
        self._display.close()

    def show(self, event: Event) -> None:
        """Record an event, and then show it."""
        super().show(event)
        self._display.handle(event)
        if isinstance(event, StopRequested):
            self._drop_waiting(None)

    # Notifications

    def _on_notifier(self) -> None:
        assert self._notifier is not None
        for line in self._notifier.tick():
            self.show(Notice(time.monotonic(), line))

    def _conclude(self, notifier: Notifier) -> None:
        reason = "given_up" if self.given_up is not None else "stopped" if self.stopped else "completed"
        message = self.given_up if self.given_up is not None else self._stopping
        notifier.conclude(reason, message, self._tally.ended, stopped=self.stopped_by is not None)

    # Signals

    def _on_signals(self) -> None:
        for _ in range(self._signals.take()):
            assert self._signals.last is not None
            self._stop(self._signals.last.name)

    # Keys

    def _on_keys(self, display: Interactive, selector: selectors.BaseSelector, keys: int) -> None:
        """Do what the keys ask for that were pressed. `selector` waits for more at the descriptor `keys`."""
        if isinstance(display.serve(self._carry_out_key), Detach):
            left = self._leave(display)
            if isinstance(left, str):
                self._display.handle(Notice(time.monotonic(), left))
            else:
                self._signals.ignore_hangups()
                selector.unregister(keys)
                self._display = left

    def _carry_out_key(self, request: Steering) -> str:
        """Carry out what a key asks for, and return a line about it. Raises ValueError if that is not possible."""
        answer = self._carry_out(request, KEYS[name_of(request)])
        match request:
            case CancelJobs(jobs):
                if not (cancelled := merged([*answer["ending"], *answer["dropped"]])):
                    if answer["already"]:
                        raise ValueError(f"{spell(answer['already'])}: cancelled already")
                    raise ValueError(f"{spell(jobs)}: neither running nor waiting")
                return f"{spell(cancelled)} cancelled"
            case RetryJobs():
                if not (again := merged([*answer["again"], *answer["ahead"]])):
                    raise ValueError("nothing to retry: these jobs wait, run or have completed")
                return f"{spell(again)} {'runs' if is_one(again) else 'run'} again"
            case PauseSweep():
                return "paused: no job is started until p continues"
            case ContinueSweep():
                return "jobs are started again"
            case LimitDevices(None):
                return "no limit on devices from now on"
        return f"at most {count(answer['devices'], 'device')} from now on"

    # Requests from other terminals, and keys

    def _tell(self, statement: Cancel | Stop | Throttle) -> None:
        self._node.say(statement)

    def _stop_by_request(self, by: str, *, now: bool) -> Answer:
        self._signals.note(Signals.SIGINT)  # the program ends as after Ctrl-C
        return super()._stop_by_request(by, now=now)

    def _coming(self) -> Ranges:
        coming = range(0) if self._source is None else self._source.coming()
        return ((coming.start, coming.stop - 1),) if coming else ()

    def _later(self, jobs: Ranges) -> Ranges:
        """Return those of these jobs that the source may offer later."""
        return tuple(part for first, last in self._coming() for part in overlap(jobs, first, last))

    def _drop(self, jobs: Ranges, by: str) -> Ranges:
        offered = self._withdraw(named(jobs, self._offered), by)
        ahead = without(self._later(jobs), self._all_dropped)
        self._dropped[by] = merged([*self._dropped.get(by, ()), *ahead])
        unwanted = [job for job in self._waiting if contains(jobs, job.number)]
        self._waiting = deque(job for job in self._waiting if not contains(jobs, job.number))
        for job in unwanted:
            self._end(self._not_wanted(job, by), job)
        if self._source is None and not self._waiting:
            self._note_all_offered()
        return merged([*offered, *ranges_of(job.number for job in unwanted), *ahead])

    @property
    def _all_dropped(self) -> Ranges:
        return merged(dropped for ranges in self._dropped.values() for dropped in ranges)

    def _retry(self, jobs: Ranges | None, by: str) -> Answer:
        if self._exhausted or self._stopping is not None or self.given_up is not None:
            return {"over": True, "again": [], "ahead": [], "unfinished": []}
        if jobs is None:
            numbers = [number for number, (_, result) in self._incomplete.items() if result.outcome is Outcome.FAILED]
            jobs = ranges_of(numbers)
        later = self._later(jobs)
        not_later = without(later, self._all_dropped)
        ahead = without(later, not_later)
        again = [self._incomplete[number] for number in named(jobs, self._incomplete)]
        if again:
            self._run_again(again, by)
        self._dropped = {by: without(ranges, ahead) for by, ranges in self._dropped.items()}
        started = ranges_of(job.number for job, _ in again)
        unfinished = ranges_of(named(jobs, [*self._offered, *(job.number for job in self._waiting)]))
        return {
            "over": False,
            "again": started[:MAX_RANGES],
            "ahead": ahead[:MAX_RANGES],
            "unfinished": without(merged([*unfinished, *not_later]), started)[:MAX_RANGES],
        }

    def _run_again(self, ended: Sequence[tuple[Job, JobResult]], by: str) -> None:
        """Offer jobs again that had ended. Raises ValueError if the source refuses that."""
        jobs = []
        for job, result in ended:
            attempts = result.attempts - (result.duration is None)  # one that never began does not count
            jobs.append(replace(job, attempts_before=attempts, failed_before=0))
        if self._source is not None:
            self._source.retry(jobs)
        results = [result for _, result in ended]
        results = [replace(one, log=set_aside(one.log, one.attempts) if one.log else None) for one in results]
        self._recorder.requeue(jobs, {one.number: one.log for one in results})
        names = spell(ranges_of(job.number for job in jobs))
        text = f"{names} {'runs' if len(jobs) == 1 else 'run'} again, because of {by}"
        failed = sum(one.outcome is Outcome.FAILED for one in results)
        not_run = sum(one.outcome is Outcome.CANCELLED and one.duration is None for one in results)
        numbers = frozenset(job.number for job in jobs)
        self.show(JobsRequeued(time.monotonic(), numbers, failed, not_run, text))
        for job, result in zip(jobs, results, strict=True):
            number = job.number
            _log.info("job %d runs again after it %s", number, result.outcome.value)
            self.results.pop(number, None)
            del self._incomplete[number]
            self._earlier[number] = result
            self._offer(job, forgiven=result.outcome is Outcome.FAILED)

    @staticmethod
    def _not_wanted(job: Job, by: str) -> JobResult:
        """Return the result of a job that was cancelled before it was offered to the node."""
        result = not_started(job, job.attempts_before + 1, None)
        return replace(result, message=f"was cancelled by {by}", withdrawn=True)

    def begin_with(self, throttle: Throttle) -> None:
        """Let no more run than an earlier batch of the sweep was last allowed to."""
        still = []
        if throttle.paused:
            still.append("no job is started before `gpu-launcher continue`")
        if throttle.devices is not None:
            still.append(f"at most {count(throttle.devices, 'device')} before `gpu-launcher limit none`")
        self._set_throttle(throttle, f"as in the batch before: {', and '.join(still)}")

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
                self._earlier.pop(number, None)
                self.show(message)
                if self._source is not None and number not in self._listed:
                    self._source.started(self._offered[number], message.devices, message.log)
            case Heard(number, what):
                if self._source is not None:
                    self._source.on_message(number, what)
            case Ended(result):
                job = self._offered.get(result.number)
                if self._notifier is not None and job is not None and result.outcome is Outcome.FAILED:
                    self._notifier.job_failed(job, result)
                self._end(result)
            case GaveUp(problem=problem):
                self.given_up = problem
                self.show(Notice(message.time, message.text))
                self._drop_waiting(problem)
            case Closed():
                self._close(message)
            case NodeReady() | Opened() | ThrottleConfirmed():
                pass  # the first two are received before the run begins, and one machine has the whole limit
            case _:
                self.show(message)

    def _close(self, closed: Closed) -> None:
        self._closed = True
        if closed.error is not None:
            raise closed.error
        self.stopped = closed.stopped
        self.stopped_by = self._signals.last if closed.stopped else None
        # These offers were on their way when the node decided to start no more jobs.
        self._waiting.extend(self._offered.values())
        self._drop_waiting(self.given_up)

    def _end(self, result: JobResult, job: Job | None = None) -> None:
        """Take note of the result of a job. `job` is needed if the job was not offered."""
        number = result.number
        _log.info("job %d attempt %d has its result: %s", number, result.attempts, result.outcome.value)
        job = self._offered.pop(number, job)
        earlier, of_source = self._earlier.pop(number, None), result
        if number in self._cancelled:
            self._cancelled.remove(number)
            result = of_source = replace(result, withdrawn=result.outcome is Outcome.CANCELLED)
        elif earlier is not None and (self._stopping is not None or self.given_up is not None):
            result = earlier  # it did not begin again
        self.show(_ended(result))
        if (text := result.left_behind_text) is not None:
            self.show(Notice(time.monotonic(), text))
        if number in self._listed:
            self.results[number] = result
        elif self._source is not None:
            self._source.ended(of_source)
            self._recorder.discard_report(number)
            result = replace(result, payload=None)
        listed = number in self._listed
        if job is not None and result.outcome in INCOMPLETE and (listed or len(self._incomplete) < MAX_KEPT):
            self._incomplete[number] = job, result

    @property
    def incomplete(self) -> int:
        """Number of jobs that failed or were cancelled."""
        return sum(self._tally.ended[outcome] for outcome in INCOMPLETE)

    def failed_jobs(self) -> list[Job]:
        """Return jobs that failed, one for each way of failing."""
        ways = Failures()
        ended = ((job, _ended(result)) for job, result in self._incomplete.values())
        failed = (job for job, event in ended if event.outcome is Outcome.FAILED and ways.add(event) is None)
        return list(itertools.islice(failed, MAX_FAILED))

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
        self.show(Notice(time.monotonic(), f"{problem}. No more jobs are started"))
        self.stopped = self._stopping is not None
        self.stopped_by = self._signals.last
        self.given_up = NOT_RUN
        for job in list(self._offered.values()):
            self._end(self._left_by(job))
        self._drop_waiting(NOT_RUN)

    def _left_by(self, job: Job) -> JobResult:
        """Make the result of a job whose node died before it sent one."""
        started, attempts = self._tally.running.get(job.number), job.attempts_before + 1
        with contextlib.suppress(FileNotFoundError, ReportError):
            report = read_report(self._recorder.report_path(job.number))
            if report.ok:
                return left_by(job, report, started, attempts, unwanted=False)
        if started is None:  # a source may run it later
            return not_started(job, attempts, NOT_RUN, cancelled=self.stopped or job.number not in self._listed)
        return JobResult(
            job.number,
            job.label,
            outcome=Outcome.CANCELLED if self.stopped else Outcome.FAILED,
            payload=None,
            message=ENDED,
            devices=started.devices,
            duration=time.monotonic() - started.time,
            log=started.log,
            cause=None if self.stopped else Cause.CRASH,
            attempts=attempts,
            unsupervised=not self.stopped,
        )

    # What to run

    def _deal(self, count: int) -> None:
        """Offer `count` jobs from the list, or ask the source for them."""
        while count and self._waiting:
            count -= 1
            self._offer(self._waiting.popleft())
        if self._source is None:
            if not self._waiting:
                self._note_all_offered()
        elif count and not self._all_offered:
            self._source.request_jobs(count)

    def _offer(self, job: Job, *, forgiven: bool = False) -> None:
        self._offered[job.number] = job
        self._node.say(Offer(job, forgiven))

    def _note_all_offered(self) -> None:
        if not self._all_offered:
            self._all_offered = True
            self._node.say(AllOffered())

    def _exhaust_if_done(self) -> None:
        """Let the node end the run when all jobs have ended."""
        if self._all_offered and not self._exhausted and not self._offered and not self._waiting:
            self._exhausted = True
            self._node.say(Exhausted())

    def _on_source(self) -> None:
        assert self._source is not None
        for statement in self._source.receive():
            match statement:
                case Offer(job):
                    self._recorder.add(job)
                    by = next((by for by, ranges in self._dropped.items() if contains(ranges, job.number)), None)
                    if by is not None:
                        self._end(self._not_wanted(job, by), job)
                        self._source.request_jobs(1)  # instead of this one
                    else:
                        self._offer(job)
                case Exhausted(reason):
                    if reason is not None:
                        self.show(Notice(time.monotonic(), reason))
                    self._note_all_offered()
                case Remark(text):
                    self.show(Notice(time.monotonic(), text))
                case Facts(facts):
                    self.show(SearchStatus(time.monotonic(), facts))
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
            self._end(result, job)
        # The node starts no more jobs, so it ends without Exhausted. If its request for jobs is still on the way, the
        # answer would come when the run is over.
        if self._source is None:
            self._all_offered = self._exhausted = True
