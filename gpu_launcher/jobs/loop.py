"""The event loop of a run: it tells the machine what happened and carries out what the machine decides.

Theory of operation. `_turn` waits for a descriptor to become readable and calls its callback. The callback reads one
message and passes what happened, a stimulus, to `_handle`. That is the only place that asks the machine for
instructions. Carrying out an instruction may make more things happen: it appends them to the queue of stimuli and never
calls `_handle`, so no method of the loop runs while another one is half done. Conclusions, which read a report from
disk, are carried out last: the devices of a job that ended go to the next job before its result is read.

What the loop knows about a job is in its `JobRecord`; the machine decides what the job does next. Everything that the
loop needs is passed in: the fork server, the request queue, the source of jobs, the clock.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import selectors
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGTERM
from socket import socket
from typing import Any, Protocol

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.allocation.explain import WaitReason, describe_request
from gpu_launcher.allocation.request_queue import RequestQueue
from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import ReportError, ServerDiedError
from gpu_launcher.jobs import machine as m
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import GaveUp, JobRetried, JobStarted, JobWaiting, Notice, Outcome, StopRequested
from gpu_launcher.jobs.failures import FailureCount, FailurePolicy, RetryState, packed_too_tightly, set_aside
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.job_options import JobOptions
from gpu_launcher.jobs.job_record import JobRecord, JobRun, Stage
from gpu_launcher.jobs.node_messages import Ended, Heard, Message, ThrottleConfirmed
from gpu_launcher.jobs.outcome import result_of
from gpu_launcher.jobs.peak_memory import PeakMemory
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.jobs.source import AllOffered, Cancel, Exhausted, Offer, Reply, Statement, Stop, Throttle
from gpu_launcher.model import Owner, Request
from gpu_launcher.processes import messages, rank_decisions
from gpu_launcher.processes.fork_server_client import JobProcess, Lost
from gpu_launcher.processes.messages import ChannelClosedError, Report
from gpu_launcher.processes.out_of_memory import oom_kills
from gpu_launcher.wording import count, device_names, job_name

_log = get_logger("jobs.loop")

CAP_CHECK_SECONDS = 1.0
"""Seconds between two checks whether the cap leaves devices idle."""
TICK = 0.125
"""Maximum seconds between two turns of the loop."""
MAX_SERVERS_LOST = 5
"""Number of lost fork servers at which the run is given up: another server would most likely be lost, too."""


class Server(Protocol):
    """The fork server, as the loop uses it."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when the server has a message or has died."""

    def receive(self) -> Lost | None:
        """Return a job whose end only the server knows about, if there is one. Raises ServerDiedError."""

    def start(
        self, number: int, spec: Any, result: Path, attempt: int, about: Any, title: str, to_source: int | None
    ) -> JobProcess:
        """Start a job's process for the `attempt`-th time. Raises ServerDiedError; `fileno()` is then readable."""

    def finished(self, process: JobProcess) -> None:
        """Take back the process of a job that has ended, so that its supervisor can start another job.

        Only for a job whose supervisor reported the end and did not abandon it.
        """

    def restart(self, in_child: Callable[[], None]) -> None:
        """Replace a dead server. In the new one, `in_child` closes what belongs to the node alone."""

    def close(self) -> None:
        """End the server and all its jobs, and wait until they have ended."""


class LoopSource(Protocol):
    """The head, as the loop of its node uses it. No method waits for the head."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive` has something to return."""

    def receive(self) -> list[Statement]:
        """Return what the head has said since the last call."""

    def request_jobs(self, count: int) -> None:
        """Ask for `count` more jobs."""

    def send(self, message: Message) -> None:
        """Tell the head what happened."""

    def tick(self) -> None:
        """Called at least a few times a second, and before a job gets its devices."""

    def close_in_child(self) -> None:
        """Close, in a fork of this process, what belongs to this process alone."""


class JobLoop:
    """Runs the jobs of a source until all have ended. Call `run` once."""

    def __init__(
        self,
        source: LoopSource,
        *,
        limits: m.Limits,
        server: Server,
        queue: RequestQueue,
        owner: Callable[[Job], Owner],
        clock: Callable[[], float],
        report_path: Callable[[int], Path],
        title: Callable[[Job], str] = lambda job: "",
        log_file: Callable[[int, messages.JobPrepared], tuple[str, list[str]]] = as_proposed,
        device_environment: DeviceEnvironment = DeviceEnvironment(),  # noqa: B008  (frozen)
        failures: FailurePolicy = FailurePolicy(),  # noqa: B008  (frozen)
        cap: str | None = None,
        checkpoint: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Prepare to run jobs on the devices of `queue`, in which one job waits at a time.

        `source` decides on jobs when there is room for them, and gets their results. `owner` returns the owner of a
        job's lease, `report_path` the path of a job's report by the job's number, and `title` the name of the job's
        process in `ps`. `log_file` chooses the log of a prepared job, and returns it with notices for the user.
        `device_environment` says how jobs are told their devices. `failures` says what to do about jobs that fail.
        `cap` names the option that sets `limits.parallel`, for a notice if it leaves devices idle. `checkpoint` is
        called with the name of each point in a job's life, so that tests can kill this process there.
        """
        self._source = source
        self._jobs: dict[int, JobRecord] = {}
        """Jobs that have no result yet."""
        self._queue = queue
        self._owner = owner
        self._waiting: int | None = None
        """Number of the job whose request is in the queue."""
        self._limits = limits
        self._server = server
        self._clock = clock
        self._report_path = report_path
        self._title = title
        self._log_file = log_file
        self._device_environment = device_environment
        self._failures = failures
        self._peaks = PeakMemory(queue.devices)
        self._cap = cap
        self._look_at_cap = -math.inf
        self._measured: float | None = None
        """When the measurement of the devices that the jobs know was made."""
        self._checkpoint = checkpoint
        self._machine = m.Machine(limits)
        self._selector = selectors.DefaultSelector()
        self._stimuli: deque[m.Stimulus] = deque()
        """Events that the machine has not been told about."""
        self._conclusions: deque[m.Conclude] = deque()
        """Jobs that ended and have no result yet."""
        self._handling = False
        self._requested = 0
        """How many jobs the source was asked for and has not offered yet."""
        self._servers_lost = 0
        self._any_prepared = False
        self._failed = FailureCount(failures.most)
        self._stopped_by: str | None = None
        """The failures that stopped the sweep, as text such as "3 failures". None if failures did not stop it."""
        self._ignored: set[str] = set()
        """Options of single jobs that are ignored because they belong to the sweep, and of which the user was told."""

    @property
    def stopped(self) -> bool:
        """Whether the sweep was stopped, by the user or by failures."""
        return self._machine.stopping

    def run(self) -> None:
        """Run every job. If this raises, no job is left alive."""
        with self._selector:
            try:
                self._watch(self._server.fileno(), self._on_server)
                for descriptor in self._queue.descriptors:
                    self._watch(descriptor, lambda: None)  # each turn attends to the queue
                self._watch(self._source.fileno(), self._on_source)
                self._queue.look()
                self._ask_source()
                while not self._machine.finished:
                    self._turn()
            except BaseException:
                for run in self._runs():
                    run.process.close()  # this makes its supervisor end it
                self._server.close()
                raise
            finally:
                for record in self._jobs.values():
                    if record.run is not None:
                        record.run.process.close()

    def _in(self, stage: Stage) -> list[int]:
        """Numbers of the jobs at a stage that the machine counts as live."""
        return [number for number in self._machine.live() if self._jobs[number].stage is stage]

    def _runs(self) -> Iterator[JobRun]:
        """Attempts that have a process."""
        return (self._jobs[number].attempt for number in self._in(Stage.LIVE))

    def _notify(self, text: str) -> None:
        self._source.send(Notice(self._clock(), text))

    # Waiting

    def _watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, callback)

    def _unwatch(self, channel: socket) -> None:
        if channel.fileno() in self._selector.get_map():
            self._selector.unregister(channel)

    def _turn(self) -> None:
        ready = [key for key, _ in self._selector.select(self._timeout())]
        # If the fork server died, its jobs end because of that. So its death is handled first.
        ready.sort(key=lambda key: key.data != self._on_server)
        for key in ready:
            if self._selector.get_map().get(key.fd) is key:  # not closed by an earlier callback
                key.data()
        self._queue.attend()
        self._take_lease()
        self._note_conditions()
        self._mention_cap()
        self._handle(m.Tick())
        self._ask_source()

    def _timeout(self) -> float:
        """Seconds until the loop has something to do even if no descriptor becomes readable."""
        timeout = TICK
        if self._waiting is not None:
            timeout = min(timeout, self._queue.patience)
        if self._machine.deadline is not None:
            timeout = min(timeout, max(0.0, self._machine.deadline - self._clock()))
        return timeout

    def _note_conditions(self) -> None:
        """Give the jobs the last measurement of the devices, which is made for other reasons."""
        if self._queue.watch.seen != self._measured:
            self._measured = self._queue.watch.seen
            for run in self._runs():
                run.note_conditions(self._queue.watch.conditions)

    def _mention_cap(self) -> None:
        """Say once that the user's cap, and nothing else, leaves devices idle."""
        if self._cap is None or not self._queue.watch.ready or self._clock() < self._look_at_cap:
            return
        if (request := self._machine.capped) is None:
            return
        self._look_at_cap = self._clock() + CAP_CHECK_SECONDS
        idle = self._queue.idle_devices()
        if len(idle) >= request.gpus:
            self._notify(
                f"{self._cap}={self._limits.parallel} leaves {len(idle)} of "
                f"{count(len(self._queue.devices), 'device')} idle: raise or remove it to use them"
            )
            self._cap = None

    # The driver

    def _handle(self, stimulus: m.Stimulus) -> None:
        """Tell the machine about a stimulus and those that follow from it, and carry out what it decides."""
        assert not self._handling, f"{stimulus} while another stimulus is handled"
        self._handling = True
        self._stimuli.append(stimulus)
        while self._stimuli or self._conclusions:
            if self._stimuli:
                stimulus = self._stimuli.popleft()
                instructions = self._machine.handle(stimulus, self._clock())
                if instructions or not isinstance(stimulus, m.Tick):
                    _log.debug("%s: %s", stimulus, instructions)
                for instruction in instructions:
                    self._carry_out(instruction)
            else:
                self._conclude(self._conclusions.popleft())
        self._handling = False

    # What happens: the source, the fork server, supervisors and jobs

    def _ask_source(self) -> None:
        if (more := self._machine.wanted - self._requested) > 0:
            self._requested += more
            self._source.request_jobs(more)
        self._source.tick()

    def _on_source(self) -> None:
        for statement in self._source.receive():
            match statement:
                case Offer(job, forgiven):
                    self._requested = max(0, self._requested - 1)
                    if forgiven:
                        self._failed.forgive()
                    retries = RetryState(self._failures, job.attempts_before, job.failed_before)
                    self._jobs[job.number] = JobRecord(job, retries)
                    self._handle(m.Arrived(job.number))
                case Exhausted():
                    self._handle(m.NoMore())
                case Stop():
                    self._handle(m.StopAsked())
                case AllOffered():
                    self._handle(statement)
                case Throttle():
                    self._handle(statement)
                    self._source.send(ThrottleConfirmed())
                case Cancel(number, unstarted=True) if self._was_started(number):
                    _log.debug("job %d was started and is not taken back", number)
                case Cancel(number):
                    if statement.pruned and number in self._jobs:
                        self._jobs[number].pruned = True
                    self._handle(statement)
                case Reply(number, what):
                    self._answer(number, messages.JobReply(what))

    def _was_started(self, number: int) -> bool:
        """Whether a job has run here, or runs. False if it has its result."""
        record = self._jobs.get(number)
        again = record is not None and record.retries.latest_failure is not None
        return again or number in self._machine.running()

    def _answer(self, number: int, answer: messages.JobReply) -> None:
        record = self._jobs.get(number)
        run = None if record is None else record.live
        if run is not None and run.started is not None:  # otherwise the answer is for an earlier attempt
            # BlockingIOError: the job does not listen. Closed: it has ended, and its end will be reported.
            with contextlib.suppress(BlockingIOError, ChannelClosedError):
                messages.send(run.process.job, answer, wait=False)

    def _on_server(self) -> None:
        died = False
        try:
            lost = self._server.receive()
        except ServerDiedError:
            died = True
        if died:  # not in the except block: an error in the new fork server would show this one as its context
            self._replace_server()
            return
        # If the job is not live, its supervisor reported the end before it died.
        if lost is not None and (record := self._jobs.get(lost.number)) is not None and record.live is not None:
            record.live.note_loss(lost)
            self._ended(lost.number)

    def _replace_server(self) -> None:
        self._selector.unregister(self._server.fileno())
        self._handle(m.ServerLost())
        self._servers_lost += 1
        _log.warning("the fork server died, the %d. of this run", self._servers_lost)
        if self._servers_lost == MAX_SERVERS_LOST:
            self._give_up(
                f"was not run: the fork server was killed {MAX_SERVERS_LOST} times (`dmesg` may know why), and without "
                "one no job can be started"
            )
        elif self._servers_lost == 2 and not self._any_prepared:
            self._give_up(
                "was not run: the fork server ends as soon as it is started, for the reason it printed, or is killed"
            )
        else:
            self._server.restart(self._forget_in_child)
            self._watch(self._server.fileno(), self._on_server)
        unstarted = [*self._in(Stage.STRANDED), *self._in(Stage.POSTPONED)]
        for number in unstarted:
            self._jobs[number].reset()
        for number in self._in(Stage.LIVE):
            if self._jobs[number].attempt.unsupervised:
                self._ended(number)
        for number in unstarted:
            self._handle(m.Exited(number))

    def _forget_in_child(self) -> None:
        """Close, in a forked server, what belongs to the node alone: leases, tickets and channels."""
        self._queue.close_in_child()
        self._source.close_in_child()
        for run in self._runs():
            run.process.close()
        self._selector.close()

    def _on_supervisor(self, number: int) -> None:
        run = self._jobs[number].attempt
        try:
            message, _ = messages.receive(run.process.supervisor)
        except ChannelClosedError:
            run.note_supervisor_death()
        else:
            assert isinstance(message, messages.JobExited), message
            run.note_exit(message)
        if run.unsupervised and run.server == self._servers_lost:
            self._selector.unregister(run.process.supervisor)  # the fork server will report the end
        else:
            self._ended(number)

    def _on_job(self, number: int) -> None:
        run = self._jobs[number].attempt
        try:
            message, _ = messages.receive(run.process.job)
        except ChannelClosedError:
            self._selector.unregister(run.process.job)  # its supervisor will report the end
            return
        if isinstance(message, messages.JobPrepared):
            self._prepared(number, run, message)
        else:
            self._heard(number, run, message)

    def _prepared(self, number: int, run: JobRun, prepared: messages.JobPrepared) -> None:
        run.pid = prepared.pid
        attempt = self._jobs[number].retries.attempt
        _log.debug("job %d attempt %d: prepared as process %d, log %s", number, attempt, run.pid, prepared.log)
        if prepared.log is not None:
            self._choose_log(run, number, prepared)
        if prepared.options is not None:
            self._take_options(number, run, prepared.options)
        request = self._jobs[number].retries.request(prepared.request)
        if request.auto_memory and self._peaks.share is not None:
            request = replace(request, share=self._peaks.share)
        self._any_prepared = True
        self._checkpoint("prepared")
        self._handle(m.Prepared(number, request, self._queue.refusal(request)))

    def _heard(self, number: int, run: JobRun, message: object) -> None:
        match message:
            case messages.JobMessage(what):
                self._source.send(Heard(number, what))
            case messages.ResultWritten() | messages.ResultLost():
                run.note_result(message)
            case _:
                raise TypeError(f"a job says {message!r}")

    def _hear_the_last(self, number: int, run: JobRun) -> None:
        """Read the messages that a job sent before it ended."""
        if run.process.job.fileno() not in self._selector.get_map():
            return  # the channel was read to its end
        run.process.job.setblocking(False)
        with contextlib.suppress(BlockingIOError, ChannelClosedError):
            while True:
                message, _ = messages.receive(run.process.job)
                if not isinstance(message, messages.JobPrepared):
                    self._heard(number, run, message)

    def _choose_log(self, run: JobRun, number: int, prepared: messages.JobPrepared) -> None:
        run.log, notices = self._log_file(number, prepared)
        for text in notices:
            self._notify(text)
        with contextlib.suppress(ChannelClosedError):  # its supervisor will report the end
            messages.send(run.process.job, messages.LogFile(run.log))

    def _take_options(self, number: int, run: JobRun, options: JobOptions) -> None:
        """Apply a job's own options. Tell the user, once for each option, that an option of the sweep is ignored."""
        run.device_environment = options.device_environment
        record = self._jobs[number]
        record.retries.policy = options.failures
        names = {text: text.partition("=")[0] for text in options.ignored}
        new = [text for text in options.ignored if names[text] not in self._ignored]
        if not new:
            return
        self._ignored.update(names.values())
        belongs, it = ("belongs", "it") if len(new) == 1 else ("belong", "them")
        self._notify(
            f"ignored: {', '.join(new)} of {job_name(number, record.job.label)} {belongs} to the sweep as a whole. "
            f"Set {it} on the command line or in the main config"
        )

    def _ended(self, number: int) -> None:
        """Handle the end of a job's process tree."""
        record = self._jobs[number]
        run = record.attempt
        self._hear_the_last(number, run)
        record.stage = Stage.GONE
        run.ended = self._clock()
        self._unwatch(run.process.supervisor)
        self._unwatch(run.process.job)
        if run.status is None or run.unsupervised:
            run.process.close()
        else:
            self._server.finished(run.process)
        self._checkpoint("exited")
        for postponed in self._in(Stage.POSTPONED):  # the job that ended has freed descriptors
            self._start(postponed)
        self._handle(m.Exited(number))
        if record.stage is Stage.GONE:  # otherwise it was concluded or started again
            record.reset()

    # What to do

    def _carry_out(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.StartProcess(number):
                self._start(number)
            case m.TakeTicket(number, request, among):
                self._take_ticket(number, request, among)
            case m.DropTicket(number):
                self._drop_ticket(number)
            case m.Go(number):
                self._go(number)
            case m.Interrupt(number):
                self._tell(number, lambda process: process.signal(SIGINT))
            case m.Terminate(number):
                self._tell(number, lambda process: process.signal(SIGTERM))
            case m.Kill(number):
                self._tell(number, JobProcess.kill)
            case m.Release(number):
                self._release(number)
            case m.Conclude():
                self._conclusions.append(instruction)

    def _start(self, number: int) -> None:
        record = self._jobs[number]
        record.reset()
        job = record.job
        try:
            process = self._server.start(
                number,
                job.spec,
                self._report_path(number),
                record.retries.attempt,
                job.about,
                self._title(job),
                job.channel,
            )
        except ServerDiedError:
            record.stage = Stage.STRANDED  # the server's descriptor is readable now, so it will be replaced
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._in(Stage.LIVE):
                record.stage, record.delay = Stage.POSTPONED, _not_started(error)
            else:
                self._stimuli.append(m.Exited(number, _not_started(error)))
            return
        record.begin(JobRun(process, self._servers_lost, oom_kills()))
        self._watch(process.supervisor.fileno(), lambda: self._on_supervisor(number))
        self._watch(process.job.fileno(), lambda: self._on_job(number))
        self._checkpoint("started")

    def _take_ticket(self, number: int, request: Request, among: frozenset[str] | None) -> None:
        run, job = self._jobs[number].attempt, self._jobs[number].job
        run.request = request
        if among is not None and self._queue.refusal(request, among) is not None:
            return  # none of them can ever grant it; the machine drops the ticket when others may
        run.pending = self._queue.enter(
            replace(request, auto_memory=False),
            self._owner(job),
            explain=lambda reason: self._explain(job, request, reason),
            # If the pool directory becomes unusable, running jobs continue. While one runs, the others keep waiting.
            outlasts=lambda: bool(self._machine.running()),
            among=among,
        )
        self._waiting = number
        self._checkpoint("queued")
        self._queue.claim(run.pending)
        self._take_lease()

    def _drop_ticket(self, number: int) -> None:
        run = self._jobs[number].attempt
        if run.pending is not None:
            self._queue.leave(run.pending)
        run.pending = self._waiting = None

    def _take_lease(self) -> None:
        """Tell the machine if the waiting job's request was granted, or give up if it failed."""
        if (number := self._waiting) is None:
            return
        run = self._jobs[number].attempt
        pending = run.pending
        if pending is None or not pending.settled:
            return
        run.pending = self._waiting = None
        if pending.lease is None:
            self._give_up(f"was not run: {pending.error}")
            return
        run.lease = pending.lease
        run.devices = tuple(device for uuid in run.lease.uuids for device in self._queue.devices if device.uuid == uuid)
        run.shares = run.lease.shares
        _log.info(
            "job %d attempt %d: granted %s by lease %s",
            number,
            self._jobs[number].retries.attempt,
            device_names(run.devices),
            run.lease.id,
        )
        self._checkpoint("claimed")
        self._stimuli.append(m.LeaseGranted(number, frozenset(run.lease.uuids)))

    def _explain(self, job: Job, request: Request, reason: WaitReason) -> None:
        _log.info("job %d waits: %s", job.number, reason.reason or "for its own jobs only")
        wanted = describe_request(request, self._queue.devices)
        self._source.send(
            JobWaiting(self._clock(), job.number, job.label, reason.reason, reason.held_by_others, wanted)
        )

    def _give_up(self, problem: str) -> None:
        _log.warning("no more jobs are started; each %s", problem)
        self._source.send(GaveUp(self._clock(), problem))
        self._stimuli.append(m.GiveUp(problem))

    def _go(self, number: int) -> None:
        self._source.tick()  # the head may have ended and so freed the devices; this then ends the node
        record = self._jobs[number]
        run = record.attempt
        run.started = self._clock()
        how = run.device_environment or self._device_environment
        if self._device_environment.by_uuid:
            how = replace(how, by_uuid=True)
        grant = messages.Grant(
            how.variables(run.devices, run.shares, os.environ),
            how.cpus(run.devices, frozenset(os.sched_getaffinity(0))),
        )
        lease = () if run.lease is None else (run.lease.fileno(),)
        # Before the grant: the job may send messages to its source at once.
        self._source.send(JobStarted(run.started, number, record.job.label, run.devices, run.log, run.pid))
        self._tell(number, lambda process: process.grant(grant, lease))
        self._checkpoint("granted")

    def _tell(self, number: int, say: Callable[[JobProcess], None]) -> None:
        record = self._jobs[number]
        if record.stage is Stage.POSTPONED:  # the job has no process, so it ends here
            record.reset()
            self._stimuli.append(m.Exited(number, record.delay))
        if record.live is not None:
            with contextlib.suppress(ChannelClosedError):  # it has ended, and its end will be reported
                say(record.live.process)

    def _release(self, number: int) -> None:
        run = self._jobs[number].attempt
        assert run.lease is not None
        self._queue.release(run.lease)
        run.lease = None
        self._checkpoint("released")
        self._take_lease()

    # Results

    def _conclude(self, conclusion: m.Conclude) -> None:
        """Make the result of a job that ended, or retry the job."""
        number = conclusion.number
        record = self._jobs[number]
        run = record.run
        if record.job.about is not None:
            with contextlib.suppress(OSError):  # a leftover file does no harm: it is small, and no other job reads it
                rank_decisions.withdraw(rank_decisions.path_for(self._report_path(number)))
        report = None if run is None else self._read_report(number, run)
        faults = (
            {} if run is None else {device.label: self._queue.watch.faults.get(device.uuid) for device in run.devices}
        )
        result = result_of(record, conclusion, report, faults)
        if run is not None and run.started is not None and run.request is not None and run.request.gpus:
            self._learn(run, result)
        if run is not None and conclusion.refused is None and self._run_again(result, record, run):
            return
        self._finish(record, self._adjusted(result, record))

    def _learn(self, run: JobRun, result: JobResult) -> None:
        """Take note of the memory that a job needed, for later ones with `memory=auto`."""
        before = self._peaks.share
        completed = result.outcome is Outcome.COMPLETED
        self._peaks.note(run.peak_device_memory, run.measurements, completed=completed)
        assert run.request is not None
        if packed_too_tightly(result, run):
            self._peaks.note_too_small(run.request.share)
        if self._peaks.share != before:
            self._stimuli.append(m.ShareLearned(self._peaks.share))
        if run.request.auto_memory and self._peaks.blind:
            self._notify(
                "memory=auto: the device memory of the first jobs could not be measured, because they were too short "
                "or the driver does not report it; until it can be, each job gets a whole device"
            )

    def _adjusted(self, result: JobResult, record: JobRecord) -> JobResult:
        """Return the final result of a job, which may be that of an earlier attempt."""
        if not self._machine.takes_more and (record.run is None or record.run.started is None):
            result = record.retries.latest_failure or result  # the retry never ran, so the earlier failure stands
        if result.outcome is Outcome.CANCELLED and record.pruned:
            result = replace(result, outcome=Outcome.PRUNED)
        if result.outcome is Outcome.CANCELLED and self._stopped_by is not None:
            result = replace(result, message=f"was stopped because of {self._stopped_by}", payload=None)
        return result

    def _finish(self, record: JobRecord, result: JobResult) -> None:
        _log.info(
            "job %d attempt %d: %s%s",
            result.number,
            result.attempts,
            result.outcome.value,
            f": {result.message}" if result.message else "",
        )
        self._checkpoint("concluded")
        record.reset()
        self._source.send(Ended(result))
        # A source may have any number of jobs, so nothing is kept about those that have ended.
        del self._jobs[result.number]
        self._machine.forget(result.number)
        if result.outcome is Outcome.FAILED:
            self._count_failure()

    def _run_again(self, result: JobResult, record: JobRecord, run: JobRun) -> bool:
        """Retry a job that failed, if the user wants that and it may help. Returns whether it is retried."""
        # The machine is asked now: since the job ended, the run may have been stopped or given up.
        if result.outcome is not Outcome.FAILED or not self._machine.takes_more:
            return False
        attempt = record.retries.next(result, run, self._queue.refusal_now)
        if attempt is None:
            return False
        event = JobRetried(
            time=self._clock(),
            number=result.number,
            label=result.label,
            duration=result.duration,
            message=result.message or "failed",
            log=set_aside(result.log, result.attempts) if result.log else None,
            attempt=attempt.number,
            attempts=attempt.limit,
            failed=attempt.failed,
        )
        _log.info(
            "job %d attempt %d: failed and is retried: %s", result.number, result.attempts, result.message or "failed"
        )
        with contextlib.suppress(OSError):  # the next attempt overwrites the report
            self._report_path(result.number).unlink()
        self._source.send(event)  # only now: if this node is lost, a report that is there is of an attempt after it
        self._checkpoint("retried")
        record.reset()
        self._stimuli.append(m.Retry(result.number, last=attempt.last))
        return True

    def _count_failure(self) -> None:
        too_many = self._failed.add()
        if too_many is not None and self._machine.takes_more and not self._machine.finished:
            self._stopped_by = too_many
            running = len(self._machine.running())
            stopping = StopRequested(self._clock(), running, self._limits.grace, forced=False, signal=too_many)
            self._source.send(stopping)
            self._stimuli.append(m.StopAsked())

    def _read_report(self, number: int, run: JobRun) -> Report | None:
        try:
            return read_report(self._report_path(number), run.report_digest)
        except FileNotFoundError:
            return None
        except ReportError as error:
            run.problem = run.problem or f"left a result that cannot be used: {error}"
            return None


def _not_started(error: OSError) -> str:
    if error.errno != errno.EMFILE:
        return f"could not be started: {error.strerror} (see `ulimit -a`)"
    return (
        "could not be started: its launching program has too many open files. Remedy: raise the limit (`ulimit -n`), "
        "or let fewer run at the same time"
    )
