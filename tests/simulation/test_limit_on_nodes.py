"""The limit on devices over several nodes, in random histories: it is never exceeded, it is used, and all jobs end.

The group and the machines of its nodes are real. What lies between them is simulated: messages take any time, and jobs,
nodes and the user do anything at any time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.jobs import machine as m
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import GaveUp, JobRetried, JobStarted, Outcome
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.node_messages import BeginRun, Ended, Opened, ThrottleConfirmed, Wanted
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.source import AllOffered, Cancel, Exhausted, Offer, Throttle
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import MILLIONTHS, WHOLE, Request, Share
from gpu_launcher.nodes import group_jobs, node_group
from gpu_launcher.nodes.agent_messages import HostedProgram
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.node_group import NodeGroup

HISTORIES = int(os.environ.get("GPU_LAUNCHER_HISTORIES", "30"))
MAX_STEPS = 300
MAX_TURNS = 300
"""Maximum number of turns in which everything comes to rest."""
SINGLE = [Request(1)]
MIXED = [Request(1), Request(1), Request(2), Request(1, Share(MILLIONTHS // 2)), Request(0)]
pytestmark = pytest.mark.timeout(300 + HISTORIES)


class Node:
    """A node whose jobs the test decides on, and the messages on their way to and from it. Like a `LocalNode`."""

    def __init__(self, history: History, name: str, size: int) -> None:
        self.history = history
        self.name = name
        self.devices = tuple(replace(device, uuid=f"{name}{device.index}") for device in simulated_devices(size))
        random = history.random
        ahead = random.randint(1, 3)
        self.machine = m.Machine(m.Limits(None, 2, ahead, preparing=2, grace=5.0, at_once=size, listed=True))
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque()
        self.arrived: list[Any] = []
        """Messages that the group can receive."""
        self.told = self.heard = 0
        """How many messages were sent to it, and how many it has received."""
        self.has_offers = False
        """Whether it was ever offered a job."""
        self.begun = self.opened = False
        self.alive = True
        self.requested = 0
        self.requests: dict[int, Request] = {}
        self.preparing: list[int] = []
        self.dying: list[int] = []
        """Jobs that were killed before they ran."""
        self.retried: set[int] = set()
        """Jobs that have run here, and run again."""
        self.failing: int | None = None
        """A job that fails now."""
        self.ticket: m.TakeTicket | None = None
        self.held: dict[int, frozenset[str]] = {}
        """The devices of each job that runs."""
        self.slowness = {what: random.choice([1, 1, 8]) for what in ("hear", "tell", "grant", "end")}
        """How seldom some things happen to it."""
        self._awake = os.eventfd(0, os.EFD_NONBLOCK)

    # As a LocalNode

    @property
    def is_running(self) -> bool:
        return self.alive

    def fileno(self) -> int:
        return self._awake

    def say(self, what: Any) -> None:
        self.inbox.append(what)
        self.told += 1
        self.has_offers = self.has_offers or isinstance(what, Offer)

    def receive_ready(self) -> list[Any]:
        os.eventfd_read(self._awake)
        arrived, self.arrived = self.arrived, []
        return arrived

    def tick(self) -> None:
        pass

    def close(self) -> None:
        if self._awake >= 0:
            os.close(self._awake)
            self._awake = -1

    # What happens

    @property
    def in_use(self) -> frozenset[str]:
        return frozenset().union(*self.held.values())

    def hear(self) -> None:
        """Receive the next message of the group."""
        self.heard += 1
        match message := self.inbox.popleft():
            case BeginRun():
                self.begun = True
            case Offer(job):
                self.requested -= 1
                self.requests[job.number] = self.history.random.choice(self.history.requests)
                self.follow(m.Arrived(job.number))
            case Throttle():
                self.follow(message)
                self.outbox.append(ThrottleConfirmed())
            case Cancel(number):
                if number not in self.machine.running() and number not in self.retried:
                    self.follow(message)
            case Exhausted():
                self.follow(m.NoMore())
            case _:
                raise AssertionError(message)

    def deliver(self) -> None:
        """Let the next message reach the group."""
        self.arrived.append(self.outbox.popleft())
        os.eventfd_write(self._awake, 1)

    def open(self) -> None:
        self.opened = True
        self.outbox.append(Opened(self.devices, len(self.devices), "fork"))

    def ask(self) -> None:
        if (more := self.machine.wanted - self.requested) > 0:
            self.requested += more
            self.outbox.append(Wanted(more))

    def prepare(self) -> None:
        number, request = self.preparing[0], self.requests[self.preparing[0]]
        self.preparing.remove(number)
        refusal = "too large" if request.gpus > len(self.devices) else None
        self.follow(m.Prepared(number, request, refusal))

    def grant(self) -> bool:
        """Grant the ticket that is out, if it is possible. Returns whether it was."""
        if self.ticket is None:
            return False
        number, request, among = self.ticket.number, self.ticket.request, self.ticket.among
        shares = [self.requests[job].share.millionths for job in self.held]
        load = dict.fromkeys((device.uuid for device in self.devices), 0)
        for (_, uuids), share in zip(self.held.items(), shares, strict=True):
            for uuid in uuids:
                load[uuid] += share
        allowed = [uuid for uuid in load if among is None or uuid in among]
        free = [uuid for uuid in allowed if load[uuid] + request.share.millionths <= WHOLE.millionths]
        if len(free) < request.gpus:
            return False
        self.ticket = None
        self.held[number] = frozenset(self.history.random.sample(free, request.gpus))
        self.follow(m.LeaseGranted(number, self.held[number]))
        return True

    def end(self, number: int) -> None:
        """End a job that runs, or was killed before."""
        if number in self.dying:
            self.dying.remove(number)
        self.follow(m.Exited(number))

    def fail(self, number: int) -> None:
        """Let a job that runs fail, and run again."""
        self.retried.add(number)
        self.failing = number
        self.follow(m.Exited(number))
        self.failing = None
        self.outbox.append(JobRetried(0.0, number, "", None, "failed", None, 2, 9, 1))
        self.follow(m.Retry(number))

    def follow(self, stimulus: m.Stimulus) -> None:
        for instruction in self.machine.handle(stimulus, 0.0):
            match instruction:
                case m.StartProcess(number):
                    self.preparing.append(number)
                case m.TakeTicket():
                    self.ticket = instruction
                case m.DropTicket():
                    self.ticket = None
                case m.Go(number):
                    self._go(number)
                case m.Release(number):
                    del self.held[number]
                case m.Kill(number):
                    if number in self.preparing:
                        self.preparing.remove(number)
                    self.dying.append(number)
                case m.Conclude(number) if number == self.failing:
                    pass
                case m.Conclude(number):
                    outcome = Outcome.CANCELLED if instruction.cancelled else Outcome.COMPLETED
                    result = JobResult(number, "", outcome, b"", None, (), None, None, refused=instruction.refused)
                    self.outbox.append(Ended(result))
                    self.machine.forget(number)
                case _:
                    raise AssertionError(instruction)

    def _go(self, number: int) -> None:
        mine = tuple(device for device in self.devices if device.uuid in self.held.get(number, ()))
        self.outbox.append(JobStarted(0.0, number, "", mine, None))
        if mine:
            self.history.check_start(self)


class History:
    """A head, its nodes and their jobs. Anything may happen next."""

    def __init__(self, random: Random, directory: Path, requests: list[Request]) -> None:
        self.random = random
        self.requests = requests
        sizes = [random.randint(1, 4) for _ in range(random.randint(2, 4))]
        self.nodes = [Node(self, "abcd"[place], size) for place, size in enumerate(sizes)]
        unused = iter(self.nodes)
        self.group = NodeGroup(
            [NodeSpec(node.name, None) for node in self.nodes],
            lambda: next(unused),  # type: ignore[arg-type,return-value]
            HostedProgram(None, as_proposed),  # type: ignore[arg-type]
            None,
            method="auto",
            option="start_method",
            arguments=["program"],
            imports_script=False,
        )
        options = Options(None, None, None, 10.0, None, None, DeviceEnvironment(), environ={})
        self.group.say(BeginRun(options, ReportFiles(directory), "program", listed=True))
        self.wanted = self.offered = 0
        self.ended = 0
        self.all_offered = False
        self.given_up = False
        self.throttle = Throttle()
        self.earlier: list[tuple[int, list[tuple[Node, int]]]] = []
        """Earlier limits, and until how many messages they may hold for nodes that have had jobs then."""

    # What must be true

    def check_start(self, node: Node) -> None:
        """Check that a job may use its devices. An earlier limit holds until all nodes could know the present one."""
        self.earlier = [
            (limit, told)
            for limit, told in self.earlier
            if any(one.alive and one.heard < number for one, number in told)
        ]
        most = max([self.most, *(limit for limit, _ in self.earlier)])
        assert self.in_use <= most, f"{node.name} starts a job: {self.in_use} devices are in use of at most {most}"

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes if node.alive]

    @property
    def in_use(self) -> int:
        return sum(len(node.in_use) for node in self.living)

    @property
    def most(self) -> int:
        """How many devices may be in use."""
        return 1000 if self.throttle.devices is None else self.throttle.devices

    # What may happen

    def change(self, throttle: Throttle) -> None:
        before, self.throttle = self.most, throttle
        self.group.say(throttle)
        told = [(node, node.told) for node in self.living if node.has_offers]
        self.earlier.append((before, told))

    def turn(self) -> None:
        """Let the group do its work, and the head offer jobs."""
        for message in [*self.group.receive_ready()]:
            if isinstance(message, Wanted):
                self.wanted += message.count
            self.ended += isinstance(message, Ended)
            self.given_up = self.given_up or isinstance(message, GaveUp)
        self.group.tick()

    def offer(self, count: int) -> None:
        for _ in range(0 if self.all_offered else min(count, self.wanted)):
            self.wanted -= 1
            self.group.say(Offer(Job(self.offered, "", None)))
            self.offered += 1

    def step(self) -> None:
        random, node = self.random, self.random.choice(self.nodes)
        if not node.alive:
            return
        kind = random.randrange(13)
        slow = {0: "hear", 1: "hear", 2: "tell", 3: "tell", 8: "grant", 9: "grant", 10: "end"}.get(kind)
        if slow is not None and random.randrange(node.slowness[slow]):
            return
        match kind:
            case 0 | 1:
                for _ in range(min(len(node.inbox), random.randint(1, 5))):
                    node.hear()
            case 2 | 3:
                for _ in range(min(len(node.outbox), random.randint(1, 5))):
                    node.deliver()
            case 4 | 5:
                self.turn()
                self.offer(random.randint(0, 5))
            case 6 if node.opened:
                node.ask()
            case 7 if node.preparing:
                node.prepare()
            case 8 | 9:
                node.grant()
            case 10 if ends := [*node.machine.running(), *node.dying]:
                node.end(random.choice(ends))
            case 11 if node.begun and not node.opened:
                node.open()
            case 12:
                self._seldom(node)

    def _seldom(self, node: Node) -> None:
        random = self.random
        match random.randrange(10):
            case 0 | 1 | 2 | 3:
                most = sum(len(node.devices) for node in self.nodes)
                devices = random.choice([None, *range(most + 2), *range(1, most)])
                self.change(Throttle(random.random() < 0.1, devices))
            case 4:
                self.change(Throttle(not self.throttle.paused, self.throttle.devices))
            case 5 if len(self.living) > 1 and random.random() < 0.3:
                node.alive = False

    def rest(self) -> None:
        """Let everything happen that happens by itself, until nothing changes. No job that runs ends."""
        quiet = 0
        for _ in range(MAX_TURNS):
            before = self._state()
            self.turn()
            self.offer(self.wanted)
            for node in self.living:
                while node.inbox:
                    node.hear()
                if node.begun and not node.opened:
                    node.open()
                while node.preparing:
                    node.prepare()
                while node.dying:
                    node.end(node.dying[0])
                while node.grant():
                    pass
                if node.opened:
                    node.ask()
                while node.outbox:
                    node.deliver()
            quiet = quiet + 1 if self._state() == before else 0
            if quiet == 3:
                return
        pytest.fail("it does not come to rest")

    def _state(self) -> object:
        return [(node.told, node.heard, len(node.held), node.requested) for node in self.nodes]

    def close(self) -> None:
        self.group.close()


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the group look at its nodes in each turn, and deal jobs again that were not started."""
    monkeypatch.setattr(node_group, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(group_jobs, "LATE_SECONDS", 0.0)


@contextmanager
def some_history(seed: int, directory: Path, requests: list[Request]) -> Iterator[History]:
    """Play a random history, and end it after the block."""
    history = History(Random(seed), directory, requests)
    try:
        if seed % 2:
            history.rest()
        for _ in range(history.random.randrange(MAX_STEPS)):
            history.step()
        yield history
    finally:
        history.close()


@pytest.mark.parametrize("requests", [SINGLE, MIXED], ids=["single", "mixed"])
@pytest.mark.parametrize("seed", range(HISTORIES))
def test_limit_over_several_nodes_is_kept_in_random_histories(
    tmp_path: Path, seed: int, requests: list[Request]
) -> None:
    with some_history(seed, tmp_path, requests) as history:
        history.rest()


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_limit_over_several_nodes_is_used_at_rest_in_random_histories(tmp_path: Path, seed: int) -> None:
    with some_history(seed, tmp_path, SINGLE) as history:
        devices = sum(len(node.devices) for node in history.living)
        for limit in (history.throttle.devices, None, history.random.randint(0, devices)):
            history.change(Throttle(False, limit))
            history.rest()
            most = min(history.most, devices)
            assert history.in_use >= most
            for _ in range(12 if limit else 0):  # jobs end one by one: those that are too many, and then others
                before, node = history.in_use, history.random.choice([node for node in history.living if node.held])
                node.end(history.random.choice(node.machine.running()))
                history.rest()
                assert history.in_use == max(most, before - 1)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_all_jobs_end_under_a_limit_over_several_nodes_in_random_histories(tmp_path: Path, seed: int) -> None:
    with some_history(seed, tmp_path, MIXED) as history:
        random = history.random
        history.change(Throttle(False, random.randint(2, 6)))  # no job needs more than two devices
        history.rest()
        history.all_offered = True
        history.group.say(AllOffered())
        history.rest()
        while running := [(node, number) for node in history.living for number in node.machine.running()]:
            node, number = random.choice(running)
            if number not in node.retried and random.random() < 0.5:
                node.fail(number)
            else:
                node.end(number)
            history.rest()
        assert history.ended == history.offered
