"""The head's side of an agent: the command that connects to it, and what is known about its life."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from gpu_launcher.debug_log import get_logger
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Opened
from gpu_launcher.jobs.source import Offer, Statement
from gpu_launcher.nodes.agent_messages import (
    Beat,
    Bye,
    ChannelData,
    ChannelEnd,
    ChannelRead,
    Echo,
    EndAgent,
    Loaded,
    OfferWithChannel,
    Refused,
    Setup,
    StopOutputs,
    versions,
)
from gpu_launcher.nodes.channel_relay import ChannelRelay, FarEnd
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.processes.linux import dying_with_parent
from gpu_launcher.processes.messages import ChannelClosedError
from gpu_launcher.text import one_line

_log = get_logger("nodes.remote_node")

START_SECONDS = 300.0
"""Maximum seconds for an agent to import the program. Before there is an agent, it may wait in an engine's queue."""
KILL_SECONDS = 5.0
"""Seconds after SIGTERM at which a command that still runs is killed."""
STATUS_SECONDS = 1.0
"""Maximum seconds to wait for the exit status of a command that never led to a node."""
BYE_SECONDS = 4.0
"""Maximum seconds for an agent to say that it has ended, when the run is over."""
END_SECONDS = 15.0
"""Maximum seconds for all commands to end when the run is over."""
MAX_READS = 16
"""Maximum number of reads of the command's standard error at a time."""
MAX_ERRORS = 16 * 1024
"""Maximum number of bytes kept of what the connecting command prints to its standard error."""
MAX_GREETING = 1024 * 1024
"""Maximum number of bytes that the command prints before the agent is there, such as a message of the day."""

TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit statuses of a command that SIGTERM has ended, or whose agent it has ended."""


class Life(Enum):
    """What is known about the agent."""

    STARTING = "starting"
    """The command was started. There may be no agent yet."""
    LIVES = "lives"
    SILENT = "silent"
    """The connection is gone. The agent may still be there until it notices."""
    GONE = "gone"
    """No process of the node is left."""


class RemoteNode:
    """A node at the other end of a command's standard input and output."""

    def __init__(self, spec: NodeSpec, setup: Setup, *, captured: bool = True) -> None:
        """Start the command. Raises OSError if there is no such program.

        The command ends with the calling thread (`dying_with_parent`), which must live as long as the node. Unless it
        is `captured`, what jobs print is shown on standard error.
        """
        assert spec.command is not None
        self.name = spec.name
        self.life = Life.STARTING
        self.problem: str | None = None
        """Why the node cannot be used, as a sentence without its subject. None if it can."""
        self.lasts = spec.lasts
        """Seconds for which jobs can run on it, if its options say so."""
        self.elastic = spec.elastic
        """Whether it is worth giving back while no job needs it."""
        self.unfit = False
        """Whether the machine cannot run this program, so that starting an agent again is in vain."""
        self.interrupted = False
        """Whether the engine ended the agent before it could run jobs, by SIGTERM."""
        self._spec = spec
        self.nothing_left = True
        """Whether no process of a node can be there now."""
        self.differs = False
        """Whether the program's script is not the same on the node."""
        self.private = False
        """Whether it has a sweep's directory of its own, so that it sends the outputs of jobs."""
        self.hello: Mapping[str, Any] = {}
        """What the agent said about itself first. Empty until it is there."""
        self._setup = setup
        self._captured = captured
        self._timing = setup.timing
        self._process = subprocess.Popen(
            # Without an agent, nothing else ends the command with the head: an srun could wait in the queue for hours.
            dying_with_parent(spec.command, spec.orphaned),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a terminal's Ctrl-C is for the head alone
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stream = FrameStream(
            os.dup(self._process.stdout.fileno()), os.dup(self._process.stdin.fileno()), after_magic=True
        )
        self._process.stdout.close()
        self._process.stdin.close()
        self._poll = select.epoll()
        self._poll.register(self._stream.fileno(), select.EPOLLIN)
        self._writes_watched = False
        """Whether `fileno` is readable when there is room for what waits to be sent."""
        self._relay = ChannelRelay(self._stream, self._poll)
        self._held: dict[int, Ended] = {}
        """Ends of jobs, by number, that wait until what the jobs said is delivered."""
        self._held_closed: Closed | None = None
        """The end of the run, if it waits for these."""
        self._stderr = self._process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._printed = b""
        self._unshown = b""
        """The beginning of a line that jobs print, which is shown when it is complete."""
        self._shows = False
        """Whether what the command prints is shown, because jobs print it."""
        self._queue: list[Statement | BeginRun | Echo | StopOutputs | OfferWithChannel] = []
        """Messages for the node that are sent when the agent is there and can be heard."""
        self._began = self._heard = self._sent = time.monotonic()
        self._greeted = False
        self._how = "has ended"
        """How the connection was lost, as a sentence without its subject."""
        self._loaded = False
        """Whether the agent has loaded the program, and so may have jobs."""
        self._imports = False
        """Whether the agent imports the program, and so does not read."""
        self._opened = False
        """Whether its pool was open, so that it could run jobs."""
        self._silent_since = math.inf
        self._signalled: signal.Signals | None = None
        """The last signal that the command was sent."""
        self._ended = math.inf
        """When the connection was closed."""

    def again(self) -> RemoteNode:
        """Start the command once more, for a new agent. Raises OSError if there is no such program."""
        return RemoteNode(self._spec, self._setup, captured=self._captured)

    def fileno(self) -> int:
        """Return a descriptor that is readable when the agent has sent something, or the connection has ended.

        It is also readable when `tick` can send something that waited, or `receive_ready` can deliver it.
        """
        return self._poll.fileno()

    def offer(self, job: Job, channel: FarEnd | None) -> None:
        """Offer a job, with its channel if it has one, which is relayed until the job has ended."""
        if channel is None:
            self.say(Offer(job))
        elif self.life not in (Life.SILENT, Life.GONE):
            self.say(OfferWithChannel(job, self._relay.open(job.number, channel)))

    def stop_relaying(self, number: int) -> None:
        """Relay the channel of a job no more, if it is relayed."""
        self._held.pop(number, None)
        if self._relay.has(number):
            self._relay.forget(number)

    def say(self, what: Statement | BeginRun | Echo | StopOutputs | OfferWithChannel) -> None:
        """Send a message to the node, now or when the agent is there. Drop it if the connection is gone."""
        if self.life in (Life.SILENT, Life.GONE):
            return
        self._queue.append(what)
        if self._greeted and not self.quiet:
            self._send_queue()

    def receive_ready(self) -> list[Any]:
        """Return messages of the node, `Leaving` and `Echo`. Changes `life`."""
        if self.life in (Life.SILENT, Life.GONE):
            return []
        before = self._stream.received
        try:
            arrived = self._stream.receive()
        except ChannelClosedError:
            self._disconnect("lost its connection" if self._greeted else "did not start")
            return []
        if self._stream.received > before:  # a large message may arrive for long
            self._heard = time.monotonic()
        if not self._stream.greeted and self._stream.received > MAX_GREETING:
            said = f"did not start, but prints all the time: {self.said[-40:].strip()}"
            self.problem = f"{said}. Remedy: {self._spec.remedy(0, '')}"
            self._finish()
            return []
        messages: list[Any] = []
        for message in arrived:
            if not self._greeted:
                self._greet(message)
                continue
            match message:
                case Beat():
                    pass
                case Loaded(differs, private):
                    self._loaded, self._imports = True, False
                    self.nothing_left = False
                    self._read_errors()  # what the program printed while it was imported; it did so here, too
                    self._shows = not self._captured
                    self.life, self.differs, self.private = Life.LIVES, differs, private
                case Refused(problem):
                    self.problem, self.unfit = problem, self.life is Life.STARTING
                case Bye():
                    self._relay.deliver()
                    messages += self._delivered()
                    self.problem = self.problem or "has ended"
                    self._finish()
                case ChannelData() | ChannelRead() | ChannelEnd():
                    self._relay.take(message)
                case Ended(result) if self._relay.has(result.number):
                    self._held[result.number] = message
                case Closed() if self._held:
                    self._held_closed = message
                case Opened():
                    self._opened = True
                    messages.append(message)
                case _:
                    messages.append(message)
        self._relay.deliver()
        return messages + self._delivered()

    def _delivered(self) -> list[Ended | Closed]:
        """Return what waited until what jobs said was delivered, and has been."""
        messages: list[Ended | Closed] = []
        for number in [number for number in self._held if self._relay.has_ended(number)]:
            self._relay.forget(number)
            messages.append(self._held.pop(number))
        if self._held_closed is not None and not self._held:
            messages.append(self._held_closed)
            self._held_closed = None
        return messages

    def _greet(self, hello: Mapping[str, Any]) -> None:
        """Compare versions, and send the program."""
        self.hello = hello
        theirs, ours = hello["versions"], versions()
        wrong = [name for name in ours if theirs.get(name) != ours[name]]
        _log.info("%s: agent %s on %s", self.name, hello["pid"], hello["host"])
        self._greeted, self._began = True, time.monotonic()
        if wrong:
            there = ", ".join(f"{name} {theirs.get(name)}" for name in wrong)
            here = ", ".join(f"{name} {ours[name]}" for name in wrong)
            self.problem = f"has {there}, but this program runs with {here}. Remedy: install the same versions there"
            self.unfit = True
            self._send(EndAgent())
            self._finish()
            return
        self._send(self._setup)
        self._imports = True
        self._send_queue()

    def tick(self) -> None:
        """Send what waits, and notice a silent agent. Never waits."""
        now = time.monotonic()
        self._read_errors()
        if self.life is Life.GONE:
            self._end_command()
        elif self.life is Life.SILENT:
            if self._must_have_ended(now):
                self._finish()
        elif self._greeted and self.life is Life.STARTING and now - self._began > START_SECONDS:
            self._disconnect(f"has not imported the program after {START_SECONDS:.0f} s")
        elif self.quiet:
            self._relay.rest()
            self._watch_writes(False)
            if now - self._sent > self._timing.lost and not self._stream.readable:
                self.problem = f"has been silent for {now - self._heard:.0f} s"
                self._finish()
        elif self._greeted:
            self._send_queue()
            self._relay.send()
            if self._stream.pending:
                self._stream.flush()
            if self._stream.pending or not self._relay.is_idle:  # the relay may have sent something
                self._sent = now
            self._watch_writes(self._stream.pending > 0)

    def beat(self) -> None:
        """Send a sign of life, from any thread, unless the agent is quiet."""
        # If something has arrived, the agent is not quiet, but the head is too busy to receive it.
        heard = not self.quiet or self._stream.readable
        # The agent must hear the program first.
        if (self._imports or self._loaded) and self.life in (Life.STARTING, Life.LIVES) and heard:
            self._send(Beat())

    def _send(self, message: object) -> None:
        self._stream.send(message)
        self._sent = time.monotonic()

    def _send_queue(self) -> None:
        for message in self._queue:
            self._send(message)
        self._queue.clear()

    @property
    def quiet(self) -> bool:
        """Whether the agent has not been heard for so long that nothing may be sent to it."""
        return self.life is Life.LIVES and time.monotonic() - self._heard > self._timing.quiet

    @property
    def seconds_left(self) -> float:
        """For how many seconds a silent node may still run jobs."""
        return max(0.0, self._timing.lost - (time.monotonic() - self._sent))

    def _watch_writes(self, watched: bool) -> None:
        if watched is not self._writes_watched:
            if watched:
                self._poll.register(self._stream.writes, select.EPOLLOUT)
            else:
                self._poll.unregister(self._stream.writes)
            self._writes_watched = watched

    def _lose_channels(self) -> None:
        """Take note that nothing more arrives. The jobs that have not ended are lost with the node."""
        self._relay.close()
        self._held.clear()
        self._held_closed = None

    def _read_errors(self) -> None:
        with contextlib.suppress(BlockingIOError, ValueError):
            for _ in range(MAX_READS):
                printed = os.read(self._stderr.fileno(), 4096)
                self._printed = (self._printed + printed)[-MAX_ERRORS:]
                if self._shows:
                    self._show(printed)

    def _show(self, printed: bytes) -> None:
        """Print whole lines on standard error, or long beginnings of lines, so that nodes do not mix theirs."""
        lines, newline, rest = (self._unshown + printed).rpartition(b"\n")
        shown, self._unshown = lines + newline, rest
        if not printed or len(rest) > MAX_ERRORS:  # the end, or no lines at all
            shown, self._unshown = shown + rest, b""
        with contextlib.suppress(OSError):  # nothing reads it any more
            while shown:
                shown = shown[os.write(2, shown) :]

    @property
    def said(self) -> str:
        """The end of what the command has printed as one line: to its standard error, or before the agent was there."""
        return _end_of((self._printed or self._stream.noise).decode(errors="replace"))

    def _disconnect(self, problem: str) -> None:
        """Take note that nothing more comes from the agent. It may live until it notices."""
        self._how = problem
        self._silent_since = time.monotonic()
        self.life = Life.SILENT
        self._lose_channels()

    def _must_have_ended(self, now: float) -> bool:
        """Whether nothing of a silent node can be left. An agent that never loaded the program has no jobs."""
        if self._loaded:
            return now - self._sent > self._timing.lost
        return self.command_ended or now - self._silent_since > STATUS_SECONDS

    def _finish(self) -> None:
        if self.problem is None:
            status = self._process.poll()
            self._read_errors()
            said = self.said
            # Later, an agent takes note of SIGTERM. It was the command that got it, such as an srun or a bridge.
            self.interrupted = not self._opened and status in TERMINATED and self._signalled is None
            if self.interrupted:
                self._how = "got SIGTERM before it could run jobs"
            how = f"{self._how} (exit status {status})" if status is not None else self._how
            how = f"{how}: {said}" if said else how
            self.problem = how if self._greeted else f"{how}. Remedy: {self._spec.remedy(status, said)}"
        _log.warning("%s: %s", self.name, self.problem)
        self.life, self.nothing_left = Life.GONE, True
        self._lose_channels()
        # Before they are closed: a process forked from this one may have copies, which would be watched on.
        self._watch_writes(False)
        self._poll.unregister(self._stream.fileno())
        self._stream.close()  # the end of its input ends the agent, too, if there is one
        self._ended = time.monotonic()
        self._end_command()

    def _end_command(self) -> None:
        """Let the command end by itself for a moment, and then end it. Never waits.

        An agent that imports the program does not read, and has no jobs, so its command is ended at once.
        An srun whose node does not answer needs longer than that to end after SIGTERM: Slurm's KillWait, 30 s by
        default. If it is killed, its child gives the allocation back.
        """
        since = time.monotonic() - self._ended
        signum = None
        patience = self._spec.end_seconds
        if since > patience + KILL_SECONDS:
            signum = signal.SIGKILL
        elif since > patience or not self._greeted or self._imports:
            signum = signal.SIGTERM
        if signum is not None and signum is not self._signalled and not self.command_ended:
            self._signal(signum)

    @property
    def command_ended(self) -> bool:
        """Whether the command has ended."""
        return self._process.poll() is not None

    def ask_to_end(self) -> None:
        """Ask the agent to end everything. Continue with `receive_ready` and `tick` until `command_ended`."""
        if self.life is Life.LIVES:
            self._send(EndAgent())
        elif self.life is not Life.GONE:
            self.problem = self.problem or "was not needed"
            self.disconnect()  # jobs of a silent node may still run

    def disconnect(self) -> None:
        """End the connection. An agent that has not ended ends by itself."""
        if self.life is not Life.GONE:
            nothing_left = self.nothing_left
            self._finish()
            self.nothing_left = nothing_left

    def close(self) -> None:
        """End the connection, and kill the command if it has not ended. Idempotent."""
        self.disconnect()
        if not self.command_ended:
            self._signal(signal.SIGKILL)
            self._process.wait()
        if not self._stderr.closed:
            self._read_errors()
        self._stderr.close()
        self._poll.close()

    def _signal(self, signum: signal.Signals) -> None:
        """Signal the command, which has not ended, and what it has started in its process group.

        If that cleans up after the command, Slurm would keep the allocation for good if both were killed.
        """
        self._signalled = signum
        with contextlib.suppress(OSError):  # it has just ended, or runs as another user
            (os.kill if self._spec.cleans_up else os.killpg)(self._process.pid, signum)


def end_all(nodes: Sequence[RemoteNode]) -> None:
    """Ask the agents to end, and wait until their commands have ended. Follow with `close`."""
    for node in nodes:
        node.ask_to_end()
    begin = time.monotonic()
    while not all(node.command_ended for node in nodes) and time.monotonic() < begin + END_SECONDS:
        for node in nodes:
            node.receive_ready()
            node.tick()
            if time.monotonic() > begin + BYE_SECONDS:
                node.disconnect()
        time.sleep(0.005)


def _end_of(printed: str) -> str:
    """Return the end of what a command has printed as one line. Of a traceback, only the exception."""
    printed = printed.strip()
    if "Traceback (most recent call last)" in printed:
        printed = printed.splitlines()[-1]
    return one_line(" ".join(printed[-300:].split())).rstrip(".")
