"""Several nodes that share the jobs of one head, and look to it like one node.

Theory of operation. Each node asks for jobs when it has room. The `Dealer` decides which node gets which job, and the
head is asked for as many as the nodes want together. What the nodes report passes through to the head, with the node's
name in its devices.

A node may be lost at any time, and its jobs are dealt again. It counts as lost only when no process of it can be left
(`remote_node.Life`). A node that is asked to end by its engine says so first (`Leaving`): jobs that it ends without a
report are dealt again, too. A node that joins late gets jobs as soon as it asks for them.

The nodes learn that there are no more jobs only when every job has its result. Until then any of them may have to take
the jobs of another.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import GpuLauncherError, NodeDiedError, NodeStartError
from gpu_launcher.jobs.events import (
    GaveUp,
    JobEnded,
    JobReturned,
    JobStarted,
    NodesChanged,
    Notice,
    Outcome,
    StopRequested,
)
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.node import LogFile
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Heard, Message, NodeReady, Opened, Wanted
from gpu_launcher.jobs.source import Exhausted, Offer, Reply, Statement, Stop, Withdrawn
from gpu_launcher.model import Device
from gpu_launcher.nodes.agent_messages import HostedProgram, Leaving, Script, Setup, Timing
from gpu_launcher.nodes.dealer import MAX_MOVES, Ask, Deal, Dealer, Give, MovedTooOften
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.remote_node import Life, RemoteNode
from gpu_launcher.processes import spawn
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.worker import Program
from gpu_launcher.safe_files import make_directories
from gpu_launcher.validation import StartMethod
from gpu_launcher.wording import count, device_counts

_log = get_logger("nodes.node_group")

FIRST_NODE_SECONDS = 10.0
"""Seconds to wait for the first node. Nodes may be in a queue for hours."""
LATECOMER_SECONDS = 2.0
"""Seconds for which a sweep waits for more nodes once it has one."""
MAX_FAILURES = 3
"""Number of times in a row that a lost node is started again in vain."""
LOCAL_END_SECONDS = 5.0
"""Seconds in which the processes below a local node that was killed end by themselves."""
POLL_SECONDS = 0.1


@dataclass
class _Member:
    """A node of the group."""

    name: str
    node: LocalNode | RemoteNode
    devices: tuple[Device, ...] = ()
    """Its devices, once its pool is open."""
    opened: bool = False
    """Whether its pool is open for this run."""
    leaving: bool = False
    """Whether it starts no more jobs."""
    closed: bool = False
    """Whether its run is over, or can never begin."""
    error: GpuLauncherError | None = None
    """What kept its run from beginning, if that is an error of ours."""
    failures: int = 0
    """How many times in a row it was lost before it could run jobs."""
    restart_at: float | None = None
    """When to start it again, in seconds of the monotonic clock. None if it is not to be started."""
    ends_at: float = -math.inf
    """When the processes below a local node that was killed have ended, in seconds of the monotonic clock."""

    @property
    def gone(self) -> bool:
        """Whether no process of the node is left."""
        if isinstance(self.node, RemoteNode):
            return self.node.life is Life.GONE
        return not self.node.is_running and time.monotonic() >= self.ends_at

    @property
    def silent(self) -> bool:
        """Whether the connection to the node is lost."""
        return isinstance(self.node, RemoteNode) and self.node.life is Life.SILENT


class NodeGroup:
    """See the module. Use it like a `LocalNode`."""

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        program: Program,
        directory: Path,
        *,
        method: StartMethod,
        option: str,
        keep: tuple[int, ...],
        log_file: LogFile,
        arguments: Sequence[str],
        timing: Timing = Timing(),  # noqa: B008  (frozen)
    ) -> None:
        """Start all nodes.

        `directory` is the sweep's, which all nodes must see. The other arguments are those of `LocalNode`. Raises
        OptionError if the program cannot be sent to nodes.
        """
        self.early: list[Message] = []
        self.is_running = True
        self._members: dict[str, _Member] = {}
        self._outbox: list[Message] = []
        """Messages for the head that did not come from a node."""
        self._begin: BeginRun | None = None
        self._running: dict[int, JobStarted] = {}
        self._failed = 0
        self._stopping = False
        """Whether the user or failures stopped the run."""
        self._given_up = False
        """Whether no node is left that starts jobs."""
        self._closed = False
        """Whether the head knows that this run is over."""
        self._opened = False
        self._exhausted_told = False
        self._dealer = Dealer()
        self._process = os.getpid()
        self._probe: Path | None = None
        self._epoll = select.epoll()
        self._posted = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable while there is something in the outbox."""
        self._epoll.register(self._posted, select.EPOLLIN)
        self._registered: dict[str, int] = {}
        try:
            self._start(specs, program, directory, method, option, keep, log_file, arguments, timing)
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        specs: Sequence[NodeSpec],
        program: Program,
        directory: Path,
        method: StartMethod,
        option: str,
        keep: tuple[int, ...],
        log_file: LogFile,
        arguments: Sequence[str],
        timing: Timing,
    ) -> None:
        for spec in specs:
            if spec.command is None:  # first: it is forked, and should find as few threads as possible
                node = LocalNode(program, method=method, option=option, keep=keep, log_file=log_file)
                self._members[spec.name] = _Member(spec.name, node)
        remote = [spec for spec in specs if spec.command is not None]
        if remote:
            pickled = spawn.pickled_program(
                HostedProgram(program, log_file), "nodes", "jobs run on other nodes", "run it on this machine"
            )
            setup = Setup(
                timing=timing,
                directory=str(Path.cwd()),
                arguments=tuple(arguments),
                interpreter=spawn.describe_interpreter(pickled, Generators().pickled_globals()),
                script=Script.of_this_program(),
                probe=self._make_probe(directory),
                method=method,
                option=option,
            )
            for spec in remote:
                try:
                    self._members[spec.name] = _Member(spec.name, RemoteNode(spec, setup))
                except OSError as error:
                    raise NodeStartError(f"node {spec.name}: cannot run its command: {error}") from None
        for member in self._members.values():
            self._listen_to(member)

    def _listen_to(self, member: _Member) -> None:
        self._epoll.register(member.node, select.EPOLLIN)
        self._registered[member.name] = member.node.fileno()

    def _make_probe(self, directory: Path) -> tuple[str, bytes]:
        """Write a file that the nodes must see."""
        content = uuid.uuid4().hex.encode()
        self._probe = directory / ".gpu_launcher" / f"probe-{uuid.uuid4().hex[:12]}"
        make_directories(self._probe.parent)
        self._probe.write_bytes(content)
        return str(self._probe), content

    # As a LocalNode

    def wait_until_ready(self) -> None:
        """Do nothing: `open` waits."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive_ready` has something to do."""
        return self._epoll.fileno()

    def open(self) -> Opened:
        """Wait until a node can run jobs, and a moment for the others. Do not wait for long: nodes may join later.

        Raises the error of all nodes, if they have the same one, and else NodeStartError with the reason of each.
        """
        begin, first = time.monotonic(), None
        while True:
            self.early += self._advance(POLL_SECONDS)
            waiting = [member for member in self._members.values() if not member.opened and not member.closed]
            opened = [member for member in self._members.values() if member.opened]
            if opened:
                first = first or time.monotonic()
                if not waiting or time.monotonic() - first > LATECOMER_SECONDS:
                    break
            elif not waiting:
                self._refuse()
            elif time.monotonic() - begin > FIRST_NODE_SECONDS:
                names = ", ".join(member.name for member in waiting)
                self._post([Notice(time.monotonic(), f"waiting for a node: none of {names} is ready yet")])
                break
        self._opened = True
        return Opened(self._devices(), len(self._devices()), "fork")

    def _refuse(self) -> None:
        errors = [member.error for member in self._members.values()]
        problems = {member.name: self._problem(member) for member in self._members.values()}
        self.close()
        if errors and errors[0] is not None and len({str(error) for error in errors}) == 1:
            raise errors[0]
        raise NodeStartError(
            "no node can run jobs: " + "; ".join(f"{name} {problem}" for name, problem in problems.items())
        )

    @staticmethod
    def _problem(member: _Member) -> str:
        if member.error is not None:
            return f"says {member.error}"
        problem = member.node.problem if isinstance(member.node, RemoteNode) else None
        return problem or "has ended"

    def receive_ready(self) -> list[Message]:
        """Return what the nodes have reported."""
        return self._advance(0)

    def tick(self) -> None:
        """Notice silent nodes. What follows is returned by `receive_ready`."""
        self._post(self._look())

    def say(self, what: Statement | BeginRun) -> None:
        """Pass a statement on to the node or nodes that it is about."""
        match what:
            case BeginRun():
                self._begin_run(what)
            case Offer(job):
                self._post(self._carry_out(self._dealer.offered(job)))
            case Exhausted():
                self._dealer.exhaust()
                self._post(self._finish_if_done())
            case Stop():
                self._stopping = True
                for member in self._at_work():
                    self._tell(member, what)
                self._post(self._finish_if_done())
            case Withdrawn(number, why):
                self._withdraw(what, number, why)
            case Reply(number):
                self._tell_node_of(number, what)

    def close(self) -> None:
        """End all nodes. Idempotent."""
        if self._process != os.getpid():
            return
        self.is_running = False
        for member in self._members.values():
            if isinstance(member.node, RemoteNode):
                member.node.ask_to_end()
        with contextlib.ExitStack() as cleanup:
            for member in self._members.values():
                cleanup.callback(member.node.close)
        if self._probe is not None:
            self._probe.unlink(missing_ok=True)
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._posted)

    # A run

    def _begin_run(self, begin: BeginRun) -> None:
        options = begin.options
        self._dealer = Dealer(options.max_parallel)
        self._begin = begin
        self._failed = 0
        self._stopping = self._given_up = self._closed = self._opened = self._exhausted_told = False
        self._running.clear()
        for member in self._members.values():
            if member.gone:
                member.opened, member.closed = False, True
            else:
                self._begin_at(member)

    def _begin_at(self, member: _Member) -> None:
        assert self._begin is not None
        member.opened = member.leaving = member.closed = False
        member.error = None
        options = self._begin.options
        environ = None if isinstance(member.node, RemoteNode) else options.environ
        # Failures are counted here, over all nodes. One node alone cannot say that the cap leaves devices idle.
        failures = replace(options.failures, most=None)
        options = replace(options, failures=failures, cap=None, environ=environ)
        self._tell(member, replace(self._begin, options=options, node=member.name, listed=False))

    def _devices(self) -> tuple[Device, ...]:
        return tuple(
            device
            for member in self._members.values()
            if member.opened and not member.closed
            for device in member.devices
        )

    def _at_work(self) -> list[_Member]:
        return [member for member in self._members.values() if not member.closed and not member.gone]

    def _tell(self, member: _Member, what: Statement | BeginRun) -> None:
        with contextlib.suppress(NodeDiedError):  # noticed where its messages are read
            member.node.say(what)

    def _tell_node_of(self, number: int, what: Statement) -> None:
        node = self._dealer.node_of(number)
        if node is not None:  # otherwise the job has ended meanwhile
            self._tell(self._members[node], what)

    def _post(self, messages: list[Message]) -> None:
        if messages:
            self._outbox += messages
            os.eventfd_write(self._posted, 1)

    def _advance(self, seconds: float) -> list[Message]:
        """Wait at most `seconds` for the nodes, and return what follows from their messages."""
        ready = {descriptor for descriptor, _ in self._epoll.poll(seconds)}
        if self._posted in ready:
            os.eventfd_read(self._posted)
        messages, self._outbox = self._outbox, []
        for member in list(self._members.values()):
            if self._registered.get(member.name) in ready:
                messages += self._read(member)
        return messages + self._look()

    def _read(self, member: _Member) -> list[Message]:
        try:
            arrived = member.node.receive_ready()
        except NodeDiedError as error:
            member.error = member.error or error
            member.ends_at = time.monotonic() + LOCAL_END_SECONDS
            member.node.close()
            return []
        return [passed for message in arrived for passed in self._take(member, message)]

    def _look(self) -> list[Message]:
        """Notice nodes that are lost."""
        messages: list[Message] = []
        for member in self._members.values():
            member.node.tick()
            over = isinstance(member.node, LocalNode) and not member.node.is_running
            if (member.gone or member.silent or over) and member.name in self._registered:
                descriptor = self._registered.pop(member.name)
                with contextlib.suppress(OSError):  # closed, and so removed
                    self._epoll.unregister(descriptor)
            if member.gone and not member.closed:
                messages += self._lose(member)
            if member.restart_at is not None and time.monotonic() >= member.restart_at:
                messages += self._restart(member)
        return messages

    def _take(self, member: _Member, message: Any) -> list[Message]:
        """Return what the head gets of a message from a node."""
        if isinstance(member.node, RemoteNode) and hasattr(message, "time"):
            message = replace(message, time=time.monotonic())  # its clock is another machine's
        match message:
            case NodeReady():
                return []
            case Opened(devices):
                return self._join(member, devices)
            case Wanted(number):
                if member.leaving:
                    return []
                return self._carry_out(self._dealer.wanted(member.name, number))
            case JobStarted(number=number):
                self._running[number] = message
            case Ended(result, event):
                assert event is not None
                return self._end(member, result, replace(event, time=time.monotonic()))
            case Heard():
                pass
            case GaveUp(problem=problem):
                return self._retire(member, f"starts no more jobs: each {problem}")
            case Leaving(why):
                return self._retire(member, f"{why} and ends")
            case StopRequested():
                return []  # the node was told by us
            case Notice(text=text):
                message = replace(message, text=f"{member.name}: {text}")
            case Closed(error):
                return self._close_member(member, error)
        return [message]

    def _join(self, member: _Member, devices: tuple[Device, ...]) -> list[Message]:
        member.opened, member.devices, member.failures = True, devices, 0
        messages: list[Message] = []
        if isinstance(member.node, RemoteNode) and member.node.differs:
            messages.append(Notice(time.monotonic(), f"{member.name}: the program's script is not the same as here"))
        if self._stopping:
            self._tell(member, Stop())
        if self._opened:
            text = f"{member.name} joined with {device_counts(devices)}"
            messages.append(NodesChanged(time.monotonic(), self._devices(), text))
        return messages

    def _retire(self, member: _Member, why: str) -> list[Message]:
        """Give a node no more jobs, and take back those that it ends without a report."""
        member.leaving = True
        self._dealer.leaves(member.name)
        return [Notice(time.monotonic(), f"node {member.name} {why}"), *self._give_up_if_alone()]

    def _end(self, member: _Member, result: JobResult, event: JobEnded) -> list[Message]:
        number = result.number
        self._running.pop(number, None)
        if self._dealer.node_of(number) != member.name:
            return []
        interrupted = result.outcome is Outcome.CANCELLED or (result.outcome is Outcome.FAILED and not result.payload)
        if member.leaving and interrupted and not self._stopping:
            returned = JobReturned(event.time, number, result.label)
            return [returned, *self._carry_out(self._dealer.returned(number)), *self._give_up_if_alone()]
        return self._conclude(result, event)

    def _conclude(self, result: JobResult, event: JobEnded) -> list[Message]:
        deals = self._dealer.ended(result.number)
        messages: list[Message] = [Ended(result, event)]
        if result.outcome is Outcome.FAILED:
            messages += self._count_failure()
        return [*messages, *self._carry_out(deals), *self._finish_if_done()]

    def _count_failure(self) -> list[Message]:
        assert self._begin is not None
        self._failed += 1
        if self._failed != self._begin.options.failures.most or self._stopping:
            return []
        self._stopping = True
        for member in self._at_work():
            self._tell(member, Stop())
        why = count(self._failed, "failure")
        grace = self._begin.options.grace
        return [StopRequested(time.monotonic(), len(self._running), grace, forced=False, signal=why)]

    def _close_member(self, member: _Member, error: GpuLauncherError | None) -> list[Message]:
        """Take note that the run of a node is over. If it was not asked for that, its jobs go to others."""
        member.closed, member.error = True, error
        if error is None:
            return [*self._requeue(member), *self._finish_if_done()]
        why = f"cannot run jobs: {error}"
        return self._drop(member, why)

    def _lose(self, member: _Member) -> list[Message]:
        """Deal the jobs of a node again of which nothing is left, and connect to its machine once more."""
        member.closed = True
        why = self._problem(member)
        if isinstance(member.node, RemoteNode) and self._opened and member.failures < MAX_FAILURES:
            member.restart_at = time.monotonic() + 2.0**member.failures
            member.failures += 1
        return self._drop(member, why)

    def _restart(self, member: _Member) -> list[Message]:
        assert isinstance(member.node, RemoteNode)
        member.restart_at = None
        if self._closed or self._stopping or self._exhausted_told:
            return []
        member.node.close()
        _log.info("%s is started again", member.name)
        try:
            member.node = member.node.again()
        except OSError as error:
            return self._drop(member, f"cannot be started again: {error}")
        self._listen_to(member)
        self._begin_at(member)
        return []

    def _drop(self, member: _Member, why: str) -> list[Message]:
        jobs = len(self._dealer.jobs_at(member.name))
        again = f"; its {count(jobs, 'job')} can run elsewhere" if jobs and not self._stopping else ""
        text = f"node {member.name} {why}{again}"
        _log.warning("%s", text)
        change = NodesChanged(time.monotonic(), self._devices(), text)
        return [change, *self._requeue(member), *self._give_up_if_alone(), *self._finish_if_done()]

    def _requeue(self, member: _Member) -> list[Message]:
        messages: list[Message] = []
        for job in self._dealer.jobs_at(member.name):
            if self._running.pop(job.number, None) is not None:
                messages.append(JobReturned(time.monotonic(), job.number, job.label))
        return messages + self._carry_out(self._dealer.lost(member.name))

    def _give_up_if_alone(self) -> list[Message]:
        """If no node can start jobs any more, say so to the head, which concludes the jobs that are left."""
        if self._closed or self._stopping or self._given_up or not self._opened:
            return []
        if any(not member.leaving for member in self._at_work()) or (self._dealer.idle and self._dealer.exhausted):
            return []
        if any(member.restart_at is not None for member in self._members.values()):
            return []
        self._given_up = True
        reasons = "; ".join(f"{member.name} {self._problem(member)}" for member in self._members.values())
        return [GaveUp(time.monotonic(), f"was not run: no node is left ({reasons})"), *self._finish_if_done()]

    def _finish_if_done(self) -> list[Message]:
        """Let the nodes end their run when every job has its result, and tell the head when they have."""
        if self._closed or self._begin is None:
            return []
        if self._dealer.exhausted and self._dealer.idle and not self._exhausted_told:
            self._exhausted_told = True
            for member in self._at_work():
                self._tell(member, Exhausted())
        if not (self._exhausted_told or self._stopping or self._given_up):
            return []
        # A node that has not opened its pool has no job. After a stop, a silent one ends its jobs by itself.
        if any(member.opened and not (self._stopping and member.silent) for member in self._at_work()):
            return []
        self._closed = True
        return [Closed(None, self._stopping)]

    def _withdraw(self, what: Withdrawn, number: int, why: str) -> None:
        job = self._dealer.withdrawn(number)
        if job is None:
            self._tell_node_of(number, what)
            return
        outcome = Outcome.PRUNED if what.pruned else Outcome.CANCELLED
        self._post(self._conclude(*_unfinished(job, outcome, why, None)))

    def _carry_out(self, deals: list[Deal]) -> list[Message]:
        messages: list[Message] = []
        for deal in deals:
            match deal:
                case Ask(number):
                    messages.append(Wanted(number))
                case Give(node, job):
                    self._tell(self._members[node], Offer(job))
                case MovedTooOften(job):
                    message = f"was not finished: {MAX_MOVES + 1} nodes that ran it were lost"
                    messages += self._conclude(*_unfinished(job, Outcome.FAILED, message, Cause.CRASH))
        return messages


def _unfinished(job: Job, outcome: Outcome, message: str, cause: Cause | None) -> tuple[JobResult, JobEnded]:
    """Return the result of a job that no node has, and the event."""
    attempts = job.attempts_before + 1
    failed = message if outcome is Outcome.FAILED else None
    result = JobResult(job.number, job.label, outcome, None, message, (), None, None, cause, attempts)
    return result, JobEnded(time.monotonic(), job.number, job.label, (), outcome, None, failed, None)
