"""The head's side of an agent: the command that connects to it, and what is known about its life."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from enum import Enum
from typing import Any

from gpu_launcher.debug_log import get_logger
from gpu_launcher.jobs.node_messages import BeginRun
from gpu_launcher.jobs.source import Statement
from gpu_launcher.nodes.agent_messages import Beat, Bye, EndAgent, Loaded, Refused, Setup, versions
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.processes.messages import ChannelClosedError
from gpu_launcher.text import one_line

_log = get_logger("nodes.remote_node")

START_SECONDS = 300.0
"""Maximum seconds for an agent to import the program. Before there is an agent, it may wait in an engine's queue."""
END_SECONDS = 10.0
"""Maximum seconds for an agent to end its node when it is asked to."""
COMMAND_END_SECONDS = 5.0
"""Maximum seconds for the command to end when its agent is gone, and again when it is asked to."""
MAX_ERRORS = 16 * 1024
"""Maximum number of bytes kept of what the connecting command prints to its standard error."""


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

    def __init__(self, spec: NodeSpec, setup: Setup) -> None:
        """Start the command. Raises OSError if it cannot be executed."""
        assert spec.command is not None
        self.name = spec.name
        self.life = Life.STARTING
        self.problem: str | None = None
        """Why the node cannot be used, or not any more."""
        self._spec = spec
        self.differs = False
        """Whether the program's script is not the same on the node."""
        self._setup = setup
        self._timing = setup.timing
        self._process = subprocess.Popen(
            spec.command,
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
        self._stderr = self._process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._printed = b""
        self._queue: list[Statement | BeginRun] = []
        """Messages for the node that are sent when the agent is there and can be heard."""
        self._began = self._heard = self._sent = time.monotonic()
        self._greeted = False

    def again(self) -> RemoteNode:
        """Start the command once more, for a new agent. Raises OSError if it cannot be executed."""
        return RemoteNode(self._spec, self._setup)

    def fileno(self) -> int:
        """Return a descriptor that is readable when the agent has sent something, or the connection has ended."""
        return self._stream.fileno()

    def say(self, what: Statement | BeginRun) -> None:
        """Send a message to the node, now or when the agent is there."""
        now = time.monotonic()
        if self._greeted and not self._is_quiet(now):
            self._stream.send(what)
            self._sent = now
        else:
            self._queue.append(what)

    def receive_ready(self) -> list[Any]:
        """Return messages of the node, and `Leaving`. Changes `life`."""
        if self.life in (Life.SILENT, Life.GONE):
            return []
        try:
            arrived = self._stream.receive()
        except ChannelClosedError:
            self._disconnect("the connection ended")
            return []
        if arrived:
            self._heard = time.monotonic()
        messages = []
        for message in arrived:
            if not self._greeted:
                self._greet(message)
                continue
            match message:
                case Beat():
                    pass
                case Loaded(differs):
                    self.life, self.differs = Life.LIVES, differs
                case Refused(problem):
                    self.problem = problem
                case Bye():
                    self.problem = self.problem or "has ended"
                    self._finish()
                case _:
                    messages.append(message)
        return messages

    def _greet(self, hello: Mapping[str, Any]) -> None:
        """Compare versions, and send the program."""
        theirs, ours = hello["versions"], versions()
        wrong = [name for name in ours if theirs.get(name) != ours[name]]
        _log.info("%s: agent %s on %s", self.name, hello["pid"], hello["host"])
        self._greeted, self._began = True, time.monotonic()
        if wrong:
            there = ", ".join(f"{name} {theirs.get(name)}" for name in wrong)
            here = ", ".join(f"{name} {ours[name]}" for name in wrong)
            self.problem = f"has {there}, but this program runs with {here}: install the same versions there"
            self._stream.send(EndAgent())
            self._finish()
            return
        self._stream.send(self._setup)
        for message in self._queue:
            self._stream.send(message)
        self._queue.clear()

    def tick(self) -> None:
        """Send what waits, a sign of life if it is time, and notice a silent agent."""
        now = time.monotonic()
        self._read_errors()
        if self.life is Life.GONE:
            return
        if self.life is Life.SILENT:
            if now - self._sent > self._timing.lost:
                self._finish()
        elif self._greeted and self.life is Life.STARTING and now - self._began > START_SECONDS:
            self._disconnect(f"has not imported the program after {START_SECONDS:.0f} s")
        elif self._is_quiet(now):
            if now - self._sent > self._timing.lost:
                self._disconnect(f"has been silent for {now - self._heard:.0f} s")
                self._finish()
        elif self._greeted:
            for message in self._queue:
                self._stream.send(message)
            self._queue.clear()
            if now - self._sent >= self._timing.beat:
                self._stream.send(Beat())
                self._sent = now
            self._stream.flush()

    def _is_quiet(self, now: float) -> bool:
        """Whether the agent has not been heard for so long that nothing may be sent to it."""
        return self.life is Life.LIVES and now - self._heard > self._timing.quiet

    def _read_errors(self) -> None:
        with contextlib.suppress(BlockingIOError, ValueError):
            while data := os.read(self._stderr.fileno(), 4096):
                self._printed = (self._printed + data)[-MAX_ERRORS:]

    def _disconnect(self, problem: str) -> None:
        """Take note that nothing more comes from the agent. It may live until it notices."""
        if self.problem is None:
            self._process.poll()
            status = self._process.returncode
            if self.life is Life.STARTING:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = self._process.wait(1.0)
            self._read_errors()
            said = one_line((self._printed or self._stream.noise).decode(errors="replace").strip()[-300:])
            problem += f" (exit status {status})" if status is not None else ""
            self.problem = f"{problem}: {said}" if said else problem
        _log.warning("%s: %s", self.name, self.problem)
        if self.life is Life.STARTING:
            self._finish()  # no job was ever sent
        else:
            self.life = Life.SILENT

    def _finish(self) -> None:
        self.life = Life.GONE

    def ask_to_end(self) -> None:
        """Ask the agent to end everything. `close` waits for that."""
        if self.life in (Life.STARTING, Life.LIVES):
            if self._greeted:
                self._stream.send(EndAgent())
            else:
                self._disconnect("was not needed any more")

    def close(self) -> None:
        """Wait until the node has ended, and end the command. Idempotent."""
        self.ask_to_end()
        end = time.monotonic() + END_SECONDS
        try:
            while self.life in (Life.STARTING, Life.LIVES) and time.monotonic() < end:
                self.receive_ready()
                self._stream.flush()
                time.sleep(0.005)
            self._stream.close()  # the end of its input ends the agent, too
            # Slurm keeps the allocation of an srun that is killed, but not of one that ends by itself or by SIGTERM.
            if not self._ends_within(COMMAND_END_SECONDS if self._greeted else 0.0):
                self._signal(signal.SIGTERM)
                self._ends_within(COMMAND_END_SECONDS)
        finally:
            self.life = Life.GONE
            self._stream.close()
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._stderr.close()

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _signal(self, signum: signal.Signals) -> None:
        """Signal the command, and what it has started in its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)
