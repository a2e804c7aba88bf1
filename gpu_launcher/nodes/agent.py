"""The agent: represents the head on the machine of a node, at the other end of a byte stream.

Theory of operation. Slurm, SSH or another command starts the agent with the head at its standard input and output. The
agent imports the program once, starts a node exactly as a program on this machine would, and passes messages on in both
directions. For the node, the agent is the head: if the agent ends, for whatever reason, the node ends everything that
it has started, and the devices are free.

So the agent must end when the head does. It sees the end of its input; if the network or `srun` fails, that end may
never come, so it also ends after `Timing.silence` seconds without a sign of life. It never waits for the head: what the
head does not read stays in the node.

The agent has one thread, so the node can be forked from it at any time.
"""

from __future__ import annotations

import ast
import contextlib
import math
import multiprocessing.spawn
import os
import select
import sys
import time
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import cast

from gpu_launcher.debug_log import get_logger, set_role
from gpu_launcher.errors import GpuLauncherError, NodeDiedError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, HeadLives, Message
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.scratch import Scratch
from gpu_launcher.jobs.source import Cancel, Offer, Statement, Stop
from gpu_launcher.jobs.sweep import portable
from gpu_launcher.nodes.agent_messages import (
    Beat,
    Bye,
    ChannelData,
    ChannelEnd,
    ChannelRead,
    Echo,
    EndAgent,
    HostedProgram,
    Leaving,
    Loaded,
    OfferWithChannel,
    Refused,
    Script,
    Setup,
    StopOutputs,
    digest_of,
    hello,
)
from gpu_launcher.nodes.channel_relay import ChannelRelay, FarEnd
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.nodes.outputs import OutputSender, PrivateDirectory
from gpu_launcher.nodes.slurm_job import SlurmJob
from gpu_launcher.nodes.slurm_time import term_of_allocation
from gpu_launcher.processes import pickling, spawn
from gpu_launcher.processes.exceptions import reason
from gpu_launcher.processes.messages import ChannelClosedError, channel
from gpu_launcher.processes.signals import StopSignals
from gpu_launcher.safe_files import open_regular

_log = get_logger("nodes.agent")

MAX_PENDING = 4 * 2**20
"""Number of unsent bytes at which the agent reads no more from the node. The node then keeps its messages itself."""
FIRST_MESSAGE_SECONDS = 60.0
"""Maximum seconds to wait for the program, because the head may start many nodes at once."""
NODE_END_SECONDS = 3.0
"""Maximum seconds for the node to end. It may wait for a file system that the network has cut off."""
TREE_END_SECONDS = 5.0
"""Seconds in which the processes below a node that was killed end by themselves."""
HOLD_SECONDS = 0.25
"""Seconds for which the end of a job that failed is held back, in case this agent is asked to end, too."""
LAST_WORDS_SECONDS = 5.0
"""Maximum seconds for which an agent that ends tries to send what it has not sent."""


class _CannotHostError(Exception):
    """The program cannot run here. The message is for the user of the head."""


def main() -> None:
    """Run as an agent, with the head at standard input and output."""
    set_role("agent")
    # Whatever prints or reads here must not get into the messages.
    stream = FrameStream(os.dup(0), os.dup(1))
    os.register_at_fork(after_in_child=stream.close)  # a job must neither write to the head nor keep the connection
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    stream.greet()
    stream.send(hello())
    try:
        setup, *more = _first_messages(stream)
        if isinstance(setup, Setup):
            agent = _Agent(stream, setup)
            agent.take(more)
            agent.run()
            if agent.to_give_back is not None:
                _send_the_rest(stream)
                SlurmJob(agent.to_give_back).cancel()  # ends this process, too
    except _CannotHostError as error:
        stream.send(Refused(str(error)))
    _send_the_rest(stream)


def _first_messages(stream: FrameStream) -> list[object]:
    """Wait for the program. The first message is something else if the head is gone, or does not want this node."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    end = time.monotonic() + FIRST_MESSAGE_SECONDS
    while (left := end - time.monotonic()) > 0:
        if poll.poll(1000 * left):
            try:
                messages = stream.receive()
            except ChannelClosedError:
                break
            if messages:
                return messages
    return [EndAgent()]


class _Agent:
    def __init__(self, stream: FrameStream, setup: Setup) -> None:
        """Load the program, and start the node. Raises _CannotHostError."""
        self._stream = stream
        self._timing = setup.timing
        self._term = term_of_allocation(setup.notice, setup.allocation)
        self._allocation = os.environ.get("SLURM_JOB_ID") if setup.elastic else None  # the program may change that
        self.to_give_back: str | None = None
        """The id of the Slurm allocation that has to be given back here, if any: the head's `srun` may be gone, too."""
        hosted, differs = _load(setup)
        self._private = _private_directory(setup)
        """The sweep's directory, if the head does not share its own with this machine."""
        self._outputs: OutputSender | None = None
        """Sends what jobs leave in it."""
        try:
            self._node = LocalNode(
                hosted.program,
                method=setup.method,
                option=setup.option,
                captured=hosted.captured,
                log_file=hosted.log_file,
            )
            stream.send(Loaded(differs, private=self._private is not None))
        except GpuLauncherError as error:
            if self._private is not None:
                self._private.remove()
            raise _CannotHostError(str(error)) from error
        # After the start of the node, which does not inherit them.
        self._relay_poll = select.epoll()
        self._relay = ChannelRelay(stream, self._relay_poll)
        self._sockets: dict[int, socket] = {}
        """The far ends of the jobs' channels, by job number."""
        self._scratch = Scratch() if setup.probe is None or self._private is not None else None
        """Directory for reports, if the head shares none with this machine."""
        self._heard = time.monotonic()
        self._silence = 0.0
        """For how many seconds the head had been silent when it was heard last."""
        self._next_beat = self._heard
        self._over = False
        self._runs = False
        """Whether the node has a run."""
        self._leaving = False
        """Whether the engine has asked this agent to end."""
        self._stopped = False
        """Whether the head has stopped the run. The second time, outputs are given up."""
        self._closed: Closed | None = None
        """The end of the run, until all outputs are sent."""
        self._held: list[Message] = []
        """Messages of the node that wait for `_held_until`."""
        self._held_until = -math.inf

    def run(self) -> None:
        """Pass messages on until the head, the node or the engine ends this."""
        with StopSignals() as signals:
            try:
                while not self._over:
                    self._turn(signals)
            except NodeDiedError:
                if self._outputs is None:  # otherwise their outputs are not sent, so these jobs run again
                    for message in self._held:
                        self._pass_on(message)
                    self._relay_channels()
                # The node is as patient as this agent, so it may have been first.
                silence = max(self._silence, time.monotonic() - self._heard)
                if silence > self._timing.silence - self._timing.beat:
                    self._blame(silence)
                else:
                    self._stream.send(Refused("lost the process that starts jobs, and the jobs with it"))
                self._node.was_killed = True
            finally:
                self._node.close(NODE_END_SECONDS)
                if self._node.was_killed:
                    time.sleep(TREE_END_SECONDS)  # the processes below the node notice by themselves
                if self._scratch is not None:
                    self._scratch.remove()
                if self._private is not None:
                    self._private.remove()
        self._stream.send(Bye())

    def _turn(self, signals: StopSignals) -> None:
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        poll.register(signals, select.POLLIN)
        poll.register(self._relay_poll, select.POLLIN)
        if self._stream.pending < MAX_PENDING and not self._held:
            poll.register(self._node, select.POLLIN)
        if self._stream.pending:
            poll.register(self._stream.writes, select.POLLOUT)
        wake = min(self._next_beat, self._held_until) if self._held else self._next_beat
        if self._outputs is not None and self._outputs.ready:
            wake = -math.inf
        ready = {descriptor for descriptor, _ in poll.poll(1000 * max(0.0, wake - time.monotonic()))}
        if self._stream.fileno() in ready:
            self._hear()
        if signals.fileno() in ready:
            for _ in range(signals.take()):
                assert signals.last is not None
                _log.warning("asked to end by %s", signals.last.name)
                self._leaving = True
                self._held_until = -math.inf
                self._stream.send(Leaving(f"got {signals.last.name}"))
                self._node.say(Stop())
        now = time.monotonic()
        if self._node.fileno() in ready:
            self._held = self._node.receive_ready()
            if any(map(_may_be_the_engines_doing, self._held)):
                self._held_until = now + HOLD_SECONDS
        if now >= self._held_until:
            for message in self._held:
                self._pass_on(message)
            self._held.clear()
        self._relay_channels()
        if self._outputs is not None:
            self._outputs.send()
        if self._closed is not None and not (self._outputs is not None and self._outputs.busy):
            self._stream.send(self._closed)
            self._closed = None
            self._runs = False
        if self._leaving and not self._runs and self._relay.is_idle:
            self._over = True
        self._stream.flush()
        if now >= self._next_beat:
            self._next_beat = now + self._timing.beat
            self._stream.send(Beat())
        if now - self._heard > self._timing.silence:
            self._blame(now - self._heard)
            self._over = True

    def _pass_on(self, message: Message) -> None:
        """Send a message of the node to the head. A result follows the job's outputs."""
        match message:
            case Closed():
                self._closed = message
            case Ended(result) if self._outputs is not None and not (self._leaving and _will_move(result)):
                self._outputs.add(message)
            case Ended(result):
                self._stream.send(message)
                self._relay.end(result.number)
                if self._scratch is not None and self._outputs is None:  # the head does not read it
                    with contextlib.suppress(OSError):
                        ReportFiles(self._scratch.path).path(result.number).unlink()
            case _:
                self._stream.send(message)

    def _relay_channels(self) -> None:
        self._relay.deliver()
        for number in self._relay.send():
            self._relay.forget(number)
            self._sockets.pop(number).close()

    def _offer(self, offer: OfferWithChannel) -> None:
        """Offer a job to the node, with its end of a channel that is relayed."""
        number = offer.job.number
        try:
            here, theirs = channel()
        except OSError:
            self._node.say(Offer(offer.job))
            self._node.say(Cancel(number, "could not be started: its node has too many open files (`ulimit -n`)"))
            self._stream.send(ChannelEnd(offer.channel))
            return
        with theirs:
            self._node.say(Offer(offer.job), (theirs.fileno(),))
        self._sockets[number] = here
        self._relay.open(number, FarEnd(here), offer.channel)

    def _blame(self, seconds: float) -> None:
        """Say that the silence of the head is why this agent ends."""
        _log.error("the head has been silent for %.0f s: ending everything", seconds)
        self._stream.send(Refused(f"heard nothing from here for {seconds:.0f} s, and ended its jobs"))
        self.to_give_back = self._allocation

    def _hear(self) -> None:
        try:
            messages = self._stream.receive()
        except ChannelClosedError:
            _log.warning("the head is gone: ending everything")
            self._over = True
            return
        now = time.monotonic()
        self._heard, self._silence = now, now - self._heard
        self.take(messages)

    def take(self, messages: list[object]) -> None:
        """Do what the head says, or pass it on to the node."""
        for message in messages:
            match message:
                case Beat():
                    self._node.say(HeadLives(self._heard))
                case Echo():
                    self._stream.send(message)
                case EndAgent():
                    self._over = True
                case OfferWithChannel():
                    self._offer(message)
                case ChannelData() | ChannelRead() | ChannelEnd():
                    self._relay.take(message)
                case BeginRun():
                    # The mask of this machine's GPUs is in this process's environment, not in the head's.
                    self._runs = True
                    options = portable(replace(message.options, environ=None))
                    reports = message.reports if self._scratch is None else ReportFiles(self._scratch.path)
                    if self._private is not None:
                        self._outputs = OutputSender(self._stream, self._private.path, reports)
                    begin = replace(message, options=options, reports=reports, silence=self._timing.silence)
                    self._node.say(replace(begin, term=self._term))
                case StopOutputs(number):
                    if self._outputs is not None:
                        self._outputs.stop(number)
                case _:
                    if isinstance(message, Stop):
                        if self._stopped and self._outputs is not None:
                            self._outputs.give_up()
                        self._stopped = True
                    self._node.say(cast("Statement", message))


def _may_be_the_engines_doing(message: Message) -> bool:
    """Whether a job failed. An engine that ends a node signals the jobs and the agent at nearly the same time."""
    return isinstance(message, Ended) and message.result.outcome is Outcome.FAILED


def _will_move(result: JobResult) -> bool:
    """Whether a job of an agent that ends runs on another node, so that its outputs do not count."""
    return result.outcome in (Outcome.FAILED, Outcome.CANCELLED)


def _private_directory(setup: Setup) -> PrivateDirectory | None:
    """Make the sweep's directory, if this machine does not see the head's. Raises _CannotHostError."""
    if setup.probe is None or not setup.fetches or _sees(*setup.probe):
        return None
    probe, content = setup.probe
    path = Path(probe).parents[1]
    try:
        return PrivateDirectory(path, content)
    except OSError as error:
        if _sees(probe, content):  # NFS may show files late, and has looked now
            return None
        raise _CannotHostError(
            f"cannot make the sweep's directory {path}: {error.strerror}. Remedy: remove it there, or name another"
        ) from None


def _load(setup: Setup) -> tuple[HostedProgram, bool]:
    """Return the program, and whether its script differs from the head's. Raises _CannotHostError."""
    try:
        os.chdir(setup.directory)
    except OSError as error:
        raise _CannotHostError(
            f"cannot enter the program's working directory {setup.directory}: {error.strerror}. Remedy: use a "
            "directory on a file system that all nodes share"
        ) from None
    if setup.probe is not None and not setup.fetches and not _sees(*setup.probe):
        raise _CannotHostError(
            f"does not see the files in {Path(setup.probe[0]).parents[1]}. Remedy: use a directory on a file system "
            "that all nodes share, or outputs=fetch"
        )
    sys.argv = list(setup.arguments)
    pickled = spawn.resemble(setup.interpreter)
    differs = False
    if setup.script is not None:
        differs = digest_of(Path(setup.script.file)) != setup.script.digest
        _run_script(setup.script)
    try:
        hosted = pickling.load(pickled)
    except Exception as error:  # whatever the user's objects raise when they are unpickled
        raise _CannotHostError(f"cannot load the program: {reason(error)}") from error
    assert isinstance(hosted, HostedProgram)
    if hosted.check is not None and (problem := hosted.check()) is not None:
        raise _CannotHostError(f"says {problem}")
    return hosted, differs


def _sees(probe: str, content: bytes) -> bool:
    """Whether this machine shares the sweep's directory with the head."""
    found = b""
    with contextlib.suppress(OSError), open(open_regular(Path(probe)), "rb") as file:
        found = file.read(len(content) + 1)
    return found == content


def _run_script(script: Script) -> None:
    """Import what the script imports, and run what it does at its top level, as multiprocessing does in its children.

    A script without `if __name__ == "__main__":` would start the sweep again, so it is left out.
    """
    try:
        tree = ast.parse(Path(script.file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    if not any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body):
        return
    main = vars(sys.modules["__main__"])
    file, spec = main["__file__"], main["__spec__"]
    main.update(__file__=None, __spec__=None)  # otherwise multiprocessing believes that the script ran
    how = {"init_main_from_path": script.file} if script.module is None else {"init_main_from_name": script.module}
    try:
        multiprocessing.spawn.prepare(how)
    except BaseException as error:  # also SystemExit: a script may end itself where it finds no GPU
        raise _CannotHostError(f"cannot import the program: {reason(error)}") from error
    vars(sys.modules["__main__"]).update(__file__=file, __spec__=spec)


def _send_the_rest(stream: FrameStream) -> None:
    """Send what has not been sent, if the head reads it soon."""
    end = time.monotonic() + LAST_WORDS_SECONDS
    poll = select.poll()
    poll.register(stream.writes, select.POLLOUT)
    while stream.pending and time.monotonic() < end:
        for _, events in poll.poll(100):
            if events & (select.POLLERR | select.POLLHUP):
                return
            stream.flush()
