"""A node of a group: its phase, and what the group knows about it.

| phase                    | ends with                                    | next phase |
|--------------------------|----------------------------------------------|------------|
| STARTING                 | its pool is open                             | OPEN       |
| OPEN                     | it ends too soon for jobs that wait          | DRAINING   |
| each of these three      | it cannot start jobs any more, or they crash | RETIRED    |
| each of these four       | its engine asks it to end                    | LEAVING    |
| each of these five       | its run is over, or nothing of it is left    | ENDED      |
| STARTING, OPEN, DRAINING | no job needs it, or it is to be renewed      | RESTING    |
| ENDED, RESTING           | it may help to start it again, or jobs wait  | WAITING    |
| WAITING                  | its time has come                            | STARTING   |
| WAITING                  | no job needs it                              | RESTING    |
| WAITING                  | no more jobs are started, or it cannot start | ENDED      |

A phase is what the group has decided or was told. Whether the node can be heard is known to `RemoteNode.life`, or to
the `LocalNode`: it may fall silent in every phase.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from enum import Enum, auto

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import GpuLauncherError, NodeDiedError
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.node_messages import BeginRun, Message, Opened
from gpu_launcher.jobs.source import Offer, Statement, Throttle
from gpu_launcher.model import Device
from gpu_launcher.nodes.channel_relay import FarEnd
from gpu_launcher.nodes.output_receiver import OutputReceiver
from gpu_launcher.nodes.remote_node import Life, RemoteNode

_log = get_logger("nodes.member")

MAX_FAILURES = 3
"""Number of times in a row that a node is started again without having completed a job."""
MAX_CRASHES = 3
"""Number of jobs that crash on a node, and of jobs that complete on another one, after which the first is set aside."""
LOCAL_END_SECONDS = 5.0
"""Seconds in which the processes below a local node that was killed end by themselves."""


class MemberPhase(Enum):
    """Where a node is in its life."""

    STARTING = auto()
    """Its agent or its pool is not there yet."""
    OPEN = auto()
    """It gets jobs."""
    DRAINING = auto()
    """It gets no more jobs, because it is to be renewed."""
    RETIRED = auto()
    """It starts no more jobs: it cannot, or jobs crash there that run elsewhere. It finishes those it has."""
    LEAVING = auto()
    """Its agent was asked to end by its engine, and has interrupted its jobs."""
    ENDED = auto()
    """Its run is over, or can never begin."""
    RESTING = auto()
    """It was given back, and can be asked for again."""
    WAITING = auto()
    """It is started again at `start_at`."""


_TRANSITIONS = {
    MemberPhase.STARTING: {
        MemberPhase.OPEN,
        MemberPhase.RETIRED,
        MemberPhase.LEAVING,
        MemberPhase.ENDED,
        MemberPhase.RESTING,
    },
    MemberPhase.OPEN: {
        MemberPhase.DRAINING,
        MemberPhase.RETIRED,
        MemberPhase.LEAVING,
        MemberPhase.ENDED,
        MemberPhase.RESTING,
    },
    MemberPhase.DRAINING: {MemberPhase.RETIRED, MemberPhase.LEAVING, MemberPhase.ENDED, MemberPhase.RESTING},
    MemberPhase.RETIRED: {MemberPhase.LEAVING, MemberPhase.ENDED},
    MemberPhase.LEAVING: {MemberPhase.ENDED},
    MemberPhase.ENDED: {MemberPhase.WAITING},
    MemberPhase.RESTING: {MemberPhase.WAITING},
    MemberPhase.WAITING: {MemberPhase.STARTING, MemberPhase.ENDED, MemberPhase.RESTING},
}
"""The phases that may follow each phase."""

_OVER = frozenset({MemberPhase.ENDED, MemberPhase.RESTING, MemberPhase.WAITING})


class Member:
    """See the module."""

    def __init__(self, name: str, node: LocalNode | RemoteNode) -> None:
        """Begin with a node that was just started."""
        self.name = name
        self.node = node
        self.phase = MemberPhase.STARTING
        self.start_at = math.inf
        """When to start it again, in seconds of the monotonic clock, while it is WAITING."""
        self.at_once: int | None = None
        """How many jobs it can run at the same time, as it said last. None if its pool was never open."""
        self.failures = 0
        """How many times it was started again since it completed a job, or was renewed after it had run one."""
        self.gave_up = False
        """Whether it once was RETIRED. It would be again."""
        self.outputs: OutputReceiver | None = None
        """Writes the outputs that it sends, if it has a sweep's directory of its own."""
        self._ends_at = -math.inf
        """When the processes below a local node that was killed have ended, in seconds of the monotonic clock."""
        self._reset()

    def _reset(self) -> None:
        self.pool: Opened | None = None
        """Its pool while it is open for this run."""
        self.asked = False
        """Whether it has asked for jobs since its pool is open."""
        self.ran = False
        """Whether it has started a job since its pool is open."""
        self.completed = 0
        """How many jobs have completed there since its pool is open."""
        self.crashed = 0
        """How many jobs have crashed there since its pool is open."""
        self.error: GpuLauncherError | None = None
        """What kept its run from beginning, if that is an error of ours."""
        self.why: str | None = None
        """Why it starts no more jobs, as a sentence without its subject."""
        self._throttles = [Throttle()]
        """What it confirmed last about how much may run there, and then what it was told and has not confirmed."""

    def begin(self, begin: BeginRun) -> None:
        """Let a node that was just started begin the run."""
        self._reset()
        if self.phase is not MemberPhase.STARTING:
            self.become(MemberPhase.STARTING, "its command was started again")
        self.tell(begin)

    def become(self, phase: MemberPhase, why: str) -> None:
        """Enter another phase. `why` is for the debug log."""
        assert phase in _TRANSITIONS[self.phase], f"{self.name}: {self.phase.name} -> {phase.name}: {why}"
        _log.debug("%s: %s -> %s: %s", self.name, self.phase.name, phase.name, why)
        self.phase = phase
        if self.over:
            self.pool = None

    def open(self, pool: Opened) -> None:
        """Take note that its pool is open. It may be leaving already."""
        self.pool, self.at_once = pool, pool.at_once
        self._throttles = [self.throttle] * len(self._throttles)  # it hears of the last before its first job
        if self.phase is MemberPhase.STARTING:
            self.become(MemberPhase.OPEN, f"its pool has {len(pool.devices)} devices")

    def retire(self, phase: MemberPhase, why: str) -> None:
        """Take note that it starts no more jobs: it is RETIRED, or LEAVING."""
        self.why = why
        self.gave_up = self.gave_up or phase is MemberPhase.RETIRED
        if self.phase not in (phase, MemberPhase.LEAVING):
            self.become(phase, why)

    def plan_restart(self) -> None:
        """Start it again in a while, unless that is known to be in vain."""
        if self.can_return:
            self.wait_until(time.monotonic() + 2.0**self.failures, f"failure {self.failures + 1} of {MAX_FAILURES}")
            self.failures += 1

    def wait_until(self, start_at: float, why: str) -> None:
        """Start it again at a time of the monotonic clock."""
        self.start_at = start_at
        self.become(MemberPhase.WAITING, why)

    @property
    def remote(self) -> RemoteNode | None:
        """The node if it has an agent."""
        return self.node if isinstance(self.node, RemoteNode) else None

    @property
    def devices(self) -> tuple[Device, ...]:
        """Its devices, while its pool is open."""
        return () if self.pool is None else self.pool.devices

    @property
    def throttle(self) -> Throttle:
        """How much may run there, as it was told last."""
        return self._throttles[-1]

    def set_throttle(self, throttle: Throttle) -> None:
        """Tell it how much may run there, if that has changed."""
        if throttle != self.throttle:
            self._throttles.append(throttle)
            self.tell(throttle)

    def confirm_throttle(self) -> None:
        """Take note that it knows the next throttle that it was told."""
        del self._throttles[0]

    def may_use(self, in_use: int) -> int:
        """Return how many devices it may be using, if `in_use` are known to be. It may not know the last limits yet."""
        limits = [len(self.devices) if one.devices is None else one.devices for one in self._throttles]
        return max(in_use, *limits)

    @property
    def over(self) -> bool:
        """Whether it has no run."""
        return self.phase in _OVER

    @property
    def at_work(self) -> bool:
        """Whether it has a run, and processes that may take part in it."""
        return not self.over and not self.gone

    @property
    def takes_jobs(self) -> bool:
        """Whether it may get jobs when it asks for them."""
        return self.phase in (MemberPhase.STARTING, MemberPhase.OPEN)

    def is_worse_than(self, other: Member) -> bool:
        """Whether jobs crash on this node that run on the other one."""
        crashes = self.takes_jobs and not self.completed and self.crashed >= MAX_CRASHES
        return crashes and other.takes_jobs and other.completed >= MAX_CRASHES

    @property
    def leaving(self) -> bool:
        """Whether it has a run, but starts no more jobs."""
        return self.phase in (MemberPhase.RETIRED, MemberPhase.LEAVING)

    @property
    def can_return(self) -> bool:
        """Whether starting it once more may help. Not if it has no agent, could never run jobs, or gave up."""
        if self.remote is None or self.remote.unfit or self.gave_up or self.failures >= MAX_FAILURES:
            return False
        return self.at_once is not None or self.remote.interrupted

    @property
    def will_return(self) -> bool:
        """Whether it is not there, or ends, and will be started again, or can be."""
        return self.phase in (MemberPhase.WAITING, MemberPhase.RESTING) or (self.leaving and self.can_return)

    @property
    def may_run(self) -> bool:
        """Whether it may start jobs, now or later."""
        return self.takes_jobs or self.phase is MemberPhase.DRAINING or self.will_return

    @property
    def gone(self) -> bool:
        """Whether no process of the node is left."""
        if isinstance(self.node, RemoteNode):
            return self.node.life is Life.GONE
        return not self.node.is_running and time.monotonic() >= self._ends_at

    @property
    def lost(self) -> bool:
        """Whether nothing more is heard from the node."""
        if isinstance(self.node, RemoteNode):
            return self.node.life in (Life.SILENT, Life.GONE)
        return not self.node.is_running

    @property
    def silent(self) -> bool:
        """Whether the connection to the node is lost, and it may still run."""
        return self.remote is not None and self.remote.life is Life.SILENT

    @property
    def unreachable(self) -> bool:
        """Whether the node has not been heard for a while."""
        return self.remote is not None and (self.silent or self.remote.quiet)

    @property
    def problem(self) -> str:
        """Why it runs no jobs, as a sentence without its subject."""
        if self.error is not None:
            return f"says {self.error}"
        said = None if self.remote is None else self.remote.problem
        return self.why or said or "has ended"

    def receive(self) -> list[Message]:
        """Return what the node has said. If it has died, it has said nothing, and is `lost`."""
        try:
            return self.node.receive_ready()
        except NodeDiedError as error:
            self.error = self.error or error
            self._ends_at = time.monotonic() + LOCAL_END_SECONDS
            self.node.close()
            return []

    def tell(self, what: Statement | BeginRun) -> None:
        """Say something to the node, if it can be reached."""
        with contextlib.suppress(NodeDiedError):  # noticed where its messages are read
            self.node.say(what)

    def offer(self, job: Job, channel: FarEnd | None) -> None:
        """Offer a job to the node, with its channel if it has one."""
        if self.remote is not None:
            self.remote.offer(job, channel)
        else:
            assert channel is None, f"{self.name} does not relay channels"
            self.tell(Offer(job))

    def stop_relaying(self, number: int) -> None:
        """Relay the channel of a job no more. The node may still have the job, if it cannot be reached."""
        if self.remote is not None:
            self.remote.stop_relaying(number)

    def discard_outputs(self) -> None:
        """Remove the outputs that have arrived from it, of jobs that have no result."""
        if self.outputs is not None:
            self.outputs.discard()


def devices_of(members: Iterable[Member]) -> tuple[Device, ...]:
    """Return the devices of all nodes whose pools are open."""
    return tuple(device for member in members for device in member.devices)
