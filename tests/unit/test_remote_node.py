"""A node at the other end of a command: what goes wrong at its start, and when it is silent and when gone."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from gpu_launcher.jobs.node_messages import Opened, Wanted
from gpu_launcher.jobs.source import Reply, Statement
from gpu_launcher.nodes import remote_node
from gpu_launcher.nodes.agent_messages import (
    Beat,
    Bye,
    EndAgent,
    Leaving,
    Loaded,
    Refused,
    Setup,
    Timing,
    hello,
    versions,
)
from gpu_launcher.nodes.engines import NodeSpec, read_nodes
from gpu_launcher.nodes.frames import MAGIC, FrameStream
from gpu_launcher.nodes.remote_node import START_SECONDS, Life, RemoteNode
from tests.descriptors import open_descriptors
from tests.waiting import alive, until

TIMING = Timing()
TICK = 0.25
"""Seconds of the clock between two calls of `tick`."""

# Connects its standard input and output to a socket, at which the test plays the agent. It passes on the end of each.
BRIDGE = """
import os, select, socket, sys
there = socket.socket(socket.AF_UNIX)
there.connect(sys.argv[1])
routes = {0: there.fileno(), there.fileno(): 1}
while routes:
    for source in select.select(list(routes), [], [])[0]:
        data = os.read(source, 65536)
        target = routes[source]
        if not data:
            del routes[source]
            os.close(1) if target == 1 else there.shutdown(socket.SHUT_WR)
        while data:
            data = data[os.write(target, data):]
"""

# Greets as an agent does, with the versions in its argument, and then waits for the end of its input.
OTHER_VERSIONS = """
import ast, os, pickle, struct, sys
hello = pickle.dumps({"versions": ast.literal_eval(sys.argv[1]), "host": "gpu2", "pid": 1, "python": "python"})
os.write(1, ast.literal_eval(sys.argv[2]) + struct.pack(">Q", len(hello)) + hello)
while os.read(0, 65536):
    pass
"""


# Starts a node twice while another thread runs, prints the processes of both commands, and waits.
HEAD = """
import os, sys, threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
from gpu_launcher.nodes.agent_messages import Setup, Timing
from gpu_launcher.nodes.engines import NodeSpec, read_nodes
from gpu_launcher.nodes.remote_node import RemoteNode
os.register_at_fork(before=lambda: print("fork", flush=True))
setup = Setup(Timing(), "/", (), b"", None, None, "auto", "start_method")
first = RemoteNode(NodeSpec("gpu2", ("sleep", "600")), setup)
second = first.again()
print(first._process.pid, second._process.pid, flush=True)
time.sleep(600)
"""


class Clock:
    """The time as nodes see it. It stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(remote_node, "time", clock)
    return clock


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[float]:
    """When a node has written something to its command."""
    times: list[float] = []

    class Watched(FrameStream):
        def flush(self) -> None:
            before = self.pending
            super().flush()
            if self.pending < before:
                times.append(clock.now)

    monkeypatch.setattr(remote_node, "FrameStream", Watched)
    return times


Start = Callable[..., RemoteNode]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a node with a command: `start("sh", "-c", "...")`. It is closed at the end."""
    nodes: list[RemoteNode] = []

    def start(*command: str) -> RemoteNode:
        setup = Setup(TIMING, "/", (), b"", None, None, "auto", "start_method")
        nodes.append(RemoteNode(NodeSpec("gpu2", command, "try it"), setup))
        return nodes[-1]

    yield start
    for node in nodes:
        node.close()


class Agent:
    """The test's side of a node: what an agent would say and hear."""

    def __init__(self, start: Start, clock: Clock, *before: str) -> None:
        self.clock = clock
        with tempfile.TemporaryDirectory(prefix="bridge-") as directory, socket.socket(socket.AF_UNIX) as listener:
            address = f"{directory}/socket"
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
            self.node = start(*before, sys.executable, "-S", "-c", BRIDGE, address)
            until(lambda: self.node.receive_ready() == [] and select.select([listener], [], [], 0)[0])
            self.socket, _ = listener.accept()
        descriptor = os.dup(self.socket.fileno())
        self.stream = FrameStream(descriptor, descriptor)
        self.heard: list[Any] = []

    def says(self, *messages: object) -> list[Any]:
        """Send messages, and return what the node makes of them once it has received all."""
        for message in messages:
            self.stream.send(message)
        self.stream.send(Wanted(99))
        passed: list[Any] = []
        until(lambda: passed.extend(self.node.receive_ready()) or passed[-1:] == [Wanted(99)])
        return passed[:-1]

    def hears(self, count: int) -> list[Any]:
        """Return the next messages for the agent, without signs of life."""

        def listen() -> bool:
            self.heard += [message for message in self.stream.receive() if message != Beat()]
            return len(self.heard) >= count

        until(listen, f"the agent hears only {self.heard}")
        first, self.heard = self.heard[:count], self.heard[count:]
        return first

    def greets(self, greeting: object = None) -> None:
        self.stream.greet()
        self.stream.send(greeting or hello())

    def loads(self) -> None:
        """Come to life."""
        self.greets()

        def receives_setup() -> bool:
            assert self.node.receive_ready() == []
            self.heard += [message for message in self.stream.receive() if message != Beat()]
            return bool(self.heard)

        until(receives_setup)
        setup, *self.heard = self.heard
        assert isinstance(setup, Setup)
        assert self.says(Loaded(False)) == []
        assert self.node.life is Life.LIVES

    def passes(self, seconds: float, *, until_gone: bool = False) -> None:
        """Let time pass, with ticks."""
        end = self.clock.now + seconds
        while self.clock.now < end and not (until_gone and self.node.life is Life.GONE):
            self.clock.now += TICK
            self.node.tick()
            if self.clock.now - self.node._sent >= TIMING.beat:
                self.node.beat()

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


@pytest.fixture
def agent(written: list[float], start: Start, clock: Clock) -> Iterator[Agent]:
    """An agent whose program is loaded."""
    agent = Agent(start, clock)
    agent.loads()
    yield agent
    agent.close()


def ended(node: RemoteNode) -> RemoteNode:
    """A node, once its command has ended and the node knows."""

    def has_ended() -> bool:
        node.tick()
        return node._process.poll() is not None

    until(has_ended)
    is_gone(node)
    return node


def is_gone(node: RemoteNode) -> None:
    """Wait until nothing of a node can be left."""

    def gone() -> bool:
        assert node.receive_ready() == []
        node.tick()
        return node.life is Life.GONE

    until(gone)


def reply(number: int, size: int = 0) -> Statement:
    return Reply(number, "x" * size)


# The start


def test_command_that_does_not_exist_raises(start):
    before = open_descriptors()
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        start("/opt/no-such-program", "--", "python")
    assert open_descriptors() <= before


def test_command_is_started_without_python_code_in_a_fork_and_ends_with_the_head():
    head = subprocess.Popen([sys.executable, "-c", HEAD], stdout=subprocess.PIPE, text=True)
    try:
        assert head.stdout is not None
        commands = [psutil.Process(int(pid)) for pid in head.stdout.readline().split()]
        until(lambda: all(command.name() == "sleep" for command in commands), "the command does not run")
        head.kill()
        until(lambda: not any(map(alive, commands)), "the command outlives the head")
    finally:
        head.kill()
        head.communicate()


def test_command_gets_the_usual_signals(start):
    node = ended(start("sh", "-c", "grep SigIgn /proc/self/status >&2"))
    assert node.problem is not None
    ignored = int(node.problem.partition(". Remedy: ")[0].split()[-1], 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


def test_other_versions_are_named_with_those_of_both_sides(start):
    theirs = {**versions(), "Python": "2.7", "hydra-core": "0.1"}
    del theirs["cloudpickle"]
    node = start(sys.executable, "-S", "-c", OTHER_VERSIONS, repr(theirs), repr(MAGIC))
    until(lambda: node.receive_ready() == [] and node.life is Life.GONE)
    ours = versions()
    assert node.problem == (
        "has Python 2.7, hydra-core 0.1, cloudpickle None, but this program runs with "
        f"Python {ours['Python']}, hydra-core {ours['hydra-core']}, cloudpickle {ours['cloudpickle']}. "
        "Remedy: install the same versions there"
    )


def test_agent_with_other_versions_is_asked_to_end_and_gets_no_program(written, start, clock):
    agent = Agent(start, clock)
    try:
        agent.node.say(reply(1))
        agent.greets({**hello(), "versions": {}})
        until(lambda: agent.node.receive_ready() == [] and agent.node.life is Life.GONE)
        assert agent.hears(1) == [EndAgent()]
        agent.passes(100)
        assert len(written) == 1
    finally:
        agent.close()


def test_command_that_ends_at_once_is_quoted_with_its_exit_status(start):
    node = start("sh", "-c", "echo 'Could not resolve hostname gpu2' >&2; exit 255")
    node._process.wait(60)  # without a tick, so that the error is read last
    is_gone(node)
    assert node.problem == (
        "did not start (exit status 255): Could not resolve hostname gpu2. "
        "Remedy: `try it` must succeed without a question"
    )


@pytest.mark.parametrize("ready", [False, True])
def test_node_is_interrupted_if_sigterm_ends_its_command_before_its_pool_is_open(start, clock, ready):
    agent = Agent(start, clock)
    try:
        agent.loads()
        if ready:
            agent.says(Opened((), 1, "fork"))
        agent.node._process.terminate()
        agent.node._process.wait(60)
        until(lambda: agent.node.receive_ready() == [] and agent.node.life is Life.SILENT)
        agent.passes(2 * TIMING.lost, until_gone=True)
        why = "lost its connection" if ready else "got SIGTERM before it could run jobs"
        assert agent.node.problem == f"{why} (exit status -15)"
        assert agent.node.interrupted is not ready
    finally:
        agent.close()


def test_command_that_prints_its_error_to_standard_output_is_quoted(start):
    node = ended(start("sh", "-c", "echo; echo 'This account is locked.'; exit 1"))
    assert node.problem is not None
    assert node.problem.startswith("did not start (exit status 1): This account is locked. Remedy: ")


def test_only_the_end_of_a_long_error_is_quoted(start):
    node = ended(start("sh", "-c", "yes 'line of a traceback' | head -n 10000 >&2; printf 'Key\\033[31mError\\n' >&2"))
    assert node.problem is not None
    quoted, _, _ = node.problem.partition(". Remedy: ")
    assert quoted.startswith("did not start (exit status 0): ")
    assert quoted.endswith("line of a traceback KeyError")
    assert len(quoted) < 400


def test_only_the_exception_of_a_traceback_is_quoted(start):
    node = ended(start(sys.executable, "-S", "-I", "-c", "import no_such_module"))
    assert node.problem is not None
    assert node.problem.startswith(
        "did not start (exit status 1): ModuleNotFoundError: No module named 'no_such_module'. Remedy: "
    )


def test_command_that_prints_for_ever_is_given_up_and_ended(start):
    node = start("yes", "I am not an agent")
    until(lambda: node.receive_ready() == [] and node.life is Life.GONE)
    assert node.problem is not None
    assert node.problem.startswith("did not start, but prints all the time: ")
    assert "I am not an agent" in node.problem
    until(lambda: node.tick() is None and node.command_ended)


def test_what_a_shell_prints_first_is_skipped(written, start, clock):
    agent = Agent(start, clock, "sh", "-c", 'yes "Welcome to gpu2" | head -n 10000; exec "$@"', "sh")
    try:
        agent.loads()
        assert agent.says(Wanted(1)) == [Wanted(1)]
    finally:
        agent.close()


def test_node_without_an_agent_may_wait_in_a_queue(start, clock):
    node = start("sh", "-c", "echo 'job 7 queued and waiting for resources'; exec cat")
    until(lambda: node.receive_ready() == [] and b"waiting" in node._stream.noise)
    clock.now += 100 * START_SECONDS
    node.tick()
    assert (node.life, node.problem) == (Life.STARTING, None)


def test_node_whose_program_never_loads_is_given_up(written, start, clock):
    agent = Agent(start, clock)
    try:
        agent.greets()
        until(lambda: agent.node.receive_ready() == [] and written)
        agent.passes(START_SECONDS)
        assert agent.node.life is Life.STARTING
        agent.passes(2)
        assert agent.node.life is Life.GONE
        assert agent.node.problem == f"has not imported the program after {START_SECONDS:.0f} s"
    finally:
        agent.close()


def test_agent_that_imports_the_program_is_ended_at_once(written, start, clock):
    agent = Agent(start, clock)
    try:
        agent.greets()
        until(lambda: agent.node.receive_ready() == [] and written)
        agent.node.ask_to_end()
        assert agent.node.life is Life.GONE
        assert agent.node._signalled is signal.SIGTERM or agent.node.command_ended
        until(lambda: agent.node.command_ended)
        assert agent.node.nothing_left
    finally:
        agent.close()


def test_agent_that_refuses_the_program_says_why(written, start, clock):
    agent = Agent(start, clock)
    try:
        agent.greets()
        assert agent.says(Refused("does not see the sweep's directory")) == []
        agent.close()
        until(lambda: agent.node.receive_ready() == [] and agent.node.life is Life.SILENT)
        agent.passes(2)
        assert agent.node.life is Life.GONE
        assert agent.node.unfit, "it would refuse the program again"
        assert agent.node.problem == "does not see the sweep's directory"
    finally:
        agent.close()


def test_what_is_said_before_the_greeting_follows_the_program(written, start, clock):
    agent = Agent(start, clock)
    try:
        agent.node.say(reply(1))
        agent.passes(60)
        agent.node.say(reply(2))
        assert written == [], "a message without a greeting would go to a shell"
        agent.loads()
        agent.node.say(reply(3))
        assert agent.hears(3) == [reply(1), reply(2), reply(3)]
    finally:
        agent.close()


# Life


def test_living_node_passes_messages_on_in_order(agent):
    assert agent.says(Wanted(1), Beat(), Leaving("got SIGTERM"), Wanted(2)) == [
        Wanted(1),
        Leaving("got SIGTERM"),
        Wanted(2),
    ]
    for number in range(20):
        agent.node.say(reply(number))
    assert agent.hears(20) == [reply(number) for number in range(20)]


def test_signs_of_life_keep_a_node_alive(agent, written, clock):
    for _ in range(20):
        agent.passes(TIMING.quiet - 1)
        assert agent.says(Beat()) == []
    assert agent.node.life is Life.LIVES
    assert max(later - earlier for earlier, later in itertools.pairwise(written)) <= TIMING.beat


def test_node_that_says_bye_is_gone_at_once(agent):
    agent.stream.send(Wanted(1))
    agent.stream.send(Bye())
    passed: list[Any] = []
    until(lambda: passed.extend(agent.node.receive_ready()) or agent.node.life is Life.GONE)
    assert passed == [Wanted(1)]
    assert agent.node.problem == "has ended"


def test_silent_node_is_gone_only_long_after_the_last_message_to_it(agent, written, clock):
    heard = clock.now
    agent.passes(1000, until_gone=True)
    assert agent.node.life is Life.GONE
    assert heard + TIMING.quiet - TIMING.beat <= written[-1] <= heard + TIMING.quiet
    assert written[-1] + TIMING.lost < clock.now <= written[-1] + TIMING.lost + TICK
    assert agent.node.problem == f"has been silent for {clock.now - heard:.0f} s"


def test_rest_of_a_message_counts_as_sent_when_it_is_sent(agent, written, clock):
    heard = clock.now
    agent.passes(TIMING.quiet - 1.5)
    agent.node.say(reply(1, size=5_000_000))
    kept = agent.node._stream.pending
    assert kept, "nobody reads it"
    clock.now = heard + TIMING.quiet  # at the next tick it is quiet

    def is_sent_in_part() -> bool:
        agent.stream.receive()
        agent.node.tick()
        return agent.node._stream.pending < kept

    until(is_sent_in_part)
    last = clock.now
    assert written[-1] == last
    agent.passes(1000, until_gone=True)
    assert written[-1] == last
    assert last + TIMING.lost < clock.now <= last + TIMING.lost + TICK


def test_nothing_is_sent_to_a_quiet_node_until_it_is_heard(agent, written, clock):
    agent.passes(TIMING.quiet + TICK)
    before = list(written)
    for number in range(3):
        agent.node.say(reply(number))
        agent.passes(5)
    assert written == before
    assert agent.node.life is Life.LIVES
    assert agent.says(Beat()) == []
    agent.node.say(reply(3))
    agent.passes(TICK)
    assert agent.hears(4) == [reply(number) for number in range(4)]
    agent.passes(TIMING.beat)
    assert written[-1] > clock.now - TIMING.beat, "signs of life are sent again"


def test_node_that_is_heard_again_without_news_gets_what_waits(agent, written):
    agent.passes(TIMING.quiet + TICK)
    agent.node.say(reply(1))
    agent.says()
    agent.passes(TICK)
    assert agent.hears(1) == [reply(1)]


def test_rest_of_a_message_is_not_sent_to_a_quiet_node(agent, written):
    agent.node.say(reply(1, size=5_000_000))
    assert agent.node._stream.pending
    agent.passes(TIMING.quiet + TICK)
    before = list(written)
    for _ in range(100):
        agent.stream.receive()
        agent.passes(TICK / 100)
    assert written == before
    assert agent.says() == []

    def is_sent() -> bool:
        agent.heard += [message for message in agent.stream.receive() if message != Beat()]
        agent.node.tick()
        return bool(agent.heard)

    until(is_sent)
    assert agent.heard == [reply(1, size=5_000_000)]


def test_node_without_connection_is_silent_until_its_agent_must_have_ended(agent, written, clock):
    agent.passes(5)
    agent.socket.shutdown(socket.SHUT_WR)  # the other direction still works
    until(lambda: agent.node.receive_ready() == [] and agent.node.life is Life.SILENT)
    sent = list(written)
    for number in range(5):
        agent.node.say(reply(number))
        agent.passes(2)
        assert agent.node.life is Life.SILENT
    agent.passes(1000, until_gone=True)
    assert written == sent, "it hears nothing more, so it ends"
    assert agent.node.problem == "lost its connection"
    assert written[-1] + TIMING.lost < clock.now <= written[-1] + TIMING.lost + TICK


# The end


def test_agent_that_is_asked_to_end_says_when_it_has(agent):
    agent.node.ask_to_end()
    assert agent.hears(1) == [EndAgent()]
    assert agent.says() == []
    assert agent.node.life is Life.LIVES
    agent.stream.send(Bye())
    agent.close()
    is_gone(agent.node)
    assert agent.node.nothing_left
    assert agent.node.problem == "has ended"
    until(lambda: agent.node.command_ended, "the command does not end with its connection")


def test_close_does_not_wait_for_an_agent(agent):
    agent.node.close()
    assert agent.node.life is Life.GONE
    assert agent.node.command_ended
    assert not agent.node.nothing_left


def test_program_is_sent_before_any_sign_of_life(start, clock):
    class Slow(str):
        """Takes so long to be pickled that the thread that sends signs of life comes first."""

        def __reduce__(self) -> tuple[type[str], tuple[str]]:
            agent.node.beat()
            return str, (str(self),)

    agent = Agent(start, clock)
    try:
        agent.node._setup = replace(agent.node._setup, directory=Slow("/"))
        agent.greets()
        heard: list[Any] = []
        until(lambda: agent.node.receive_ready() or heard.extend(agent.stream.receive()) or heard)
        assert isinstance(heard[0], Setup), heard
        agent.node.beat()
        until(lambda: heard.extend(agent.stream.receive()) or Beat() in heard, "no sign of life while it imports")
    finally:
        agent.close()


@pytest.mark.parametrize(("kind", "seconds"), [("ssh:gpu2", 5.0), ("slurm:1", 5.0), ("sbatch:1", 5.0), ("ray:1", 25.0)])
def test_command_has_as_long_to_end_as_its_engine_needs(agent, clock, monkeypatch, kind, seconds):
    (engine,) = read_nodes(kind)
    agent.node._spec = replace(agent.node._spec, end_seconds=engine.end_seconds)
    signals: list[signal.Signals] = []
    monkeypatch.setattr(agent.node, "_signal", signals.append)
    monkeypatch.setattr(RemoteNode, "command_ended", False)
    agent.node.disconnect()
    clock.now += seconds - TICK
    agent.node.tick()
    assert signals == []
    clock.now += 2 * TICK
    agent.node.tick()
    assert signals == [signal.SIGTERM]
    clock.now += remote_node.KILL_SECONDS
    agent.node.tick()
    assert signals[-1] == signal.SIGKILL


def test_child_that_cleans_up_after_srun_gets_none_of_its_signals(start, clock):
    node = start("sh", "-c", "sleep 1000 & trap '' TERM; echo ready; wait; wait")
    until(lambda: node.receive_ready() == [] and b"ready" in node._stream.noise)
    (slurm,) = read_nodes("slurm:1")
    node._spec = replace(node._spec, cleans_up=slurm.cleans_up)
    (child,) = psutil.Process(node._process.pid).children()
    try:
        node.disconnect()
        clock.now += slurm.end_seconds + 2 * remote_node.KILL_SECONDS
        node.tick()
        until(lambda: node.command_ended, "the command is not killed")
        node.close()
        assert node._process.returncode == -signal.SIGKILL
        assert alive(child)
    finally:
        child.kill()


def test_command_that_ignores_signals_is_killed_in_the_end(start, clock):
    node = start("sh", "-c", "trap '' TERM HUP INT; sleep 1000 & echo ready; wait; wait")
    until(lambda: node.receive_ready() == [] and b"ready" in node._stream.noise)
    command = psutil.Process(node._process.pid)
    processes = [command, *command.children(recursive=True)]
    assert len(processes) == 2
    node.ask_to_end()
    assert all(map(alive, processes))
    clock.now += 3 * remote_node.KILL_SECONDS
    node.tick()
    until(lambda: not any(map(alive, processes)), "something is left")
    node.close()
    node.close()
    node.say(reply(1))
    node.tick()
    assert node.receive_ready() == []
