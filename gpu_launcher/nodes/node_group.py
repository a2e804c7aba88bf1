"""Several nodes that share the jobs of one head, and look to it like one node.

Theory of operation. Each node asks for jobs when it has room. The `Dealer` decides which node gets which job, and the
head is asked for as many as the nodes want together. What the nodes report passes through to the head, with the node's
name in its devices.

A node may be lost at any time, and its jobs are dealt again. It counts as lost only when no process of it can be left
(`remote_node.Life`). A node that is asked to end by its engine says so first (`Leaving`): jobs that it ends without a
report are dealt again, too. A node that joins late gets jobs as soon as it asks for them.

The nodes learn that there are no more jobs only when every job has its result. Until then any of them may have to take
the jobs of another. A group is for one run: a node that waits for the next one could not be told from one that is lost.

Agents end if they hear nothing, so a thread sends signs of life while this one may be busy. Another thread renews the
time of a file in the sweep's directory, by which another launch sees that agents of this one may still run. It may wait
for the file system, and the signs of life must not.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import GpuLauncherError, NodeDiedError, NodeStartError, ReportError
from gpu_launcher.jobs.directory import sign_of_nodes
from gpu_launcher.jobs.events import (
    GaveUp,
    JobRetried,
    JobReturned,
    JobStarted,
    NodesChanged,
    Notice,
    Outcome,
    StopRequested,
)
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.node_client import LocalNode, harmless_thread
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Heard, Message, NodeReady, Opened, Wanted
from gpu_launcher.jobs.outcome import left_by
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.jobs.source import Cancel, Exhausted, Offer, Reply, Statement, Stop
from gpu_launcher.model import Device
from gpu_launcher.nodes.agent_messages import HostedProgram, Leaving, Script, Setup, Timing
from gpu_launcher.nodes.dealer import MAX_MOVES, Ask, Deal, Dealer, Give, MovedTooOften, TakeBack
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.remote_node import Life, RemoteNode, end_all
from gpu_launcher.processes import spawn
from gpu_launcher.processes.messages import INTERRUPTED, Report
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.safe_files import make_directories, write_whole
from gpu_launcher.validation import StartMethod
from gpu_launcher.wording import count, device_counts

_log = get_logger("nodes.node_group")

FIRST_NODE_SECONDS = 10.0
"""Seconds to wait for the first node. Nodes may be in a queue for hours."""
LATECOMER_SECONDS = 2.0
"""Seconds for which a sweep waits for more nodes once it has one."""
LATE_SECONDS = 10.0
"""Seconds after which a job that was not started goes to any node that is idle, even to one that has lost it."""
MAX_FAILURES = 3
"""Number of times in a row that a node is started again without having completed a job."""
LOCAL_END_SECONDS = 5.0
"""Seconds in which the processes below a local node that was killed end by themselves."""
POLL_SECONDS = 0.1


@dataclass
class _Member:
    """A node of the group."""

    name: str
    node: LocalNode | RemoteNode
    at_once: int = 0
    """How many jobs it can run at the same time, as far as it knows."""
    devices: tuple[Device, ...] = ()
    """Its devices, once its pool is open."""
    opened: bool = False
    """Whether its pool is open for this run."""
    leaving: bool = False
    """Whether it starts no more jobs."""
    interrupted: bool = False
    """Whether its agent was asked to end, and has interrupted its jobs."""
    joined: bool = False
    """Whether its pool was ever open."""
    closed: bool = False
    """Whether its run is over, or can never begin."""
    error: GpuLauncherError | None = None
    """What kept its run from beginning, if that is an error of ours."""
    why: str | None = None
    """Why it starts no more jobs, as a sentence without its subject."""
    gave_up: bool = False
    """Whether it cannot start jobs any more, as when its fork server was killed again and again."""
    failures: int = 0
    """How many times it was started again since it completed a job."""
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
    def unreachable(self) -> bool:
        """Whether the node has not been heard for a while."""
        return self.silent or (isinstance(self.node, RemoteNode) and self.node.quiet)

    @property
    def silent(self) -> bool:
        """Whether the connection to the node is lost."""
        return isinstance(self.node, RemoteNode) and self.node.life is Life.SILENT


class NodeGroup:
    """See the module. Use it like a `LocalNode`."""

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        local: Callable[[], LocalNode],
        program: HostedProgram,
        directory: Path | None,
        *,
        method: StartMethod,
        option: str,
        arguments: Sequence[str],
        imports_script: bool,
        timing: Timing = Timing(),  # noqa: B008  (frozen)
    ) -> None:
        """Start all nodes. There may be none, for a run without jobs.

        `directory` is the sweep's, which all nodes must see. If it is None, reports of jobs stay on their machines:
        that is for jobs that tell the head in messages what becomes of them. `local` starts the node on this machine,
        if it is one of them. The other arguments are those of `start_nodes`, and it raises the same errors.
        """
        self.early: list[Message] = []
        self.is_running = True
        self._members: dict[str, _Member] = {}
        self._outbox: list[Message] = []
        """Messages for the head that did not come from a node."""
        self._begin: BeginRun | None = None
        self._running: dict[int, JobStarted] = {}
        self._since: dict[int, float] = {}
        """Since when each job waits to be started: at no node, or at the one to which it was offered."""
        self._refusals: dict[int, JobResult] = {}
        """What becomes of jobs whose requests some nodes can never grant, if the other nodes cannot either."""
        self._taking: set[int] = set()
        """Jobs that their nodes are asked to give back if they have not started them."""
        self._attempts: dict[int, tuple[int, int]] = {}
        """How often each job was started, over all launches, and how many of its attempts failed in this one."""
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
        self._cancelled: dict[int, Cancel] = {}
        """Statements that jobs are to be ended, by number. They also hold for a node that gets the job later."""
        self._probe: Path | None = None
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._epoll = select.epoll()
        self._posted = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable while there is something in the outbox."""
        self._epoll.register(self._posted, select.EPOLLIN)
        self._registered: dict[str, int] = {}
        self._replaced: list[RemoteNode] = []
        """Connections to lost nodes, whose commands may still run."""
        try:
            self._start(specs, local, program, directory, method, option, arguments, imports_script, timing)
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        specs: Sequence[NodeSpec],
        local: Callable[[], LocalNode],
        program: HostedProgram,
        directory: Path | None,
        method: StartMethod,
        option: str,
        arguments: Sequence[str],
        imports_script: bool,
        timing: Timing,
    ) -> None:
        for spec in specs:
            if spec.command is None:  # first: it is forked, and should find as few threads as possible
                self._members[spec.name] = _Member(spec.name, local())
        remote = [spec for spec in specs if spec.command is not None]
        if remote:
            nodes = option.replace("start_method", "nodes")  # as the user writes it
            pickled = spawn.pickled_program(program, nodes, "jobs run on other nodes", "run it on this machine")
            setup = Setup(
                timing=timing,
                directory=str(Path.cwd()),
                arguments=tuple(arguments),
                interpreter=spawn.describe_interpreter(pickled, Generators().pickled_globals()),
                script=Script.of_this_program() if imports_script else None,
                probe=None if directory is None else self._make_probe(directory),
                method=method,
                option=option,
            )
            for spec in remote:
                try:
                    self._members[spec.name] = _Member(spec.name, RemoteNode(spec, setup, captured=program.captured))
                except OSError as error:
                    raise NodeStartError(f"node {spec.name}: {spec.why_not_executed(error)}") from None
            for main in (self._beat,) if self._probe is None else (self._beat, self._touch):
                name = f"gpu-launcher-nodes-{main.__name__.strip('_')}"
                thread = threading.Thread(target=main, args=(timing.beat,), daemon=True, name=name)
                thread.start()
                self._threads.append(thread)
        for member in self._members.values():
            self._listen_to(member)

    def _beat(self, seconds: float) -> None:
        """Send signs of life until the group is closed. Never waits for anything else."""
        with harmless_thread():
            while not self._over.wait(seconds):
                for member in self._members.values():
                    if isinstance(member.node, RemoteNode):
                        member.node.beat()

    def _touch(self, seconds: float) -> None:
        """Renew the time of the file in the sweep's directory until the group is closed. May wait for a file server."""
        assert self._probe is not None
        with harmless_thread():
            while not self._over.wait(seconds):
                with contextlib.suppress(OSError):
                    os.utime(self._probe)

    def _listen_to(self, member: _Member) -> None:
        self._epoll.register(member.node, select.EPOLLIN)
        self._registered[member.name] = member.node.fileno()

    def _make_probe(self, directory: Path) -> tuple[str, bytes]:
        """Write a file that the nodes must see."""
        content = uuid.uuid4().hex.encode()
        self._probe = sign_of_nodes(directory)
        make_directories(self._probe.parent)
        write_whole(self._probe, content)
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
        waiting: list[_Member] = []
        opened: list[_Member] = []
        while self._members:
            self.early += self._advance(POLL_SECONDS)
            waiting = [
                member
                for member in self._members.values()
                if (not member.opened and not member.closed) or member.restart_at is not None
            ]
            opened = [member for member in self._members.values() if member.opened and not member.closed]
            if opened:
                first = first or time.monotonic()
                if not waiting or time.monotonic() - first > LATECOMER_SECONDS:
                    break
            elif not waiting:
                self._refuse()
            elif time.monotonic() - begin > FIRST_NODE_SECONDS:
                break
        if waiting:
            self._post([Notice(time.monotonic(), _not_ready([member.name for member in waiting], bool(opened)))])
        self._opened = True
        if self._members:  # a group without nodes is for a run without jobs
            self._post(self._give_up_if_alone())
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
        if member.why is not None:
            return member.why
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
                self._stop_nodes()
                self._post(self._finish_if_done())
            case Cancel(number):
                self._cancelled[number] = what
                self._post(self._cancel(number))
            case Reply(number):
                self._tell_node_of(number, what)

    def close(self) -> None:
        """End all nodes. Idempotent."""
        if self._process != os.getpid():
            return
        self.is_running = False
        self._over.set()
        remote = [member.node for member in self._members.values() if isinstance(member.node, RemoteNode)]
        remote += self._replaced
        with contextlib.ExitStack() as cleanup:
            for member in self._members.values():
                cleanup.callback(member.node.close)
            for node in self._replaced:
                cleanup.callback(node.close)
            end_all(remote)
        for thread in self._threads:
            thread.join()
        if self._probe is not None and all(node.nothing_left for node in remote):
            self._probe.unlink(missing_ok=True)
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._posted)

    # A run

    def _begin_run(self, begin: BeginRun) -> None:
        options = begin.options
        self._dealer = Dealer(options.max_parallel)
        self._begin = begin
        for member in self._members.values():
            self._begin_at(member)

    def _begin_at(self, member: _Member) -> None:
        assert self._begin is not None
        member.opened = member.leaving = member.interrupted = member.closed = False
        member.error = member.why = None
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
            if member.silent or over:
                messages += self._carry_out(self._dealer.leaves(member.name))
            if (member.gone or member.silent or over) and member.name in self._registered:
                descriptor = self._registered.pop(member.name)
                with contextlib.suppress(OSError):  # closed, and so removed
                    self._epoll.unregister(descriptor)
                messages += self._note_silence(member)
        for member in self._members.values():  # only now: a new connection may get a descriptor that was closed
            if member.gone and not member.closed:
                messages += self._lose(member)
            if member.restart_at is not None and time.monotonic() >= member.restart_at:
                messages += self._restart(member)
        messages += self._deal_late()
        messages += self._conclude_refused()
        for node in list(self._replaced):
            node.tick()
            if node.command_ended:
                node.close()
                self._replaced.remove(node)
        return messages

    def _note_silence(self, member: _Member) -> list[Message]:
        """If the connection to a node is lost, say how long its jobs may still run there."""
        jobs = [job for job in self._dealer.jobs_at(member.name) if job.number in self._running]
        if not member.silent or not jobs or self._stopping:
            return []
        assert isinstance(member.node, RemoteNode)
        may = f"its {count(len(jobs), 'job')} may still run there for {member.node.seconds_left:.0f} s"
        return [Notice(time.monotonic(), f"node {member.name} lost its connection: {may}, and can run elsewhere then")]

    def _deal_late(self) -> list[Message]:
        """Deal jobs that have waited long to nodes that are idle."""
        now = time.monotonic()
        for job in self._dealer.waiting:
            self._since.setdefault(job.number, now)
        late = [number for number, since in self._since.items() if since <= now - LATE_SECONDS]
        if not late or self._stopping:
            return []
        at_once = {member.name: member.at_once for member in self._members.values()}
        return self._carry_out(self._dealer.deal_late(late, at_once))

    def _conclude_refused(self) -> list[Message]:
        """Fail jobs whose requests no node can grant. A node that is not there yet may be able to."""
        if not self._refusals or self._stopping:
            return []
        may_run = {member.name for member in self._members.values() if not (member.leaving or member.closed)}
        may_run |= {
            member.name
            for member in self._members.values()
            if member.restart_at is not None or self._will_return(member)
        }
        messages: list[Message] = []
        for job in self._dealer.refused_by_all(may_run):
            messages += self._conclude(self._refusals[job.number])
        return messages

    def _take(self, member: _Member, message: Any) -> list[Message]:
        """Return what the head gets of a message from a node."""
        if isinstance(member.node, RemoteNode) and hasattr(message, "time"):
            message = replace(message, time=time.monotonic())  # its clock is another machine's
        match message:
            case NodeReady():
                return []
            case Opened(devices, at_once):
                member.at_once = at_once
                return self._join(member, devices)
            case Wanted(number):
                if member.leaving or self._stopping or self._given_up:
                    return []
                return self._carry_out(self._dealer.wanted(member.name, number))
            case JobStarted():
                if isinstance(member.node, RemoteNode):
                    message = replace(message, pid=None)  # it is a process of another machine
                return self._note_start(message)
            case JobRetried():
                return self._note_retry(message)
            case Ended(result):
                return self._end(member, result)
            case Heard():
                pass
            case GaveUp(problem=problem):
                member.gave_up = True
                return self._retire(member, f"starts no more jobs. Each {problem}")
            case Leaving(why):
                member.interrupted = True
                return self._retire(member, f"{why} and ends")
            case StopRequested():
                return []  # the node was told by us
            case Notice(text=text):
                message = replace(message, text=f"{member.name}: {text}")
            case Closed(error):
                return self._close_member(member, error)
        return [message]

    def _join(self, member: _Member, devices: tuple[Device, ...]) -> list[Message]:
        member.opened = member.joined = True
        member.devices = devices
        messages: list[Message] = []
        if isinstance(member.node, RemoteNode) and member.node.differs:
            messages.append(Notice(time.monotonic(), f"{member.name}: the program's script is not the same as here"))
        if self._stopping:
            self._tell(member, Stop())
        if self._exhausted_told:
            self._tell(member, Exhausted())
        if self._opened:
            text = f"{member.name} joined with {device_counts(devices)}"
            messages.append(NodesChanged(time.monotonic(), self._devices(), text))
        return messages

    def _retire(self, member: _Member, why: str) -> list[Message]:
        """Give a node no more jobs, and take back those that it ends without a report."""
        member.leaving, member.why = True, why
        notice = Notice(time.monotonic(), f"node {member.name} {why}")
        return [notice, *self._carry_out(self._dealer.leaves(member.name)), *self._give_up_if_alone()]

    def _end(self, member: _Member, result: JobResult) -> list[Message]:
        number = result.number
        self._running.pop(number, None)
        if self._dealer.node_of(number) != member.name:
            return []
        self._since.pop(number, None)
        taken_back = number in self._taking
        self._taking.discard(number)
        if result.outcome in (Outcome.COMPLETED, Outcome.PRUNED):
            member.failures = 0
        killed = result.cause is Cause.CRASH or not (result.payload or result.cause is Cause.TIMEOUT)
        # Many programs turn SIGTERM into an exception.
        failed = result.outcome is Outcome.FAILED and (member.interrupted or killed)
        interrupted = failed or result.outcome is Outcome.CANCELLED
        if member.leaving and interrupted and not self._stopping and number not in self._cancelled:
            self._remove_report(number)
            returned = JobReturned(time.monotonic(), number, result.label)
            return [returned, *self._carry_out(self._dealer.returned(number)), *self._give_up_if_alone()]
        if taken_back and result.outcome is Outcome.CANCELLED and not self._stopping and number not in self._cancelled:
            return self._carry_out(self._dealer.taken(number))
        if result.refused and not self._stopping and number not in self._cancelled:
            self._refusals[number] = result
            return [*self._carry_out(self._dealer.refused(number)), *self._conclude_refused()]
        return self._conclude(result)

    def _conclude(self, result: JobResult) -> list[Message]:
        self._cancelled.pop(result.number, None)
        self._running.pop(result.number, None)
        self._attempts.pop(result.number, None)
        self._refusals.pop(result.number, None)
        self._since.pop(result.number, None)
        messages: list[Message] = [Ended(result)]
        if result.outcome is Outcome.FAILED:
            messages += self._count_failure()  # first: it may stop the dealing
        return [*messages, *self._carry_out(self._dealer.ended(result.number)), *self._finish_if_done()]

    def _count_failure(self) -> list[Message]:
        assert self._begin is not None
        self._failed += 1
        if self._failed != self._begin.options.failures.most or self._stopping:
            return []
        self._stop_nodes()
        why = count(self._failed, "failure")
        grace = self._begin.options.grace
        return [StopRequested(time.monotonic(), len(self._running), grace, forced=False, signal=why)]

    def _stop_nodes(self) -> None:
        """Interrupt the jobs of all nodes, unless that has been done. The second call kills them."""
        forced, self._stopping = self._stopping, True
        self._dealer.stop()
        for member in self._at_work():
            if forced or not member.interrupted:
                self._tell(member, Stop())

    def _close_member(self, member: _Member, error: GpuLauncherError | None) -> list[Message]:
        """Take note that the run of a node is over. If it was not asked for that, its jobs go to others."""
        member.closed, member.error = True, error
        if error is None:
            if member.leaving and isinstance(member.node, RemoteNode):
                member.node.ask_to_end()
                self._plan_restart(member)
            return [*self._requeue(member), *self._give_up_if_alone(), *self._finish_if_done()]
        return self._drop(member, f"cannot run jobs: {error}")

    def _lose(self, member: _Member) -> list[Message]:
        """Deal the jobs of a node again of which nothing is left, and connect to its machine once more.

        A node that has never run jobs would most probably fail in the same way again.
        """
        member.closed = True
        self._plan_restart(member)
        return self._drop(member, self._problem(member))

    @staticmethod
    def _can_return(member: _Member) -> bool:
        """Whether connecting to the machine of a node once more may help. Not if it never ran jobs, or gave up."""
        remote = isinstance(member.node, RemoteNode) and not member.node.unfit and not member.gave_up
        return remote and member.joined and member.failures < MAX_FAILURES

    def _will_return(self, member: _Member) -> bool:
        """Whether a node that leaves will be started again when it has ended its run."""
        return member.leaving and not member.closed and self._can_return(member)

    def _plan_restart(self, member: _Member) -> None:
        """Connect to the machine of a lost node once more, unless that is known to be in vain."""
        if self._can_return(member):
            member.restart_at = time.monotonic() + 2.0**member.failures
            member.failures += 1

    def _restart(self, member: _Member) -> list[Message]:
        assert isinstance(member.node, RemoteNode)
        member.restart_at = None
        if self._closed or self._stopping or self._exhausted_told:
            return []
        if not member.gone:  # it was asked to end, and ends
            member.restart_at = time.monotonic() + POLL_SECONDS
            return []
        self._replaced.append(member.node)
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
        again = ""
        others = [other for other in self._members.values() if other is not member]
        if jobs and not self._stopping:
            if any(not other.closed or other.restart_at is not None for other in others):
                again = f"; its {count(jobs, 'job')} can run elsewhere"
            elif member.restart_at is not None:
                again = f"; its {count(jobs, 'job')} can run when it is back"
        text = f"node {member.name} {why}{again}"
        _log.warning("%s", text)
        change = NodesChanged(time.monotonic(), self._devices(), text)
        return [change, *self._requeue(member), *self._give_up_if_alone(), *self._finish_if_done()]

    def _requeue(self, member: _Member) -> list[Message]:
        """Conclude the jobs of a lost node that ended before, and deal the others again."""
        messages: list[Message] = []
        messages += self._carry_out(self._dealer.leaves(member.name))
        for job in self._dealer.jobs_at(member.name):
            self._since.pop(job.number, None)
            self._taking.discard(job.number)
            if (report := self._report_of(job, member)) is not None:
                messages += self._conclude_left(job, report)
            elif job.number in self._cancelled:
                messages += self._conclude_cancelled(job)
            elif self._running.pop(job.number, None) is not None:
                messages.append(JobReturned(time.monotonic(), job.number, job.label))
            if self._dealer.node_of(job.number) is not None:  # it is dealt again
                self._remove_report(job.number)
        return messages + self._carry_out(self._dealer.lost(member.name))

    def _report_of(self, job: Job, member: _Member) -> Report | None:
        """Return the report of a job of a lost node, unless the job failed because the node ended it."""
        assert self._begin is not None
        if self._probe is None:  # the jobs of other machines leave their reports there, and tell more in messages
            return None
        with contextlib.suppress(FileNotFoundError, ReportError):
            report = read_report(self._begin.reports.path(job.number))
            if report.ok or report.pruned or not _ended_with_its_node(member, report):
                return report
        return None

    def _conclude_left(self, job: Job, report: Report) -> list[Message]:
        """Conclude a job that wrote its report before its node was lost, unless it failed and is to be retried."""
        assert self._begin is not None
        messages: list[Message] = []
        if job.number not in self._running:  # its node did not come to report the start
            messages += self._note_start(JobStarted(time.monotonic(), job.number, job.label, (), None, None))
        started, now = self._running[job.number], self._history_of(job)
        unwanted = self._stopping or job.number in self._cancelled
        result = left_by(job, report, started, now.attempts_before, unwanted=unwanted)
        policy = self._begin.options.failures
        retry = result.cause in policy.retry_on and now.failed_before < policy.retries
        if result.outcome is Outcome.CANCELLED and job.number in self._cancelled:
            return messages + self._conclude_cancelled(job)
        if not retry:
            return messages + self._conclude(result)
        limit = now.attempts_before + policy.retries - now.failed_before
        retried = JobRetried(
            time=time.monotonic(),
            number=job.number,
            label=job.label,
            duration=result.duration,
            message=result.message or "failed",
            log=result.log,
            attempt=result.attempts + 1,
            attempts=limit,
        )
        return [*messages, *self._note_retry(retried)]

    # Attempts: a job that moves to another node takes their number along.

    def _history_of(self, job: Job) -> Job:
        """Return the job with the number of its attempts until now."""
        attempts, failed = self._attempts.get(job.number, (job.attempts_before, job.failed_before))
        return replace(job, attempts_before=attempts, failed_before=failed)

    def _note_start(self, started: JobStarted) -> list[Message]:
        number = started.number
        if (job := self._dealer.job(number)) is not None:
            job = self._history_of(job)
            self._attempts[number] = job.attempts_before + 1, job.failed_before
            self._dealer.started(number)
        self._running[number] = started
        self._since.pop(number, None)
        self._taking.discard(number)
        return [started]

    def _note_retry(self, retried: JobRetried) -> list[Message]:
        number = retried.number
        self._running.pop(number, None)
        if (job := self._dealer.job(number)) is not None:
            # An attempt that never ran counts, too.
            self._attempts[number] = retried.attempt - 1, self._history_of(job).failed_before + 1
        return [retried]

    def _remove_report(self, number: int) -> None:
        """Remove the report of a job that is dealt again, so that it does not count for the next copy."""
        assert self._begin is not None
        with contextlib.suppress(OSError):
            self._begin.reports.path(number).unlink()

    def _give_up_if_alone(self) -> list[Message]:
        """If no node can start jobs any more, say so to the head, which concludes the jobs that are left."""
        if self._closed or self._stopping or self._given_up or not self._opened:
            return []
        if any(not member.leaving for member in self._at_work()) or (self._dealer.idle and self._dealer.exhausted):
            return []
        if any(member.restart_at is not None or self._will_return(member) for member in self._members.values()):
            return []
        self._given_up = True
        self._dealer.stop()
        reasons = "; ".join(f"{member.name} {self._problem(member)}" for member in self._members.values())
        return [GaveUp(time.monotonic(), f"was not run: no node is left ({reasons})"), *self._finish_if_done()]

    def _finish_if_done(self) -> list[Message]:
        """Let the nodes end their run when every job has its result, and tell the head when they have."""
        if self._closed or self._begin is None:
            return []
        if self._dealer.exhausted and self._dealer.idle and not self._exhausted_told:
            self._exhausted_told = True
            for member in self._at_work():
                if member.opened:  # another one learns it when it has opened its pool
                    self._tell(member, Exhausted())
        if not (self._exhausted_told or self._stopping or self._given_up):
            return []
        if any(member.gone and not member.closed for member in self._members.values()):
            return []  # what it has said is handled before its end, which concludes its jobs
        # A node that has not opened its pool has no job. One that cannot be reached ends by itself.
        over = self._stopping or self._exhausted_told
        if any(member.opened and not (over and member.unreachable) for member in self._at_work()):
            return []
        self._closed = True
        left = [message for member in self._at_work() for message in self._conclude_unreachable(member)]
        return [*left, *self._conclude_lost(), Closed(None, self._stopping)]

    def _conclude_lost(self) -> list[Message]:
        """Conclude the jobs that were started at nodes that are lost, when no node is left to run them again."""
        messages: list[Message] = []
        for job in self._dealer.waiting if self._given_up else []:
            if self._history_of(job).attempts_before > job.attempts_before:
                message = "was ended because its node was lost, and no node is left"
                result = self._unfinished(job, Outcome.FAILED, message, Cause.CRASH)
                self._dealer.cancelled(job.number)
                messages += self._conclude(replace(result, unsupervised=True))
        return messages

    def _conclude_unreachable(self, member: _Member) -> list[Message]:
        """Conclude the jobs of a node that cannot be reached after the run was stopped. It ends them by itself."""
        messages: list[Message] = []
        for job in self._dealer.jobs_at(member.name):
            if (report := self._report_of(job, member)) is not None:
                messages += self._conclude_left(job, report)
                continue
            started = self._running.pop(job.number, None)
            may = "may have been started" if started is None else "may still run"
            result = replace(
                self._unfinished(job, Outcome.CANCELLED, f"{may} on {member.name}, which cannot be reached", None),
                devices=() if started is None else started.devices,
                duration=None if started is None else time.monotonic() - started.time,
                log=None if started is None else started.log,
            )
            messages += self._conclude(result)
        if messages:
            jobs = count(len([one for one in messages if isinstance(one, Ended)]), "job")
            text = f"node {member.name} cannot be reached: its {jobs} may run until it notices that, in a few seconds"
            messages.append(Notice(time.monotonic(), text))
        return messages

    def _cancel(self, number: int) -> list[Message]:
        job = self._dealer.cancelled(number)
        if job is not None:
            return self._conclude_cancelled(job)
        self._tell_node_of(number, self._cancelled[number])
        return []

    def _conclude_cancelled(self, job: Job) -> list[Message]:
        what = self._cancelled[job.number]
        outcome = Outcome.PRUNED if what.pruned else Outcome.CANCELLED
        return self._conclude(self._unfinished(job, outcome, what.problem, None))

    def _carry_out(self, deals: list[Deal]) -> list[Message]:
        messages: list[Message] = []
        for deal in deals:
            match deal:
                case Ask(number):
                    messages.append(Wanted(number))
                case Give(node, job):
                    job = self._history_of(job)
                    if job.failed_before:  # its node may know that it needs more memory
                        self._since.pop(job.number, None)
                    else:
                        self._since[job.number] = time.monotonic()
                    self._tell(self._members[node], Offer(job))
                case TakeBack(node, job):
                    _log.info("job %d is taken back from %s", job.number, node)
                    self._since.pop(job.number, None)
                    self._taking.add(job.number)
                    self._tell(self._members[node], Cancel(job.number, "was not started", unstarted=True))
                case MovedTooOften(job):
                    message = f"was not finished: {MAX_MOVES + 1} nodes that had it were lost or ended"
                    messages += self._conclude(self._unfinished(job, Outcome.FAILED, message, Cause.CRASH))
        return messages

    def _unfinished(self, job: Job, outcome: Outcome, message: str, cause: Cause | None) -> JobResult:
        """Return the result of a job that no node has."""
        attempts = max(1, self._history_of(job).attempts_before)
        return JobResult(job.number, job.label, outcome, None, message, (), None, None, cause, attempts)


def _not_ready(names: list[str], others: bool) -> str:
    """Say that nodes are not ready when the run begins. `others` says whether others are."""
    if others:
        return f"not ready yet, and may join later: {', '.join(names)}"
    hint = "`gpu-launcher doctor --nodes NODE` tries one"
    return f"waiting for a node: none of {', '.join(names)} is ready yet ({hint})"


def _ended_with_its_node(member: _Member, report: Report) -> bool:
    """Whether a job probably failed because its lost node ended it. The node may have been lost before it said so."""
    return member.leaving or report.killed or report.message == INTERRUPTED
