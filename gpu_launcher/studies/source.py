"""A study session in a process of its own, as the source of a loop's jobs.

In the launching program sampling would stop the loop for as long as it takes, and would start the threads of numerical
libraries, after which the fork server could not be started anew. The process is forked from the program, so that
whatever the program has, the session has. It ends with the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError

from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.model import Device
from gpu_launcher.processes.forking import internal_fork
from gpu_launcher.processes.linux import die_with_parent, flush_c_streams
from gpu_launcher.processes.messages import ChannelClosedError, channel, receive, send
from gpu_launcher.studies.interruption import SIGNAL, Interruption, SamplingInterrupted
from gpu_launcher.studies.stopping import Exhausted
from gpu_launcher.studies.storage_retry import StorageRetry
from gpu_launcher.studies.study_session import (
    AskedTrial,
    SearchSummary,
    StudyError,
    StudySession,
    TrialEnding,
    UnusablePoint,
)
from gpu_launcher.studies.trial import TrialSeen
from gpu_launcher.studies.voices import Attribute, Intermediate, Verdict

LOOK = 2.0
"""Seconds between two looks at whether somebody else has ended a trial."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The session is ready."""

    expected: int | None
    remarks: list[str]


@dataclass(frozen=True, slots=True)
class _Ask:
    count: int


@dataclass(frozen=True, slots=True)
class _Started:
    number: int
    devices: list[str]
    directory: str | None
    log: str | None


@dataclass(frozen=True, slots=True)
class _Heard:
    number: int
    what: Any


@dataclass(frozen=True, slots=True)
class _Tell:
    number: int
    ending: TrialEnding


@dataclass(frozen=True, slots=True)
class _Close:
    pass


@dataclass(frozen=True, slots=True)
class _Failed:
    error: GpuLauncherError


OpenSession = Callable[[], tuple[StudySession, list[str]]]
"""Called in the process; returns the session and lines for the user."""


class TrialSource:
    """See `gpu_launcher.jobs.source.JobSource`."""

    def __init__(
        self,
        open_session: OpenSession,
        make_job: Callable[[AskedTrial], Job],
        ending: Callable[[JobResult], TrialEnding],
        in_child: Callable[[], None],
        finish: Callable[[StudySession, SearchSummary], list[str]],
        *,
        kill_pruned: bool = False,
    ) -> None:
        """Start the process. `open` then says whether it could open the study.

        `make_job` makes a trial a job, `ending` says what to tell of a job that ended. `in_child` drops, in the
        process, what belongs to the launching program alone; `finish` is called there in the end, and returns lines for
        the user. With `kill_pruned` a trial that is to be pruned is ended, whether it asks or not.
        """
        self._make_job = make_job
        self._ending = ending
        self._kill_pruned = kill_pruned
        self._exhausted = False
        self.failed: str | None = None
        """Why the search ended as a failure, if it did."""
        self._backlog: deque[object] = deque()
        """What could not be sent yet, because the process is busy: it must never be waited for, for it may be waiting
        for us."""
        self._channel, theirs = channel()
        parent = os.getpid()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        flush_c_streams()
        with internal_fork():
            self._pid: int | None = os.fork()
        if self._pid == 0:
            status = 1
            try:
                for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(signum, signal.SIG_IGN)  # the launching program decides
                die_with_parent(parent)
                self._channel.close()
                in_child()
                _use_one_thread()
                optuna.logging.set_verbosity(optuna.logging.WARNING)
                _serve(theirs, open_session, finish)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        theirs.close()

    def open(self) -> Opened:
        """Wait until the study is open. Raises what kept it from being opened: GpuLauncherError."""
        opened = self._receive()
        assert isinstance(opened, Opened), opened
        return opened

    def fileno(self) -> int:
        """See `JobSource`."""
        return self._channel.fileno()

    def receive(self) -> list[s.Statement]:
        """See `JobSource`."""
        message = self._receive()
        match message:
            case AskedTrial():
                return [s.Offer(self._make_job(message))]
            case Exhausted(reason, failed):
                if failed:
                    self.failed = reason
                self._exhausted = True
                return [s.Exhausted(reason)]
            case s.Reply(number, Verdict(prune=True)) if self._kill_pruned:
                return [message, s.Withdrawn(number, "was ended because it was to be pruned", pruned=True)]
            case _:
                statement: s.Statement = message
                return [statement]

    def request_jobs(self, count: int) -> None:
        """See `JobSource`."""
        if not self._exhausted:
            self._send(_Ask(count))

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """See `JobSource`."""
        directory = None if log is None else os.path.dirname(log)  # noqa: PTH120
        self._send(_Started(job.number, [device.label for device in devices], directory, log))

    def on_message(self, number: int, what: Any) -> None:
        """See `JobSource`."""
        self._send(_Heard(number, what))

    def ended(self, result: JobResult) -> None:
        """See `JobSource`."""
        self._send(_Tell(result.number, self._ending(result)))

    def close_in_child(self) -> None:
        """See `JobSource`."""
        self._channel.close()

    def close(self, patience: float | None = None) -> tuple[SearchSummary, list[str]]:
        """Have everything told that has not been, and return what came of it, with lines for the user.

        With `patience`, in seconds, a trial that is being sampled is given up, and StudyError raised after that time;
        None waits for as long as it takes.
        """
        deadline = None if patience is None else time.monotonic() + patience
        hurry = patience is not None
        self._send(_Close())
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            self.tick()
            if hurry and not self._backlog:
                hurry = False
                self._interrupt()
            if deadline is not None and time.monotonic() > deadline:
                raise StudyError(
                    f"the process that asks for trials did not end in {patience:.0f} s; it was killed, and the next "
                    "sweep on the study settles the trials that ran"
                )
            if poll.poll(50 if self._backlog or deadline is not None else None):
                message = self._receive()
                if isinstance(message, tuple):
                    summary, remarks = message
                    self._reap()
                    return summary, remarks

    def _interrupt(self) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, SIGNAL)

    def abandon(self) -> None:
        """End the process at once; trials that run are settled by the next sweep on the study."""
        self._channel.close()
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                # It may be waiting for a database, and a killed writer does that no harm.
                os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        pid, self._pid = self._pid, None
        if pid is not None:
            with contextlib.suppress(ChildProcessError):  # raised if the user's program reaps all children itself
                os.waitpid(pid, 0)

    def tick(self) -> None:
        """See `JobSource`."""
        try:
            while self._backlog:
                send(self._channel, self._backlog[0], wait=False)
                self._backlog.popleft()
        except BlockingIOError:
            return
        except ChannelClosedError:
            raise self._died() from None

    def _send(self, message: object) -> None:
        self._backlog.append(message)
        self.tick()

    def _receive(self) -> Any:
        try:
            message, _ = receive(self._channel)
        except ChannelClosedError:
            raise self._died() from None
        if isinstance(message, _Failed):
            raise message.error
        return message

    def _died(self) -> StudyError:
        return StudyError(
            "the process that asks for trials has ended, for the reason it printed, or was killed (`dmesg` may know "
            "why): run the same command again to continue the study"
        )


def _serve(
    channel: socket.socket, open_session: OpenSession, finish: Callable[[StudySession, SearchSummary], list[str]]
) -> None:
    """Be the process."""
    session: StudySession | None = None
    try:
        session, remarks = open_session()
        send(channel, Opened(session.expected, remarks))
        interruption = Interruption()
        session.storage.uninterrupted = interruption.storing
        session.storage.retry = StorageRetry(lambda text: send(channel, s.Remark(text)))
        session.sampling = interruption.sampling
        interruption.listen()
        server = _StudyServer(session, channel, interruption)
        while not server.closed:
            server.work()
        session.close()
        summary = session.summary()
        send(channel, (summary, _report(session, summary, finish)))
    except ChannelClosedError:
        return  # the launching program has ended, and with it its jobs
    except Exception as error:  # of a sampler, a storage, or the user's search space: anything
        failed = error if isinstance(error, GpuLauncherError) else None
        if failed is None:
            traceback.print_exc()
            failed = StudyError(f"the search ended: {type(error).__name__}: {error}")
        if session is not None and not isinstance(error, StorageInternalError):  # borne for as long as anything is
            _tell_the_rest(session)
        with contextlib.suppress(ChannelClosedError):
            send(channel, _Failed(failed))


def _tell_the_rest(session: StudySession) -> None:
    """After an error, which may be the storage's: what cannot be told now is settled by the next sweep."""
    try:
        session.close()
    except Exception:
        traceback.print_exc()


def _report(
    session: StudySession, summary: SearchSummary, finish: Callable[[StudySession, SearchSummary], list[str]]
) -> list[str]:
    """The search has succeeded, whatever becomes of the words about it."""
    try:
        return finish(session, summary)
    except Exception as error:
        traceback.print_exc()
        return [f"the report on the study could not be made: {type(error).__name__}: {error}"]


def _use_one_thread() -> None:
    """A pool of OpenMP's that has worked in the parent is dead in its fork, and who asks it waits for ever.

    Samplers have no work for many threads, and the jobs want the CPUs.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@dataclass
class _StudyServer:
    """Serves a session: reports and endings first, then one trial at a time."""

    session: StudySession
    channel: socket.socket
    interruption: Interruption
    closed: bool = False
    wanted: int = 0
    cancelled: set[int] = field(default_factory=set)
    facts: tuple[tuple[str, str], ...] = ()
    next_look: float = 0.0
    warm: bool = False
    """Whether what later samples need has been imported."""

    def work(self) -> None:
        """Do what there is to do, or wait for it."""
        messages = self._waiting(0.0 if self.wanted else LOOK)
        reports: dict[int, dict[int, float]] = {}
        for message in messages:
            match message:
                case _Heard(number, Intermediate(step, value)):
                    reports.setdefault(number, {})[step] = value
        self._report(reports)
        for message in messages:
            self._take(message)
        if self.closed:
            return
        if self.wanted:
            self._ask()
        elif not self.warm and self.session.running:
            # While nobody waits for a trial.
            self.warm = True
            self.session.warm_up()
        if (now := self.session.clock()) >= self.next_look:
            self.next_look = now + LOOK
            self._look()

    def _waiting(self, patience: float) -> list[Any]:
        self.interruption.forget()  # what it was for is there to be read
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        messages = []
        while poll.poll(patience * 1000):
            messages.append(receive(self.channel)[0])
            patience = 0.0
        return messages

    def _report(self, reports: dict[int, dict[int, float]]) -> None:
        if not reports:
            return
        ended = self.session.report(reports)
        for number, verdict in self.session.judge(reports.keys() - ended).items():
            if isinstance(verdict, Exception):
                raise verdict
            send(self.channel, s.Reply(number, Verdict(max(reports[number]), verdict)))

    def _take(self, message: Any) -> None:
        match message:
            case _Ask(count):
                self.wanted += count
            case _Started(number, devices, directory, log):
                self.session.started(number, devices, directory, log)
            case _Heard(number, Attribute(name, text)):
                self.session.annotate(number, name, json.loads(text))
            case _Tell(number, ending):
                self.session.tell(number, ending)
                if ending.remarkable:
                    send(self.channel, s.Remark(f"trial {number} failed: it {ending.message}"))
                self._show()
            case _Close():
                self.closed = True

    def _ask(self) -> None:
        try:
            answer = self.session.ask()
        except SamplingInterrupted:
            return  # to close, which is said in the channel
        if isinstance(answer, UnusablePoint):
            send(self.channel, s.Remark(answer.message))
            return  # and ask again, after what has come meanwhile
        self.wanted -= 1
        if isinstance(answer, Exhausted):
            self.wanted = 0
        send(self.channel, answer)

    def _show(self) -> None:
        facts = self.session.facts()
        if facts != self.facts:
            self.facts = facts
            send(self.channel, s.Facts(facts))

    def _look(self) -> None:
        for number in self.session.ended_elsewhere():
            if number not in self.cancelled:
                self.cancelled.add(number)
                send(self.channel, s.Withdrawn(number, "was ended because its trial was ended elsewhere"))


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
