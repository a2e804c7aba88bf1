"""Several nodes that share the jobs of one head, and look to it like one node.

Theory of operation. Each node asks for jobs when it has room. The `Dealer` decides which node gets which job, and the
head is asked for as many as the nodes want together. What the nodes report passes through to the head, with the node's
name in its devices. `group_jobs` keeps what is known about jobs, `member` what is known about nodes, and `scaling`
decides which of these are given back or asked for again.

A node may be lost at any time, and its jobs are dealt again. It counts as lost only when no process of it can be left
(`remote_node.Life`). A node that is asked to end by its engine says so first (`Leaving`): jobs that it ends without a
report are dealt again, too. A node that joins late gets jobs as soon as it asks for them.

The nodes learn that there are no more jobs only when every job has its result. Until then any of them may have to take
the jobs of another. A group is for one run: a node that waits for the next one could not be told from one that is lost.

What follows from an event as such is done where the event is handled. What follows from the state of all nodes and
jobs, such as the end of the run, is done after each event (`_settle`).
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_launcher.errors import NodeStartError, OptionError
from gpu_launcher.jobs.events import (
    GaveUp,
    JobRetried,
    JobStarted,
    Notice,
    OutOfContact,
    StopRequested,
)
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.node_messages import (
    BeginRun,
    Closed,
    Ended,
    Message,
    NodeReady,
    Opened,
    ThrottleConfirmed,
    Wanted,
)
from gpu_launcher.jobs.source import AllOffered, Cancel, Exhausted, Offer, Reply, Statement, Stop, Throttle
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.jobs.term import Term
from gpu_launcher.model import Device
from gpu_launcher.nodes.agent_messages import (
    HostedProgram,
    Leaving,
    OutputData,
    OutputDirectory,
    OutputFile,
    OutputLink,
    OutputPiece,
    OutputsBegin,
    OutputsEnd,
    Script,
    Setup,
    StopOutputs,
    Timing,
)
from gpu_launcher.nodes.dealer import quotas
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.group_jobs import GroupJobs
from gpu_launcher.nodes.group_scaling import GroupScaling
from gpu_launcher.nodes.member import Member, MemberPhase, devices_of
from gpu_launcher.nodes.membership import Membership
from gpu_launcher.nodes.node_connections import NodeConnections
from gpu_launcher.nodes.output_receiver import remove_leftovers
from gpu_launcher.nodes.remote_node import RemoteNode, end_all
from gpu_launcher.nodes.signs_of_life import SignsOfLife
from gpu_launcher.processes import spawn
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.validation import StartMethod
from gpu_launcher.wording import count

FIRST_NODE_SECONDS = 10.0
"""Seconds to wait for the first node. Nodes may be in a queue for hours."""
LATECOMER_SECONDS = 2.0
"""Seconds for which a sweep waits for more nodes once it has one."""
POLL_SECONDS = 0.1
LOOK_SECONDS = 0.05
"""Minimum seconds between two looks at all nodes. If there are many nodes, one of them always says something."""


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
        fetches: bool = False,
        logs: Sequence[str] = (),
        timing: Timing = Timing(),  # noqa: B008  (frozen)
    ) -> None:
        """Start all nodes. There may be none, for a run without jobs.

        `directory` is the sweep's, which all nodes must see, unless `fetches`: then nodes that do not see it send the
        outputs of jobs; `logs` are as for `OutputReceiver`. If it is None, reports of jobs stay on their machines:
        that is for jobs that tell the head in messages what becomes of them. `local` starts the node on this machine,
        if it is one of them. The other arguments are those of `start_nodes`, and it raises the same errors.
        """
        self.early: list[Message] = []
        self.is_running = True
        self._process = os.getpid()
        self._members: dict[str, Member] = {}
        self._connections = NodeConnections()
        self._signs: SignsOfLife | None = None
        """For nodes on other machines, if there are any."""
        self._outbox: list[Message] = []
        """Messages for the head."""
        self._jobs = GroupJobs(self._members, self._post, shares_reports=directory is not None)
        self._throttle = Throttle()
        """How much may run on all nodes together."""
        self._out_of_contact: tuple[frozenset[str], frozenset[int]] = frozenset(), frozenset()
        """Nodes that the head was told not to have been heard for a while, and their running jobs."""
        self._opening_notices: set[str] = set()
        """What nodes have said when they opened their pools. Each text is shown once."""
        self._look_at = -math.inf
        """When to look at all nodes again, in seconds of the monotonic clock."""
        self._scaling = GroupScaling(self._members, self._jobs, self._post)
        self._membership = Membership(self._members, self._connections, self._jobs, self._post, directory, logs)

        def describe(probe: tuple[str, bytes] | None) -> Setup:
            nodes = option.replace("start_method", "nodes")  # as the user writes it
            pickled = spawn.pickled_program(program, nodes, "jobs run on other nodes", "run it on this machine")
            return Setup(
                timing=timing,
                directory=str(Path.cwd()),
                arguments=tuple(arguments),
                interpreter=spawn.describe_interpreter(pickled, Generators().pickled_globals()),
                script=Script.of_this_program() if imports_script else None,
                probe=probe,
                method=method,
                option=option,
                allocation=os.environ.get("SLURM_JOB_ID"),
                fetches=fetches,
            )

        try:
            if fetches and directory is not None:
                remove_leftovers(directory)
            for spec in specs:
                if spec.command is None:  # first: it is forked, and should find as few threads as possible
                    self._members[spec.name] = Member(spec.name, local())
            remote = [spec for spec in specs if spec.command is not None]
            if remote:
                self._signs = SignsOfLife(directory, self._members)
                self._start_remote(remote, describe(self._signs.probe), captured=program.captured)
                self._signs.start(timing.beat)
            for member in self._members.values():
                self._connections.listen_to(member)
        except BaseException:
            self.close()
            raise

    def _start_remote(self, specs: Sequence[NodeSpec], setup: Setup, *, captured: bool) -> None:
        for spec in specs:
            its_setup = replace(setup, notice=spec.notice, elastic=spec.elastic)
            start = partial(RemoteNode, spec, its_setup, captured=captured)
            try:
                self._members[spec.name] = Member(spec.name, self._connections.start(start))
            except OSError as error:
                raise NodeStartError(f"node {spec.name}: {spec.why_not_executed(error)}") from None

    # As a LocalNode

    def wait_until_ready(self) -> None:
        """Do nothing: `open` waits."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive_ready` has something to do."""
        return self._connections.fileno()

    def open(self) -> Opened:
        """Wait until a node can run jobs, and a moment for the others. Do not wait for long: nodes may join later.

        Raises the error of all nodes, if they have the same one, and else NodeStartError with the reason of each.
        """
        self._refuse_timeout()
        begin, first = time.monotonic(), None
        waiting: list[Member] = []
        opened: list[Member] = []
        while self._members:
            self.early += self._advance(POLL_SECONDS)
            members = self._members.values()
            opened = [member for member in members if member.pool is not None]
            waiting = [
                member
                for member in members
                if (member.pool is None and not member.over) or member.phase is MemberPhase.WAITING
            ]
            if opened:
                first = first or time.monotonic()
                if not waiting or time.monotonic() - first > LATECOMER_SECONDS:
                    break
            elif not waiting:
                self._refuse()
            elif time.monotonic() - begin > FIRST_NODE_SECONDS:
                break
        if waiting:
            self._post(Notice(time.monotonic(), _not_ready([member.name for member in waiting], bool(opened))))
        self._jobs.opened = True
        self._settle()
        self._announce()
        return Opened(self._devices(), len(self._devices()), "fork")

    def _refuse_timeout(self) -> None:
        """Raise OptionError if no node can ever run a job until its timeout. Nodes may be in a queue for hours."""
        assert self._jobs.begun is not None
        options = self._jobs.begun.options
        remote = self._remote()
        if options.request is None or not remote or len(remote) < len(self._members):
            return
        longest = max(node.lasts for node in remote)
        try:
            Term(longest, longest).refuse(options.request, options.spell)
        except OptionError:
            self.close()
            raise

    def _refuse(self) -> None:
        members = self._members.values()
        error, *others = [member.error for member in members]
        problems = "; ".join(f"{member.name} {member.problem}" for member in members)
        self.close()
        if error is not None and all(str(other) == str(error) for other in others):
            raise error
        raise NodeStartError(f"no node can run jobs: {problems}")

    def receive_ready(self) -> list[Message]:
        """Return what the nodes have reported."""
        return self._advance(0)

    def tick(self) -> None:
        """Notice silent nodes. What follows is returned by `receive_ready`."""
        self._look()
        self._announce()

    def say(self, what: Statement | BeginRun, descriptors: tuple[int, ...] = ()) -> None:
        """Pass a statement on to the node or nodes that it is about.

        An offer may bring the descriptor of the job's end of a channel, if all nodes have agents. Raises OSError if too
        many files are open for it.
        """
        match what:
            case BeginRun():
                self._begin_run(what)
            case Offer(job, forgiven):
                self._jobs.offered(job, descriptors, forgiven=forgiven)
            case AllOffered():
                self._jobs.dealer.exhaust()
            case Exhausted():
                self._jobs.dealer.exhaust()
                self._jobs.may_end = True
            case Stop():
                self._jobs.stop()
            case Throttle():
                self._throttle = what
                self._share_out()
            case Cancel():
                self._jobs.cancel(what)
            case Reply(number):
                self._jobs.tell_node_of(number, what)
        self._settle()
        self._announce()

    def close(self) -> None:
        """End all nodes. Idempotent."""
        if self._process != os.getpid():
            return
        self.is_running = False
        if self._signs is not None:
            self._signs.stop()
        remote = [*self._remote(), *self._connections.replaced]
        with contextlib.ExitStack() as cleanup:
            for node in [*(member.node for member in self._members.values()), *self._connections.replaced]:
                cleanup.callback(node.close)
            end_all(remote)
        for member in self._members.values():
            member.discard_outputs()
        if self._signs is not None:
            self._signs.close(nothing_left=all(node.nothing_left for node in remote))
        self._jobs.close()
        self._connections.close()

    # Messages

    def _post(self, message: Message) -> None:
        """Keep a message for the head. `receive_ready` returns it; `_announce` makes the head call that."""
        self._outbox.append(message)

    def _announce(self) -> None:
        if self._outbox:
            self._connections.wake()

    def _advance(self, seconds: float) -> list[Message]:
        """Wait at most `seconds` for the nodes, and return what follows from their messages."""
        ready = self._connections.wait(seconds)
        for member in self._members.values():
            if member.name in ready:
                for message in member.receive():
                    self._take(member, message)
                    self._settle()
                member.node.tick()  # at once: it may have something to send
                if member.lost:
                    self._look_at = -math.inf
        self._look()
        messages, self._outbox = self._outbox, []
        return messages

    def _take(self, member: Member, message: Any) -> None:
        """Act on a message from a node, and pass on to the head what it gets of it."""
        if member.over:
            return  # it was given back before it said this
        now = time.monotonic()
        if member.remote is not None and hasattr(message, "time"):
            message = replace(message, time=now)  # its clock is another machine's
        match message:
            case NodeReady() | StopRequested():  # it was told by us to stop
                pass
            case Opened():
                self._membership.join(member, message)
                self._share_out()
            case Wanted(number):
                member.asked = True
                self._jobs.wanted(member, number)
            case ThrottleConfirmed():
                member.confirm_throttle()
                self._share_out()
            case JobStarted():
                member.ran = True
                # It may be a process of another machine.
                self._jobs.started(message if member.remote is None else replace(message, pid=None))
            case JobRetried():
                self._jobs.retried(message)
            case OutputsBegin() | OutputDirectory() | OutputFile() | OutputData() | OutputLink() | OutputsEnd():
                self._receive_output(member, message)
            case Ended(result):
                self._jobs.ended(member, result)
                self._set_aside()
            case GaveUp(problem=problem):
                self._membership.retire(member, MemberPhase.RETIRED, f"starts no more jobs. Each {problem}")
            case Leaving(why):
                self._membership.retire(member, MemberPhase.LEAVING, f"{why} and ends")
            case Closed(error):
                self._membership.end_run(member, error)
            case Notice(text=text):
                if member.asked or text not in self._opening_notices:
                    self._post(replace(message, text=f"{member.name}: {text}"))
                if not member.asked:  # it is about the node as such, and most nodes say the same
                    self._opening_notices.add(text)
            case _:
                self._post(message)

    def _set_aside(self) -> None:
        """Give no more jobs to nodes on which jobs crash that run elsewhere."""
        members = self._members.values()
        for member in members:
            if not self._ends and any(member.is_worse_than(other) for other in members):
                crashed = f"is set aside: {count(member.crashed, 'job')} crashed there, and none completed"
                self._membership.retire(member, MemberPhase.RETIRED, crashed)
                self._jobs.set_aside(member)

    def _receive_output(self, member: Member, piece: OutputPiece) -> None:
        """Write a part of a job's outputs, unless the job is not at this node any more."""
        if member.outputs is None or self._jobs.dealer.node_of(piece.number) != member.name:
            return
        if not member.outputs.take(piece) and member.remote is not None:
            member.remote.say(StopOutputs(piece.number))

    def _look(self) -> None:
        """Notice nodes that are lost, and what else depends on the time. Do nothing if that was done just now."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        self._membership.look()
        self._note_contact()
        self._share_out()
        self._jobs.deal_late(paused=self._throttle.paused)
        if self._jobs.opened and not self._ends and not self._throttle.paused:
            self._scaling.scale(self._throttle.devices)
        self._connections.end_replaced()
        self._settle()

    def _note_contact(self) -> None:
        """Tell the head which nodes are not heard, if that has changed."""
        silent = [member for member in self._members.values() if member.unreachable and not member.over]
        jobs = frozenset(number for member in silent for number in self._jobs.running_at(member))
        now = frozenset(member.name for member in silent), jobs
        if now != self._out_of_contact and not self._jobs.closed:
            self._out_of_contact = now
            self._post(OutOfContact(time.monotonic(), *now))

    # The run

    def _begin_run(self, begin: BeginRun) -> None:
        self._jobs.begin(begin, self._most_jobs(begin.options))
        for member in self._members.values():
            self._membership.begin(member)

    def _most_jobs(self, options: Options) -> int | None:
        """Return how many jobs may be at all nodes together. None for any number."""
        return options.max_parallel

    def _remote(self) -> list[RemoteNode]:
        return [member.remote for member in self._members.values() if member.remote is not None]

    def _devices(self) -> tuple[Device, ...]:
        return devices_of(self._members.values())

    def _at_work(self) -> list[Member]:
        return [member for member in self._members.values() if member.at_work]

    def _share_out(self) -> None:
        """Tell each node how much may run there. The limit on devices is dealt in the order of the nodes.

        Nodes without work come last: a job that was started on another node is retried only there. The limit also holds
        while messages are under way: see `quotas` and `Member.may_use`.
        """
        at_work = self._at_work()
        in_use: Counter[str] = Counter()
        if self._throttle.devices is not None:
            at_work.sort(key=lambda member: not self._jobs.dealer.has_work_for(member.name))
            in_use = self._jobs.devices_in_use()
        held = [member.may_use(in_use[member.name]) for member in at_work]
        shares = quotas(self._throttle.devices, [len(member.devices) for member in at_work], held)
        for member, share in zip(at_work, shares, strict=True):
            member.set_throttle(Throttle(self._throttle.paused, share))

    @property
    def _ends(self) -> bool:
        """Whether no more jobs are started."""
        return self._jobs.exhausted_told or self._jobs.stopping or self._jobs.given_up

    def _settle(self) -> None:
        """Do what follows from the state of all nodes and jobs."""
        self._jobs.conclude_refused()
        self._give_up_if_alone()
        self._finish_if_done()

    def _give_up_if_alone(self) -> None:
        """If no node can start jobs any more, say so to the head, which concludes the jobs that are left."""
        jobs = self._jobs
        if jobs.closed or jobs.stopping or jobs.given_up or not jobs.opened or jobs.all_done or not self._members:
            return
        if any(member.may_run for member in self._members.values()):
            return
        jobs.give_up()
        reasons = "; ".join(f"{member.name} {member.problem}" for member in self._members.values())
        self._post(GaveUp(time.monotonic(), f"was not run: no node is left ({reasons})"))

    def _finish_if_done(self) -> None:
        """Let the nodes end their run when every job has its result, and tell the head when they have."""
        jobs = self._jobs
        if jobs.closed or jobs.begun is None:
            return
        if jobs.may_end and jobs.all_done and not jobs.exhausted_told:
            jobs.exhausted_told = True
            for member in self._at_work():
                if member.pool is not None:  # another one learns it when it has opened its pool
                    member.tell(Exhausted())
        if not self._ends:
            return
        if any(member.gone and not member.over for member in self._members.values()):
            return  # what it has said is handled before its end, which concludes its jobs
        # A node without an open pool has no jobs.
        if any(member.pool is not None and not self._ends_by_itself(member) for member in self._at_work()):
            return
        jobs.closed = True
        for member in self._at_work():
            jobs.conclude_unreachable(member)
        if jobs.given_up:
            self._conclude_lost()
        self._post(Closed(None, jobs.stopping))

    def _ends_by_itself(self, member: Member) -> bool:
        """Whether the run's end need not wait for a node that has not been heard for a while.

        While it has jobs, it is waited for as long as its connection holds: it may be heard again.
        """
        if not member.unreachable or not (self._jobs.stopping or self._jobs.exhausted_told):
            return False
        return member.silent or self._jobs.forced or not self._jobs.dealer.jobs_at(member.name)

    def _conclude_lost(self) -> None:
        self._jobs.conclude_lost()


def _not_ready(names: list[str], others: bool) -> str:
    """Say that nodes are not ready when the run begins. `others` says whether others are."""
    if others:
        return f"not ready yet, and may join later: {', '.join(names)}"
    hint = "`gpu-launcher doctor --nodes NODE` tries one"
    return f"waiting for a node: none of {', '.join(names)} is ready yet ({hint})"
