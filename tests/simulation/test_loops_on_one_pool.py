"""Several real job loops on one pool in memory, with made-up processes, a made-up clock and every accident there is.

The world moves in single steps: one step of one loop, or one event of the world between two such steps. So a seed is a
history, and a failing one can be replayed.
"""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_launcher.allocation.request_queue import RequestQueue
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.errors import ServerDiedError
from gpu_launcher.jobs import loop as loop_module
from gpu_launcher.jobs.events import JobStarted, Outcome
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.loop import MAX_SERVERS_LOST, JobLoop
from gpu_launcher.jobs.machine import Limits
from gpu_launcher.jobs.node_messages import Ended, Message
from gpu_launcher.jobs.source import Exhausted, Offer, Statement, Stop
from gpu_launcher.model import Owner, Request
from gpu_launcher.processes.fork_server_client import SUPERVISOR_DIED, JobProcess, Lost
from gpu_launcher.processes.messages import (
    Assignment,
    ChannelClosedError,
    Grant,
    HoldLease,
    JobExited,
    JobPrepared,
    KillJob,
    LogFile,
    Report,
    SignalJob,
    channel,
    receive,
    send,
)
from tests.memory_ledger import MemoryLedger, MemoryPool

DEVICES = simulated_devices(4)
STEP_LIMIT = 3000
SERVER_LOST = "was ended because the fork server was killed"


@dataclass
class FakeJob:
    """A job's supervisor and its processes in one: the other ends of its channels, and what it holds."""

    world: World
    sweep: Sweep
    number: int
    result: Path
    supervisor: socket.socket
    channel: socket.socket
    state: str = "preparing"
    doomed: bool = False
    """Its fork server is dead."""
    lease: list[int] = field(default_factory=list)
    devices: tuple[int, ...] = ()

    def listen(self) -> None:
        while self.state != "dead" and _readable(self.supervisor):
            try:
                message, descriptors = receive(self.supervisor)
            except ChannelClosedError:
                self.die(None)
                return
            match message:
                case HoldLease():
                    self.lease += descriptors
                case KillJob():
                    self.die(SIGKILL)
                case SignalJob(signum):
                    self.die(signum)
        while self.state != "dead" and _readable(self.channel):
            message, descriptors = receive(self.channel)
            self.lease += descriptors
            if isinstance(message, Grant):
                self.run(message)
            elif isinstance(message, LogFile):
                assert self.state == "prepared", "it opens its log before it runs"
            else:
                assert isinstance(message, Assignment)
                assert message.number == self.number

    def prepare(self) -> None:
        self.state = "prepared"
        send(self.channel, JobPrepared(Request(self.sweep.wants[self.number]), f"{self.number}.log", self.number))

    def run(self, grant: Grant) -> None:
        assert self.state == "prepared"
        self.state = "running"
        visible = grant.environment["CUDA_VISIBLE_DEVICES"]
        self.devices = tuple(int(index) for index in visible.split(",") if index not in ("", "-1"))
        assert len(self.devices) == self.sweep.wants[self.number]
        assert len(self.lease) == (2 if self.devices else 0)
        for device in self.devices:
            assert device not in self.world.held, f"device {device} is held twice"
            self.world.held[device] = self
        self.sweep.ran[self.number] += 1
        assert self.sweep.ran[self.number] == 1, f"job {self.number} runs twice"

    def finish(self) -> None:
        self.result.write_bytes(Report(True, None, b"%d" % self.number).dump(self.number))
        self.sweep.finished.add(self.number)
        self.die(0)

    def die(self, status: int | None) -> None:
        """End the tree. `status` None: the supervisor has died, too, and cannot tell."""
        if self.state == "dead":
            return
        self.state = "dead"
        for device in self.devices:
            del self.world.held[device]
        self.channel.close()
        for descriptor in self.lease:
            os.close(descriptor)
        if status is not None:
            try:
                send(self.supervisor, JobExited(status, self.doomed))
            except ChannelClosedError:
                assert not self.sweep.going
        self.supervisor.close()
        self.sweep.processes.remove(self)


class FakeServer:
    """A fork server and its guard."""

    def __init__(self, world: World, sweep: Sweep) -> None:
        self._world = world
        self._sweep = sweep
        self._open()

    def _open(self) -> None:
        self._control, self._end = channel()
        self.alive = True

    def fileno(self) -> int:
        return self._control.fileno()

    def receive(self) -> Lost | None:
        try:
            lost: Lost = receive(self._control)[0]
        except ChannelClosedError:
            raise ServerDiedError("killed") from None
        return lost

    def finished(self, process: JobProcess) -> None:
        process.close()

    def start(
        self,
        number: int,
        spec: object,
        result: Path,
        attempt: int,
        about: object,
        title: str,
        to_source: int | None,
    ) -> JobProcess:
        accident = self._world.accident()
        if self.alive and accident < 0.15 and self._sweep.servers_lost < MAX_SERVERS_LOST - 1:
            self.die()
        if not self.alive:
            raise ServerDiedError("killed")
        supervisor, supervisor_end = channel()
        job, job_end = channel()
        send(job, Assignment(number, spec, str(result), attempt))
        if accident > 0.98:
            supervisor_end.close()
            job_end.close()
            self._sweep.accidents[number] = "could not be started: no memory"
            send(self._end, Lost(number, "could not be started: no memory"))
        else:
            self._sweep.processes.append(FakeJob(self._world, self._sweep, number, result, supervisor_end, job_end))
        return JobProcess(number, supervisor, job, slot=number)

    def lose_supervisor(self, job: FakeJob) -> None:
        job.die(None)
        self._sweep.accidents[job.number] = "its supervisor was killed"
        send(self._end, Lost(job.number, SUPERVISOR_DIED))

    def die(self) -> None:
        self.alive = False
        self._end.close()
        self._sweep.servers_lost += 1
        for job in self._sweep.processes:
            job.doomed = True
            if job.state == "running":
                self._sweep.accidents[job.number] = SERVER_LOST

    def restart(self, in_child: Callable[[], None]) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        for job in list(self._sweep.processes):
            job.listen()
            job.die(self._world.chance.choice([SIGKILL, None]))
        self._control.close()
        self._end.close()


class ListSource:
    """Offers the jobs of a list as they are wanted, and keeps their results."""

    def __init__(self, jobs: list[Job], tick: Callable[[], None]) -> None:
        self.tick = tick
        self._left = deque(jobs)
        self._statements: list[Statement] = []
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.offered: list[int] = []
        self.started: Counter[int] = Counter()
        self.results: dict[int, JobResult] = {}

    def say(self, statement: Statement) -> None:
        self._statements.append(statement)
        os.eventfd_write(self._ready, 1)

    def fileno(self) -> int:
        return self._ready

    def receive(self) -> list[Statement]:
        os.eventfd_read(self._ready)
        statements, self._statements = self._statements, []
        return statements

    def request_jobs(self, count: int) -> None:
        for _ in range(min(count, len(self._left))):
            job = self._left.popleft()
            self.offered.append(job.number)
            self.say(Offer(job))
        if not self._left:
            self.say(Exhausted())

    def send(self, message: Message) -> None:
        match message:
            case JobStarted(number=number):
                self.started[number] += 1
            case Ended(result):
                assert result.number not in self.results, f"job {result.number} has two results"
                self.results[result.number] = result

    def close_in_child(self) -> None:
        raise AssertionError("nothing is forked")

    def close(self) -> None:
        os.close(self._ready)


class Baton:
    """Lets one sweep's thread run until it hands the baton back."""

    def __init__(self) -> None:
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)

    def lend(self) -> None:
        self._go.release()
        self._back.acquire()

    def wait(self) -> None:
        self._go.acquire()

    def hand_back(self) -> None:
        self._back.release()


class Sweep:
    """One launching program: a job loop in a thread."""

    def __init__(self, world: World, wants: list[int], parallel: int | None) -> None:
        self.wants = wants
        self.processes: list[FakeJob] = []
        self.ran: Counter[int] = Counter()
        self.finished: set[int] = set()
        self.accidents: dict[int, str] = {}
        self.servers_lost = 0
        self.stopped = False
        self.error: BaseException | None = None
        self.going = True
        self.server = FakeServer(world, self)
        self.ledger = MemoryLedger(world.pool)
        self.directory = TemporaryDirectory()
        self.queue = RequestQueue(
            DEVICES, self.ledger, busy_memory=None, tell=lambda text: None, clock=lambda: world.now
        )
        self.source = ListSource([Job(number, f"n={number}", None) for number in range(len(wants))], self._tick)
        limits = Limits(parallel, 2, ahead=world.chance.randint(1, 4), preparing=2, grace=5.0)
        self.loop = JobLoop(
            self.source,
            limits=replace(limits, at_once=len(DEVICES), listed=world.chance.random() < 0.5),
            server=self.server,
            queue=self.queue,
            owner=lambda job: Owner(1, "ada", f"#{job.number}"),
            clock=lambda: world.now,
            report_path=lambda number: Path(self.directory.name) / f"{number}.report",
        )
        self.baton = Baton()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.baton.wait()
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error
        self.going = False
        self.server.close()
        self.queue.close()
        self.source.close()
        self.directory.cleanup()
        self.baton.hand_back()

    def stop(self) -> None:
        self.stopped = True
        self.source.say(Stop())

    def _tick(self) -> None:
        self.baton.hand_back()
        self.baton.wait()

    def check(self) -> None:
        if self.error is not None:
            raise self.error
        numbers = list(range(len(self.wants)))
        assert self.source.offered == numbers[: len(self.source.offered)], "they are offered in order"
        assert sorted(self.source.results) == self.source.offered
        assert self.source.offered == numbers or self.stopped or self.servers_lost > 1, "only who gives up leaves some"
        assert self.source.started == self.ran or self.servers_lost or self.accidents or self.stopped
        for result in self.source.results.values():
            self._check(result)

    def _check(self, result: JobResult) -> None:
        number = result.number
        if number in self.finished:
            assert result.outcome is Outcome.COMPLETED
            assert result.payload == b"%d" % number
            assert len(result.devices) == self.wants[number]
        elif self.stopped:
            assert result.outcome in (Outcome.CANCELLED, Outcome.FAILED)
        else:
            assert result.outcome is Outcome.FAILED
            causes = {self.accidents[number]} if number in self.accidents else set()
            if self.wants[number] > len(DEVICES):
                causes.add(f"its request is for {self.wants[number]} devices")
            if self.servers_lost:  # it may have been granted its devices without having heard of that yet
                causes |= {SERVER_LOST, "was not run: the fork server"}
            assert any(cause in result.message for cause in causes)


class World:
    """All that the sweeps share, and the steps that it can take."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.pool = MemoryPool()
        self.held: dict[int, FakeJob] = {}
        self.accidents_left = self.chance.randint(0, 400)
        self.sweeps = [self._sweep() for _ in range(self.chance.randint(1, 3))]

    def _sweep(self) -> Sweep:
        wants = self.chance.choices([0, 1, 1, 1, 2, 3, 4, 5], k=self.chance.randint(0, 8))
        return Sweep(self, wants, self.chance.choice([None, 1, 2]))

    def accident(self) -> float:
        """Between 0 and 1; no accident happens at 0.5, when there have been enough of them."""
        self.accidents_left -= 1
        return self.chance.random() if self.accidents_left > 0 else 0.5

    def step(self) -> None:
        going = [sweep for sweep in self.sweeps if sweep.going]
        sweep = self.chance.choice(going)
        if self.chance.random() < 0.5:
            sweep.baton.lend()
        elif sweep.processes:
            self._move(sweep, self.chance.choice(sweep.processes))
        self.now += self.chance.random() * 0.2
        if self.accident() < 0.005 and sweep.going and not sweep.stopped:
            sweep.stop()
        leased = {uuid for view in self._leases() for uuid in view.uuids}
        assert {f"SIMULATED-{device}" for device in self.held} <= leased, "a running job's devices are leased"

    def _leases(self):
        ledger = MemoryLedger(self.pool)
        try:
            return ledger.snapshot().leases
        finally:
            ledger.close()

    def _move(self, sweep: Sweep, job: FakeJob) -> None:
        job.listen()
        if job.state == "dead":
            return
        accident = self.accident()
        if job.doomed:
            job.die(self.chance.choice([SIGKILL, None]))
        elif accident < 0.03:
            sweep.server.lose_supervisor(job)
        elif accident < 0.06:
            sweep.accidents[job.number] = "was killed by SIGKILL"
            job.die(SIGKILL)
        elif accident < 0.08 and sweep.servers_lost < MAX_SERVERS_LOST - 1:
            sweep.server.die()
        elif job.state == "preparing":
            job.prepare()
        elif job.state == "running" and self.chance.random() < 0.3:
            job.finish()

    def end(self) -> None:
        self.pool.close()


def _readable(source: socket.socket) -> bool:
    return bool(select.select([source], [], [], 0)[0])


@pytest.fixture(autouse=True)
def no_loop_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world says when anything happens: a loop that waits would wait for ever."""
    monkeypatch.setattr(loop_module, "TICK", 0.0)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def check_history(seed: int) -> None:
    world = World(seed)
    steps = 0
    while any(sweep.going for sweep in world.sweeps):
        steps += 1
        assert steps < STEP_LIMIT, f"the sweeps do not end: {[sweep.processes for sweep in world.sweeps]}"
        world.step()
    for sweep in world.sweeps:
        sweep.check()
    assert not world.held
    assert world._leases() == ()
    world.end()


def test_sweeps_on_one_pool_never_share_a_device_and_bring_every_job_to_one_result():
    check_history()
