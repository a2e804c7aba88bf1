"""Several nodes with agents played by the tests: who gets which job, and what becomes of the jobs of a lost node."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import GaveUp, JobRetried, JobStarted, NodesChanged, Notice, Outcome
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Opened, Wanted
from gpu_launcher.jobs.outcome import classify_exit, left_by, not_started
from gpu_launcher.jobs.reports import ReportFiles
from gpu_launcher.jobs.source import Cancel, Exhausted, Offer, Stop
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.nodes import node_group
from gpu_launcher.nodes.agent_messages import Beat, Bye, HostedProgram, Leaving, Loaded, Setup, Timing, hello
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.nodes.node_group import MAX_FAILURES, NodeGroup
from gpu_launcher.processes.messages import INTERRUPTED, ChannelClosedError, Report
from tests.unit.test_remote_node import BRIDGE
from tests.waiting import until

TIMING = Timing(beat=0.05, quiet=1e6, silence=1e6, lost=1e6)
"""Nodes are lost when their agents say so. No test depends on the time."""


class Program:
    """What the jobs would run."""


class Agent:
    """A node's agent, played by the test."""

    def __init__(self, directory: Path, name: str, devices: int = 2) -> None:
        self.name = name
        self.devices = simulated_devices(devices)
        self.heard: list[Any] = []
        self.beats = 0
        self._listener = socket.socket(socket.AF_UNIX)
        address = directory / f"{name}.socket"
        self._listener.bind(str(address))
        self._listener.listen()
        self._listener.settimeout(60)
        self.command = (sys.executable, "-S", "-c", BRIDGE, str(address))
        self._connections: list[tuple[socket.socket, FrameStream]] = []

    @property
    def stream(self) -> FrameStream:
        return self._connections[-1][1]

    def connect(self) -> None:
        """Accept the connection of the command."""
        connection, _ = self._listener.accept()
        descriptor = os.dup(connection.fileno())
        self._connections.append((connection, FrameStream(descriptor, descriptor)))

    @property
    def called(self) -> bool:
        """Whether the command was started and waits to be accepted."""
        return bool(select.select([self._listener], [], [], 0)[0])

    def listen(self) -> None:
        """Receive what the head has sent, unless one of the two has closed the connection."""
        messages: list[Any] = []
        if self._connections and self.stream.fileno() >= 0:
            with contextlib.suppress(ChannelClosedError):
                messages = self.stream.receive()
        for message in messages:
            if message == Beat():
                self.beats += 1
            else:
                self.heard.append(message)

    def take(self, kind: type) -> Any:
        """Return the next message of this kind. It is removed."""
        found = next(message for message in self.heard if isinstance(message, kind))
        self.heard.remove(found)
        return found

    def close(self) -> None:
        for connection, stream in self._connections:
            stream.close()
            connection.close()
        self._listener.close()


class Group:
    """A group of nodes, and what it tells the head."""

    def __init__(self, directory: Path, agents: dict[str, Agent]) -> None:
        self.agents = agents
        self.told: list[Any] = []
        self.reports = ReportFiles(directory)
        self.node = NodeGroup(
            [NodeSpec(name, agent.command) for name, agent in agents.items()],
            lambda: pytest.fail("no node is on this machine"),
            HostedProgram(Program(), as_proposed),  # type: ignore[arg-type]
            directory,
            method="auto",
            option="start_method",
            arguments=["program"],
            imports_script=True,
            timing=TIMING,
        )

    def turn(self) -> None:
        """Let the group and the agents receive what has arrived."""
        self.told += self.node.receive_ready()
        self.node.tick()
        for agent in self.agents.values():
            agent.listen()

    def until(self, condition: Callable[[], object], what: str = "it did not happen") -> None:
        """Take turns until the condition is true."""

        def turned() -> object:
            self.turn()
            return condition()

        until(turned, what)

    def begin(self, **options: Any) -> None:
        """Begin a run in which the pools of all nodes are open."""
        self.begin_run(**options)
        for agent in self.agents.values():
            self.open(agent)
        self.node.open()

    def begin_run(self, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "devices": None,
            "request": None,
            "max_parallel": None,
            "grace": 10.0,
            "pool_dir": None,
            "busy_memory": None,
            "device_environment": DeviceEnvironment(),
        }
        self.node.say(BeginRun(Options(**{**defaults, **options}), self.reports, "program", shown=True, listed=True))

    def open(self, agent: Agent) -> None:
        """Let an agent load the program and open its pool."""
        agent.connect()
        agent.stream.greet()
        agent.stream.send(hello())
        self.until(lambda: any(isinstance(message, Setup) for message in agent.heard), "no program")
        agent.take(Setup)
        agent.stream.send(Loaded(False))
        self.until(lambda: any(isinstance(message, BeginRun) for message in agent.heard), "no run")
        agent.take(BeginRun)
        agent.stream.send(Opened(agent.devices, len(agent.devices), "fork"))
        self.until(lambda: self.node._members[agent.name].opened, "it did not join")

    def says(self, name: str, *messages: object) -> None:
        """Let a node say something, and wait until the group knows."""
        node = self.node._members[name].node
        for message in messages:
            self.agents[name].stream.send(message)
        before = node._stream.received  # type: ignore[union-attr]
        self.until(lambda: node._stream.received > before)  # type: ignore[union-attr]

    def gets(self, name: str, number: int) -> Job:
        """Wait until a node is offered a job."""
        agent = self.agents[name]

        def offers() -> list[Offer]:
            return [one for one in agent.heard if isinstance(one, Offer) and one.job.number == number]

        self.until(offers, f"{name} is not offered job {number}")
        (offer,) = offers()
        agent.heard.remove(offer)
        return offer.job

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()
        self.node.close()


Start = Callable[..., Group]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a group of nodes: `start("a", "b")`. All have two devices, or `start(a=1, b=4)`."""
    groups: list[Group] = []
    directory = tmp_path_factory.mktemp("g")  # the path of a socket is short

    def start(*names: str, **devices: int) -> Group:
        sizes = {**dict.fromkeys(names, 2), **devices}
        groups.append(Group(directory, {name: Agent(directory, name, count) for name, count in sizes.items()}))
        return groups[-1]

    yield start
    for group in groups:
        group.close()


def test_signs_of_life_do_not_wait_for_the_file_system(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled, over = threading.Event(), threading.Event()

    def utime(path: Path) -> None:
        stalled.set()
        over.wait(60)

    monkeypatch.setattr(os, "utime", utime)
    group = start("a")
    try:
        group.begin()
        assert stalled.wait(60)
        agent = group.agents["a"]
        agent.listen()
        before = agent.beats
        group.until(lambda: agent.beats > before + 10, "signs of life wait for the file system")
    finally:
        over.set()


def job(number: int = 0) -> Job:
    return Job(number, f"n={number}", None)


def started(number: int = 0) -> JobStarted:
    return JobStarted(0.0, number, f"n={number}", simulated_devices(1), f"{number}/job.log")


def dealt_to_a(group: Group) -> None:
    """Let node a have job 0, and node b ask for one."""
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("b", Wanted(1))


def results(group: Group) -> list[JobResult]:
    return [message.result for message in group.told if isinstance(message, Ended)]


REPORTS = {
    Outcome.COMPLETED: Report(ok=True, message=None, payload=b"value"),
    Outcome.PRUNED: Report(ok=False, pruned=True, message="was pruned", payload=b"pruned"),
    Outcome.FAILED: Report(ok=False, message="raised OSError", payload=b"error", origin="line 7"),
}


@pytest.mark.parametrize("heard", ["start", "nothing"])
@pytest.mark.parametrize("outcome", REPORTS)
def test_job_that_ended_on_a_lost_node_is_concluded_from_its_report(start: Start, outcome: Outcome, heard: str) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    if heard == "start":
        group.says("a", started())
    group.reports.path(0).write_bytes(REPORTS[outcome].dump(0))
    group.says("a", Bye())
    group.until(lambda: results(group), "no result")
    (result,) = results(group)
    report = REPORTS[outcome]
    assert (result.outcome, result.payload, result.message) == (outcome, report.payload, report.message)
    assert (result.origin, result.attempts) == (report.origin, 1)
    assert result.devices == (simulated_devices(1) if heard == "start" else ())
    assert result.cause is (Cause.EXCEPTION if outcome is Outcome.FAILED else None)
    group.node.say(Offer(job(1)))
    group.gets("b", 1)
    assert not any(isinstance(message, Offer) for message in group.agents["b"].heard), "it is run again"
    assert [message.number for message in group.told if isinstance(message, JobStarted)] == [0]


def test_job_that_failed_on_a_lost_node_is_retried_elsewhere(start: Start) -> None:
    group = start("a", "b")
    group.begin(failures=FailurePolicy(retries=1, retry_on=frozenset(Cause)))
    dealt_to_a(group)
    group.says("a", started())
    group.reports.path(0).write_bytes(REPORTS[Outcome.FAILED].dump(0))
    group.says("a", Bye())
    again = group.gets("b", 0)
    assert (again.attempts_before, again.failed_before) == (1, 1)
    assert not group.reports.path(0).exists()
    (retried,) = (message for message in group.told if isinstance(message, JobRetried))
    assert (retried.attempt, retried.attempts, retried.message) == (2, 2, "raised OSError")
    assert results(group) == []


KILLED = Report(ok=False, message="was killed by SIGTERM", payload=b"error", killed=True)


@pytest.mark.parametrize("end", ["leaves", "lost"])
def test_job_whose_command_was_killed_with_its_node_runs_elsewhere(start: Start, end: str) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started())
    group.reports.path(0).write_bytes(KILLED.dump(0))
    if end == "lost":
        group.says("a", Bye())
    else:
        outcome, cause = classify_exit(KILLED, unwanted=False, timed_out=False, device_lost=False, out_of_memory=False)
        result = JobResult(0, "n=0", outcome, KILLED.payload, KILLED.message, (), 1.0, None, cause)
        group.says("a", Leaving("got SIGTERM"), Ended(result))
    again = group.gets("b", 0)
    assert (again.attempts_before, again.failed_before) == (1, 0)
    assert not group.reports.path(0).exists()
    assert results(group) == []


def test_job_that_moves_takes_its_attempts_along(start: Start) -> None:
    group = start("a", "b", "c")
    group.begin(failures=FailurePolicy(retries=3))
    dealt_to_a(group)
    retried = JobRetried(0.0, 0, "n=0", 1.0, "was killed", None, attempt=2, attempts=4)
    group.says("a", started(), retried, started(), Bye())
    moved = group.gets("b", 0)
    assert (moved.attempts_before, moved.failed_before) == (2, 1)
    group.says("c", Wanted(1))
    group.says("b", started(), Bye())
    moved = group.gets("c", 0)
    assert (moved.attempts_before, moved.failed_before) == (3, 1)


def test_job_that_is_not_started_before_its_node_is_lost_has_no_attempt(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", Bye())
    moved = group.gets("b", 0)
    assert (moved.attempts_before, moved.failed_before) == (0, 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lost nodes be started again at once."""
    plan = NodeGroup._plan_restart

    def at_once(group: NodeGroup, member: Any) -> Any:
        planned = plan(group, member)
        if member.restart_at is not None:
            member.restart_at = 0.0
        return planned

    monkeypatch.setattr(NodeGroup, "_plan_restart", at_once)


def gave_up(group: Group) -> list[GaveUp]:
    return [message for message in group.told if isinstance(message, GaveUp)]


def test_node_that_gave_up_is_not_started_again(start: Start, impatient: None) -> None:
    group = start("a")
    group.begin()
    group.says("a", GaveUp(0.0, "was not run: the fork server was killed 5 times"), Closed())
    group.until(lambda: gave_up(group), "the head is not told that no node is left")
    assert not group.agents["a"].called


def returns(group: Group) -> None:
    """Let node a come back after it was lost."""
    group.until(lambda: group.agents["a"].called, "it is not started again")
    group.open(group.agents["a"])


def loses(group: Group, number: int) -> None:
    """Let node a start a job, and be lost."""
    group.says("a", Wanted(1))
    if group.node._dealer.job(number) is None:
        group.node.say(Offer(job(number)))
    group.gets("a", number)
    group.says("a", started(number), Bye())


def test_node_that_completes_nothing_is_set_aside(start: Start, impatient: None) -> None:
    group = start("a")
    group.begin()
    for _ in range(MAX_FAILURES):
        loses(group, 0)
        returns(group)
    loses(group, 0)
    group.until(lambda: gave_up(group), "the head is not told that no node is left")


def test_node_that_completes_jobs_is_started_again_and_again(start: Start, impatient: None) -> None:
    group = start("a")
    group.begin()
    for number in range(MAX_FAILURES + 2):
        group.says("a", Wanted(1))
        group.node.say(Offer(job(number)))
        group.gets("a", number)
        result = JobResult(number, f"n={number}", Outcome.COMPLETED, b"value", None, (), 1.0, None)
        group.says("a", started(number), Ended(result), Bye())
        returns(group)
    assert len(results(group)) == MAX_FAILURES + 2
    assert not gave_up(group)


def test_lost_job_waits_for_a_node_that_has_not_lost_it(start: Start, impatient: None) -> None:
    group = start("a", "b")
    group.begin()
    group.says("b", Wanted(1))
    group.node.say(Offer(job(1)))
    group.gets("b", 1)
    loses(group, 0)
    returns(group)
    group.says("a", Wanted(2))
    group.node.say(Offer(job(2)))
    group.gets("a", 2)
    assert not any(isinstance(message, Offer) for message in group.agents["a"].heard), "it is where it was lost"
    group.says("b", Leaving("got SIGTERM"))
    group.gets("a", 0)


@pytest.mark.parametrize("by", ["user", "failures"])
def test_stop_does_not_kill_jobs_that_a_leaving_node_has_interrupted(start: Start, by: str) -> None:
    group = start("a", "b")
    group.begin(failures=FailurePolicy(most=1))
    dealt_to_a(group)
    group.says("a", Leaving("got SIGTERM"))
    if by == "user":
        group.node.say(Stop())
    else:
        group.node.say(Offer(job(1)))
        group.gets("b", 1)
        result = JobResult(1, "n=1", Outcome.FAILED, b"error", "raised OSError", (), 1.0, None, Cause.EXCEPTION)
        group.says("b", Ended(result))
    group.until(lambda: Stop() in group.agents["b"].heard, "node b is not told to stop")
    group.node.say(Stop())
    group.until(lambda: group.agents["b"].heard.count(Stop()) == 2, "node b is not told again")
    group.until(lambda: Stop() in group.agents["a"].heard, "node a is not told at the second stop")
    assert group.agents["a"].heard.count(Stop()) == 1


def test_sweep_waits_for_a_node_that_was_lost_before_others_came(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_group, "FIRST_NODE_SECONDS", 0.0)
    group = start("a")
    group.begin_run()
    group.open(group.agents["a"])
    group.says("a", Bye())
    assert group.node.open().devices == ()
    returns(group)
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)


def test_jobs_that_were_started_when_the_last_node_was_lost_are_not_said_not_to_have_run(start: Start) -> None:
    group = start("a")
    group.begin()
    group.says("a", Wanted(2))
    for number in range(2):
        group.node.say(Offer(job(number)))
        group.gets("a", number)
    group.says("a", started(0), GaveUp(0.0, "was not run: the fork server was killed 5 times"), Bye())
    group.until(lambda: Closed() in group.told, "the run does not end")
    (result,) = results(group)
    assert (result.number, result.outcome, result.cause) == (0, Outcome.FAILED, Cause.CRASH)
    assert result.message == "was ended because its node was lost, and no node is left"
    assert result.unsupervised, "a search does not queue it again"
    assert not any("elsewhere" in message.text for message in group.told if isinstance(message, NodesChanged))


def test_stop_says_that_jobs_of_a_silent_node_may_run(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(3))
    for number in range(3):
        group.node.say(Offer(job(number)))
        group.gets("a", number)
    group.says("a", replace(started(0), pid=os.getpid()), started(2))
    group.agents["a"].close()
    group.until(lambda: group.node._members["a"].silent, "the connection is not lost")
    (notice,) = (message for message in group.told if isinstance(message, Notice))
    assert "node a lost its connection: its 2 jobs may still run there for " in notice.text
    group.reports.path(2).write_bytes(REPORTS[Outcome.COMPLETED].dump(2))
    group.node.say(Stop())
    group.says("b", Closed(None, True))
    group.until(lambda: any(isinstance(message, Closed) for message in group.told), "the run does not end")
    pids = {message.pid for message in group.told if isinstance(message, JobStarted)}
    assert pids == {None}, "the process is one of another machine"
    runs, offered, done = results(group)
    assert (runs.outcome, runs.message) == (Outcome.CANCELLED, "may still run on a, which cannot be reached")
    assert runs.duration is not None
    assert offered.outcome is Outcome.CANCELLED
    assert offered.message == "may have been started on a, which cannot be reached"
    assert (done.outcome, done.payload) == (Outcome.COMPLETED, b"value")
    assert isinstance(group.told[-1], Closed)


@pytest.mark.parametrize("was_started", [False, True])
def test_job_that_is_not_started_in_time_goes_to_an_idle_node(
    start: Start, monkeypatch: pytest.MonkeyPatch, was_started: bool
) -> None:
    monkeypatch.setattr(node_group, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.node.say(Exhausted())
    group.until(lambda: any(isinstance(one, Cancel) for one in group.agents["a"].heard), "it is not taken back")
    assert group.agents["a"].take(Cancel) == Cancel(0, "was not started", unstarted=True)
    result = not_started(job(), 1, "was not started", cancelled=True)
    if was_started:
        result = left_by(job(), REPORTS[Outcome.COMPLETED], started(), 1, unwanted=False)
        group.says("a", started())
    group.says("a", Ended(result))
    if was_started:
        group.until(lambda: results(group), "no result")
        assert results(group) == [result]
        return
    group.gets("b", 0)
    for _ in range(3):
        group.turn()
    assert not any(isinstance(one, Cancel) for one in group.agents["b"].heard), "it is taken back twice"
    assert results(group) == []


def refusal(name: str) -> Ended:
    result = not_started(job(), 1, f"cannot be run: its request is for more than {name} has")
    result = replace(result, refused=True)
    return Ended(result)


def test_job_that_one_node_can_never_run_goes_to_another(start: Start) -> None:
    group = start("a", "b", "c")
    group.begin()
    dealt_to_a(group)
    group.says("a", refusal("a"), Wanted(9))
    group.gets("b", 0)
    group.says("b", refusal("b"), Wanted(9))
    for _ in range(20):
        group.turn()
    assert results(group) == [], "node c may be able to run it"
    group.says("c", Wanted(1))
    group.gets("c", 0)
    group.says("c", refusal("c"))
    group.until(lambda: results(group), "no result")
    assert results(group)[0].message == "cannot be run: its request is for more than c has"


def test_job_that_only_a_lost_node_could_run_fails(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_group, "MAX_FAILURES", 0)
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("a", refusal("a"))
    for _ in range(20):
        group.turn()
    assert results(group) == []
    group.says("b", Bye())
    group.until(lambda: results(group), "no result")
    assert results(group)[0].message == "cannot be run: its request is for more than a has"


@pytest.mark.parametrize("message", [INTERRUPTED, "raised OSError"])
def test_job_that_its_lost_node_interrupted_is_moved(start: Start, message: str) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started())
    group.reports.path(0).write_bytes(Report(False, message, b"error").dump(0))
    if message != INTERRUPTED:
        group.says("a", Leaving("got SIGTERM"))
    group.says("a", Bye())
    group.gets("b", 0)
    assert results(group) == []


def test_job_that_fails_because_its_node_interrupts_it_is_moved(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started(), Leaving("got SIGTERM"))
    result = JobResult(0, "n=0", Outcome.FAILED, b"error", "raised OSError", (), 1.0, None, Cause.EXCEPTION)
    group.says("a", Ended(result))
    group.gets("b", 0)
    assert results(group) == []


def test_job_that_fails_while_its_node_starts_no_more_jobs_is_not_moved(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started(), GaveUp(0.0, "was not run"))
    result = JobResult(0, "n=0", Outcome.FAILED, b"error", "raised OSError", (), 1.0, None, Cause.EXCEPTION)
    group.says("a", Ended(result))
    group.until(lambda: results(group), "no result")
    assert results(group) == [result]


def turn_often(group: Group) -> None:
    """Let the group do what it would do now."""
    for _ in range(20):
        group.turn()


@pytest.mark.usefixtures("impatient")
def test_refused_job_waits_for_the_only_node_that_can_run_it_while_that_node_will_come_back(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", refusal("a"), Wanted(9))
    group.gets("b", 0)
    killed = JobResult(0, "n=0", Outcome.FAILED, None, "was ended", (), 1.0, None, Cause.CRASH)
    group.says("b", started(), Leaving("got SIGTERM"), Ended(killed))
    turn_often(group)
    group.says("b", Closed(None, True))
    turn_often(group)
    assert results(group) == []


@pytest.mark.usefixtures("impatient")
def test_job_that_another_node_has_lost_is_taken_back_for_it_when_it_is_idle(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_group, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    loses(group, 0)
    group.says("b", Wanted(1))
    group.gets("b", 0)
    returns(group)
    group.says("a", Wanted(2))
    group.until(lambda: any(isinstance(one, Cancel) for one in group.agents["b"].heard), "it is not taken back")


@pytest.mark.usefixtures("impatient")
def test_lost_job_that_no_other_node_has_room_for_runs_where_it_was_lost(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_group, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    loses(group, 0)
    returns(group)
    group.says("a", Wanted(1))
    group.gets("a", 0)


@pytest.mark.usefixtures("impatient")
def test_job_that_is_kept_back_does_not_keep_others_from_idle_nodes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_group, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    group.says("b", Wanted(1))
    group.node.say(Offer(job(1)))
    group.gets("b", 1)
    loses(group, 0)
    returns(group)
    group.says("a", Wanted(2))
    group.until(lambda: any(isinstance(one, Cancel) for one in group.agents["b"].heard), "it is not taken back")


def test_job_that_ran_out_of_time_on_a_node_that_gave_up_has_failed(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    late = JobResult(0, "n=0", Outcome.FAILED, None, "ran longer than its timeout", (), 1.0, None, Cause.TIMEOUT)
    group.says("a", started(), GaveUp(0.0, "was not run"), Ended(late))
    group.until(lambda: results(group), "no result")
    assert results(group) == [late]
