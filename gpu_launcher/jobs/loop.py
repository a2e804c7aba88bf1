"""The event loop of a sweep: it tells the machine what happened and carries out what the machine decides.

Theory of operation. `_turn` waits for a descriptor to become readable and calls its callback. The callback reads one
message and passes what happened, a stimulus, to `_handle`. That is the only place that asks the machine for
instructions. Carrying out an instruction may make more things happen: it appends them to the queue of stimuli and never
calls `_handle`, so no method of the loop runs while another one is half done. Conclusions, which read a report from
disk, are carried out last: the devices of a job that ended go to the next job before its result is looked at.

Everything that the loop needs is passed in: the fork server, the ledger, the progress display, the clock.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import selectors
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import MappingProxyType
from typing import Any, Protocol

from gpu_launcher.allocation.device_watch import DeviceWatch
from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.jobs import machine as m
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import (
    GaveUp,
    JobEnded,
    JobRetried,
    JobStarted,
    Notice,
    Outcome,
    Progress,
    Stopping,
)
from gpu_launcher.jobs.failures import Attempts, FailurePolicy, set_aside
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.job_options import JobOptions
from gpu_launcher.jobs.pool import PoolSide
from gpu_launcher.jobs.reports import ReportError, read_report
from gpu_launcher.jobs.running import Running, judge
from gpu_launcher.jobs.source import Exhausted, JobSource, Offer, Reply, Stop, Withdrawn
from gpu_launcher.leases import Ledger
from gpu_launcher.model import Device, Owner, Request
from gpu_launcher.processes import messages, rank_decisions
from gpu_launcher.processes.fork_server_client import SUPERVISOR_DIED, JobProcess, Lost, ServerDiedError
from gpu_launcher.processes.messages import ChannelClosedError, Report
from gpu_launcher.processes.out_of_memory import oom_kills
from gpu_launcher.wording import count, job_name

CAP_CHECK_SECONDS = 1.0
"""Seconds between two looks at whether the cap leaves devices idle."""
TICK = 0.125
"""Seconds between two looks at the clock, for the live view."""
MAX_NAMED = 3
"""Processes that a job left behind that a message names."""
MOST_SERVERS = 5
"""Fork servers that one sweep may lose. More than that is no accident, and starting another would not help."""


class Server(Protocol):
    """The fork server, as the loop uses it."""

    def fileno(self) -> int:
        """Readable when it has something to say, or died."""

    def receive(self) -> Lost | None:
        """The job that only it knows to have ended, if any. Raises ServerDiedError."""

    def start(self, number: int, spec: Any, result: Path, attempt: int, about: Any, title: str) -> JobProcess:
        """Start a job's process for the `attempt`-th time. Raises ServerDiedError, and `fileno()` is readable then."""

    def finished(self, process: JobProcess) -> None:
        """Take a job's process back whose supervisor said that it Exited, and was not abandoned."""

    def restart(self, in_child: Callable[[], None]) -> None:
        """Replace a dead server; `in_child` drops, in the new one, what belongs to the launching program alone."""

    def close(self) -> None:
        """End the server and all its jobs, and wait for that."""


class JobLoop:
    """Runs jobs to their ends. Call `run` once."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        devices: tuple[Device, ...],
        limits: m.Limits,
        server: Server,
        ledger: Ledger,
        progress: Progress,
        clock: Callable[[], float],
        report_path: Callable[[int], Path],
        owner: Callable[[Job], Owner],
        title: Callable[[Job], str] = lambda job: "",
        watch: DeviceWatch,
        log_file: Callable[[int, messages.Prepared], tuple[str, list[str]]] = as_proposed,
        device_environment: DeviceEnvironment = DeviceEnvironment(),  # noqa: B008  (frozen)
        by_uuid: bool = False,
        failures: FailurePolicy = FailurePolicy(),  # noqa: B008  (frozen)
        attempts: Mapping[int, int] = MappingProxyType({}),
        source: JobSource | None = None,
        program: int | None = None,
        cap: str | None = None,
        checkpoint: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Prepare to run `jobs` on `devices`.

        `report_path` says where a job leaves its report, by its number. `owner` says whom a job's ticket and lease
        belong to, `title` what `ps` is to call its process. `watch` says which devices not to use now, `log_file` where
        a job that is prepared logs and what is to be told about it, `device_environment` how jobs are told of their
        devices, `by_uuid` that there is no other name for them, `failures` what to do about jobs that fail, `attempts`
        how many attempts each has made in earlier launches. `source` decides on more jobs when there is room for them.
        `program` is the process for which they are run; None: this one. `cap` names the option that
        is `limits.parallel`, for the user to be told if it leaves devices idle. `checkpoint` is called with the name of
        each point of a job's life, for tests that kill the launching program there.
        """
        self._jobs = {job.number: job for job in jobs}
        self._cap = cap
        self._look_at_cap = -math.inf
        self._pool = PoolSide(devices, ledger, watch, owner, progress, clock, program)
        self._limits = limits
        self._server = server
        self._progress = progress
        self._clock = clock
        self._report_path = report_path
        self._title = title
        self._log_file = log_file
        self._device_environment = device_environment
        self._by_uuid = by_uuid
        self._ignored: set[str] = set()
        """Options of single jobs of which the user was told that they belong to the sweep."""
        self._failures = failures
        self._attempts = Attempts(failures, self._jobs, attempts)
        self._failed = 0
        self._stopped_by: str | None = None
        """How many failures ended the sweep, if they did."""
        self._source = source
        self._pruned: set[int] = set()
        """Jobs that are ended because others are better."""
        self._asked = 0
        """How many jobs the source was asked for and has not offered yet."""
        self._checkpoint = checkpoint

        self._machine = m.Machine(list(self._jobs), limits, more=source is not None)
        self._selector = selectors.DefaultSelector()
        self._live: dict[int, Running] = {}
        self._dead: dict[int, Running] = {}
        """Jobs whose process tree is gone, until they are concluded."""
        self._unstarted: list[int] = []
        """Jobs that the fork server was dead for when they were to be started, until that is known otherwise."""
        self._postponed: dict[int, str] = {}
        """Why jobs could not be started yet, for want of descriptors that others have."""
        self._results: dict[int, JobResult] = {}
        self._servers_lost = 0
        self._any_prepared = False
        self._stimuli: deque[m.Stimulus] = deque()
        """What happened and the machine does not know yet."""
        self._conclusions: deque[m.Conclude] = deque()
        """Jobs that ended, of which the result is not known yet."""
        self._handling = False

    @property
    def stopped(self) -> bool:
        """Whether the sweep was stopped, by the user or by failures."""
        return self._machine.stopping

    def run(self) -> list[JobResult]:
        """Run every job; returns their results in the order of the jobs. A source is told those of its own.

        Whatever is raised, no job is left alive.
        """
        with self._selector:
            try:
                self._watch(self._server.fileno(), self._on_server)
                for descriptor, callback in self._pool.descriptors():
                    self._watch(descriptor, callback)
                if self._source is not None:
                    self._watch(self._source.fileno(), self._on_source)
                self._pool.begin()
                self._handle(m.Begin())
                self._ask_source()
                while not self._machine.finished:
                    self._turn()
            except BaseException:
                for job in self._live.values():
                    job.process.close()  # upon which its supervisor ends it
                self._server.close()
                raise
            finally:
                for job in (*self._live.values(), *self._dead.values()):
                    job.process.close()
                    self._pool.forget(job)
        return [self._results[number] for number in self._jobs if number in self._results]

    # Waiting

    def _watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, callback)

    def _turn(self) -> None:
        ready = [key for key, _ in self._selector.select(self._patience())]
        # The fork server's end is seen before the ends of its jobs, which follow from it.
        ready.sort(key=lambda key: key.data != self._on_server)
        for key in ready:
            if self._selector.get_map().get(key.fd) is key:  # not closed by what came before
                key.data()
        self._pool.look()
        self._claim()
        self._mention_cap()
        self._handle(m.Tick())
        self._ask_source()
        self._progress.tick(self._clock())

    def _patience(self) -> float:
        """Seconds until something must be looked at though nothing calls."""
        patience = TICK
        if self._pool.patience is not None:
            patience = min(patience, self._pool.patience)
        if self._machine.deadline is not None:
            patience = min(patience, max(0.0, self._machine.deadline - self._clock()))
        return patience

    def _mention_cap(self) -> None:
        """Say once that the user's cap, and nothing else, leaves devices idle."""
        if self._cap is None or not self._pool.ready or self._clock() < self._look_at_cap:
            return
        if (request := self._machine.capped) is None:
            return
        self._look_at_cap = self._clock() + CAP_CHECK_SECONDS
        idle = self._pool.idle()
        if len(idle) >= request.gpus:
            self._progress.handle(
                Notice(
                    self._clock(),
                    f"{self._cap}={self._limits.parallel} leaves {len(idle)} of "
                    f"{count(len(self._pool.devices), 'device')} idle: raise or remove it to use them",
                )
            )
            self._cap = None

    # What happens

    def stop(self) -> None:
        """Interrupt the jobs that run, and start no more. Called a second time, kill them."""
        self._handle(m.StopAsked())

    def _ask_source(self) -> None:
        if self._source is None:
            return
        if (more := self._machine.wanted - self._asked) > 0:
            self._asked += more
            self._source.request_jobs(more)
        self._source.tick()

    def _on_source(self) -> None:
        assert self._source is not None
        for statement in self._source.receive():
            match statement:
                case Offer(job):
                    self._asked -= 1
                    self._take_on(job)
                case Exhausted():
                    self._handle(m.NoMore())
                case Stop():
                    self.stop()
                case Withdrawn(number, why, pruned):
                    if pruned:
                        self._pruned.add(number)
                    self._handle(m.Cancel(number, why))
                case Reply(number, what):
                    self._answer(number, messages.Answer(what))

    def _take_on(self, job: Job) -> None:
        self._jobs[job.number] = job
        self._attempts.add(job)
        self._handle(m.Arrived(job.number))

    def _answer(self, number: int, answer: messages.Answer) -> None:
        job = self._live.get(number)
        if job is not None and job.started is not None:  # or it is about an attempt before this one
            # No room: it does not listen. Closed: it has ended, and the news of that is on the way.
            with contextlib.suppress(BlockingIOError, ChannelClosedError):
                messages.send(job.process.job, answer, wait=False)

    def _on_server(self) -> None:
        died = False
        try:
            message = self._server.receive()
        except ServerDiedError:
            died = True
        if died:  # outside of the handler, or what a new fork server prints would begin with this one's death
            self._replace_server()
            return
        # Otherwise it managed to report its job's end before it died.
        if message is not None and (job := self._live.get(message.number)) is not None:
            job.problem = message.problem
            job.final = not message.started
            job.unsupervised = message.started
            self._ended(message.number)

    def _replace_server(self) -> None:
        self._selector.unregister(self._server.fileno())
        self._handle(m.ServerLost())
        self._servers_lost += 1
        if self._servers_lost == MOST_SERVERS:
            self._give_up(
                f"was not run: the fork server was killed {MOST_SERVERS} times (`dmesg` may know why), and without one "
                "no job can be started"
            )
        elif self._servers_lost == 2 and not self._any_prepared:
            self._give_up(
                "was not run: the fork server ends as soon as it is started, for the reason it printed, or is killed"
            )
        else:
            self._server.restart(self._forget_in_child)
            self._watch(self._server.fileno(), self._on_server)
        unstarted, self._unstarted = [*self._unstarted, *self._postponed], []
        self._postponed.clear()
        for number in [number for number, job in self._live.items() if job.unsupervised]:
            self._ended(number)
        for number in unstarted:
            self._handle(m.Exited(number))

    def _forget_in_child(self) -> None:
        """In a forked server: leases, tickets and channels are the launching program's alone."""
        self._pool.close_in_child()
        if self._source is not None:
            self._source.close_in_child()
        for job in self._live.values():
            job.process.close()
        self._selector.close()

    def _on_supervisor(self, number: int) -> None:
        job = self._live[number]
        try:
            message, _ = messages.receive(job.process.supervisor)
        except ChannelClosedError:
            # It was killed. The fork server ends what it leaves and tells us, unless that was killed, too.
            job.problem = SUPERVISOR_DIED
            job.unsupervised = True
        else:
            assert isinstance(message, messages.Exited), message
            job.status = message.status
            job.printed = message.printed.decode(errors="replace").strip()
            job.unsupervised = message.abandoned
            job.left_behind = message.left_behind
        if job.unsupervised and job.server == self._servers_lost:
            self._selector.unregister(job.process.supervisor)
        else:
            self._ended(number)

    def _on_job(self, number: int) -> None:
        job = self._live[number]
        try:
            message, _ = messages.receive(job.process.job)
        except ChannelClosedError:
            self._selector.unregister(job.process.job)  # its supervisor will say more
            return
        match message:
            case messages.Prepared(request, log, pid, options):
                job.pid = pid
                if log is not None:
                    self._choose_log(job, number, message)
                if options is not None:
                    self._take_options(number, job, options)
                request = self._attempts.request(number, request)
                self._any_prepared = True
                self._checkpoint("prepared")
                self._handle(m.Prepared(number, request, self._pool.refusal(request)))
            case messages.Said(what):
                if self._source is not None:
                    self._source.on_message(number, what)
            case messages.ResultWritten() | messages.ResultLost():
                self._note_result(job, message)
            case _:
                raise TypeError(f"a job says {message!r}")

    def _choose_log(self, job: Running, number: int, prepared: messages.Prepared) -> None:
        job.log, notices = self._log_file(number, prepared)
        for text in notices:
            self._progress.handle(Notice(self._clock(), text))
        with contextlib.suppress(ChannelClosedError):  # its supervisor will say more
            messages.send(job.process.job, messages.LogFile(job.log))

    def _take_options(self, number: int, job: Running, options: JobOptions) -> None:
        """Note what a job has of its own, and say once of each option that it cannot have it."""
        job.device_environment = options.device_environment
        self._attempts.follow(number, options.failures)
        names = {text: text.partition("=")[0] for text in options.ignored}
        new = [text for text in options.ignored if names[text] not in self._ignored]
        if not new:
            return
        self._ignored.update(names.values())
        label = self._jobs[number].label
        whose = f"job {number} ({label})" if label else f"job {number}"
        belongs, it = ("belongs", "it") if len(new) == 1 else ("belong", "them")
        self._progress.handle(
            Notice(
                self._clock(),
                f"ignored: {', '.join(new)} of {whose} {belongs} to the sweep as a whole. "
                f"Set {it} on the command line or in the main config",
            )
        )

    def _hear_the_last(self, number: int, job: Running) -> None:
        """Take what a job has said and nobody has read before its end was known."""
        if job.process.job.fileno() not in self._selector.get_map():
            return  # there is no more
        job.process.job.setblocking(False)
        with contextlib.suppress(BlockingIOError, ChannelClosedError):
            while True:
                message, _ = messages.receive(job.process.job)
                if isinstance(message, messages.Said) and self._source is not None:
                    self._source.on_message(number, message.what)
                elif isinstance(message, (messages.ResultWritten, messages.ResultLost)):
                    self._note_result(job, message)

    def _note_result(self, job: Running, message: messages.ResultWritten | messages.ResultLost) -> None:
        if isinstance(message, messages.ResultWritten):
            job.report_digest = message.digest
        else:
            job.problem = f"could not write its result: {message.problem}"
            job.final = True

    def _ended(self, number: int) -> None:
        job = self._live.pop(number)
        self._hear_the_last(number, job)
        job.ended = self._clock()
        for end in (job.process.supervisor, job.process.job):
            if end.fileno() in self._selector.get_map():
                self._selector.unregister(end)
        if job.status is None or job.unsupervised:
            job.process.close()
        else:
            self._server.finished(job.process)
        self._dead[number] = job
        self._checkpoint("exited")
        self._start_postponed()
        self._handle(m.Exited(number))
        self._dead.pop(number, None)  # still there if it is to be started again

    # What to do

    def _handle(self, stimulus: m.Stimulus) -> None:
        """Carry out what the machine decides upon a stimulus, and upon those that follow from it."""
        assert not self._handling, f"{stimulus} while another stimulus is handled"
        self._handling = True
        self._stimuli.append(stimulus)
        while self._stimuli or self._conclusions:
            if self._stimuli:
                for instruction in self._machine.handle(self._stimuli.popleft(), self._clock()):
                    self._carry_out(instruction)
            else:
                self._conclude(self._conclusions.popleft())
        self._handling = False

    def _carry_out(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.StartProcess(number):
                self._start(number)
            case m.TakeTicket(number, request):
                self._take_ticket(number, request)
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
        self._dead.pop(number, None)  # its attempt before this one
        try:
            job, attempt = self._jobs[number], self._attempts[number]
            report, title = self._report_path(number), self._title(job)
            process = self._server.start(number, job.spec, report, attempt, job.about, title)
        except ServerDiedError:
            self._unstarted.append(number)  # its descriptor says so, too, and then it is replaced
            return
        except OSError as error:
            if self._live and error.errno in (errno.EMFILE, errno.ENFILE):
                self._postponed[number] = _not_started(error)
            else:
                self._stimuli.append(m.Exited(number, _not_started(error)))
            return
        self._live[number] = Running(process, server=self._servers_lost, oom_kills=oom_kills())
        self._watch(process.supervisor.fileno(), lambda: self._on_supervisor(number))
        self._watch(process.job.fileno(), lambda: self._on_job(number))
        self._checkpoint("started")

    def _start_postponed(self) -> None:
        """A job has ended, and there may be descriptors for those that wait for some."""
        postponed, self._postponed = self._postponed, {}
        for number in postponed:
            self._start(number)

    def _take_ticket(self, number: int, request: Request) -> None:
        self._live[number].request = request
        self._pool.wait_for(number)
        self._claim()

    def _drop_ticket(self, number: int) -> None:
        self._pool.drop(self._live.get(number) or self._dead[number])

    def _claim(self) -> None:
        """Ask for the lease of the waiting ticket, if there is one."""
        number = self._pool.waiting
        if number is None or not self._pool.ready:
            return
        job = self._live[number]
        try:
            if job.ticket is None:
                self._pool.enqueue(job, self._jobs[number])
                self._checkpoint("queued")
            job.lease = self._pool.claim(job, self._jobs[number], self._live.values())
        except PoolDirectoryError as error:
            # What runs may run; the rest waits for the directory to be mended, and gives up only if nothing runs.
            if not self._pool.bears(error) and not self._machine.running():
                self._give_up(f"was not run: {error}")
            return
        if job.lease is None:
            return
        job.devices = tuple(self._pool.devices[uuid] for uuid in job.lease.uuids)
        job.shares = job.lease.shares
        self._checkpoint("claimed")
        self._stimuli.append(m.Granted(number))

    def _give_up(self, problem: str) -> None:
        self._progress.handle(GaveUp(self._clock(), problem))
        self._stimuli.append(m.GiveUp(problem))

    def _go(self, number: int) -> None:
        if self._source is not None:
            self._source.tick()  # whoever wanted the job may be no more: perhaps that is why there are devices for it
        job = self._live[number]
        job.started = self._clock()
        device_environment = job.device_environment or self._device_environment
        if self._by_uuid:
            device_environment = replace(device_environment, by_uuid=True)
        shares = {} if job.lease is None else job.lease.shares
        grant = messages.Grant(
            device_environment.variables(job.devices, shares, os.environ),
            device_environment.cpus(job.devices, frozenset(os.sched_getaffinity(0))),
        )
        lease = () if job.lease is None else (job.lease.fileno(),)
        self._tell(number, lambda process: process.grant(grant, lease))
        self._checkpoint("granted")
        self._progress.handle(JobStarted(job.started, number, self._jobs[number].label, job.devices, job.log, job.pid))
        if self._source is not None:
            self._source.started(self._jobs[number], job.devices, job.log)

    def _tell(self, number: int, say: Callable[[JobProcess], None]) -> None:
        job = self._live.get(number)
        if number in self._postponed:  # it is to end, and has not begun
            self._stimuli.append(m.Exited(number, self._postponed.pop(number)))
        if job is None:
            return  # it ended just now
        with contextlib.suppress(ChannelClosedError):  # it has ended, and the news of that is on the way
            say(job.process)

    def _release(self, number: int) -> None:
        job = self._dead[number]
        assert job.lease is not None
        self._pool.release(job.lease)
        job.lease = None
        self._checkpoint("released")
        self._claim()

    def _conclude(self, conclusion: m.Conclude) -> None:
        number = conclusion.number
        ran = self._dead.pop(number, None)
        if self._jobs[number].about is not None:
            with contextlib.suppress(OSError):  # it is small, and its name is no other job's
                rank_decisions.withdraw(rank_decisions.path_for(self._report_path(number)))
        result = judge(
            self._jobs[number],
            ran,
            None if ran is None else self._read_report(number, ran),
            stopped=conclusion.stopped,
            problem=conclusion.problem,
            timed_out=conclusion.timed_out,
            faults={device.label: self._pool.faults[device.uuid] for device in ran.devices} if ran else None,
            attempts=self._attempts[number],
            cancelled=conclusion.cancelled,
        )
        if ran is not None and not conclusion.refused and self._run_again(result, ran):
            return
        if not self._machine.takes_more and (ran is None or ran.started is None):
            result = self._attempts.latest_failure(number) or result  # which it was to make good
        if result.outcome is Outcome.CANCELLED and number in self._pruned:
            result = replace(result, outcome=Outcome.PRUNED)
        if result.outcome is Outcome.CANCELLED and self._stopped_by is not None:
            result = replace(result, message=f"was stopped because of {self._stopped_by}", payload=None)
        failed = result.outcome is Outcome.FAILED
        self._progress.handle(
            JobEnded(
                time=self._clock(),
                number=number,
                label=result.label,
                devices=result.devices,
                outcome=result.outcome,
                duration=result.duration,
                message=result.message if failed else None,
                log=result.log,
                left_behind=ran.left_behind if ran is not None else (),
                origin=result.origin,
            )
        )
        if ran is not None and ran.left_behind and result.outcome is not Outcome.CANCELLED:
            text = f"{job_name(number, result.label)} left processes behind, which were ended: {_some(ran.left_behind)}"
            self._progress.handle(Notice(self._clock(), text))
        self._checkpoint("concluded")
        if self._source is None:
            self._results[number] = result
        else:
            self._source.ended(result)
            self._forget(number)
        if failed:
            self._count_failure()

    def _forget(self, number: int) -> None:
        """A source may have any number of jobs, so that nothing may be kept of those that have ended."""
        del self._jobs[number]
        self._pruned.discard(number)
        self._attempts.forget(number)
        self._machine.forget(number)

    def _run_again(self, result: JobResult, ran: Running) -> bool:
        """Run a job that failed once more, if that is wanted, possible, and of any use."""
        # What is known of the machine now, not when the job ended: the sweep may have been given up since.
        if result.outcome is not Outcome.FAILED or not self._machine.takes_more:
            return False
        attempt = self._attempts.next(result, ran, self._pool.refusal_now)
        if attempt is None:
            return False
        number = result.number
        event = JobRetried(
            time=self._clock(),
            number=number,
            label=result.label,
            duration=result.duration,
            message=result.message or "failed",
            log=set_aside(result.log, result.attempts) if result.log else None,
            attempt=attempt.number,
            attempts=attempt.most,
        )
        self._progress.handle(event)
        with contextlib.suppress(OSError):  # the next one is written over it
            self._report_path(number).unlink()
        self._checkpoint("retried")
        self._stimuli.append(m.Again(number, last=attempt.patient))
        return True

    def _count_failure(self) -> None:
        self._failed += 1
        if self._failed == self._failures.most and self._machine.takes_more and not self._machine.finished:
            self._stopped_by = count(self._failed, "failure")
            running = len(self._machine.running())
            stopping = Stopping(self._clock(), running, self._limits.grace, forced=False, signal=self._stopped_by)
            self._progress.handle(stopping)
            self._stimuli.append(m.StopAsked())

    def _read_report(self, number: int, ran: Running) -> Report | None:
        try:
            return read_report(self._report_path(number), ran.report_digest)
        except FileNotFoundError:
            return None
        except ReportError as error:
            ran.problem = ran.problem or f"left a result that cannot be used: {error}"
            return None


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _not_started(error: OSError) -> str:
    if error.errno != errno.EMFILE:
        return f"could not be started: {error.strerror} (see `ulimit -a`)"
    return (
        "could not be started: its launching program has too many open files. Remedy: raise the limit (`ulimit -n`), "
        "or let fewer run at the same time"
    )
