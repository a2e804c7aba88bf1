"""The bridge to a node that `sbatch` provides: its standard input and output are those of an agent in a Slurm job.

    python -c "... main()" --signal=... [OPTION OF sbatch ...] [SCRIPT WORD ...]

Theory of operation. The head starts one bridge for each node, just as it starts one `ssh`. The bridge listens on a free
port, writes its addresses and a key into a directory of mode 0700, and submits a job. The job (`sbatch_node.py`) reads
them there, connects, proves that it has the key, and starts the agent. From then on both ends only pass on what they
get. The bridge accepts one connection, and then listens no more.

In an orderly end the bridge passes on the end of its input, and ends after the agent. It cancels the job if it is still
in the queue, if the agent does not end, or if the connection is lost. If the bridge is killed, the agent sees the end
of its input. A job that was still in the queue then finds that nothing listens, and ends as soon as it starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_launcher.debug_log import get_logger, set_role
from gpu_launcher.nodes.authenticated_socket import AuthenticatedSocket, FrameKind, Listener, own_addresses
from gpu_launcher.nodes.authentication import MAX_CONTENT, new_key
from gpu_launcher.nodes.engines import NOT_CONNECTED, NOT_STARTED, SUBMITTED, agent_command, module_command
from gpu_launcher.nodes.rendezvous import Contact, RendezvousDirectory
from gpu_launcher.nodes.slurm_job import ENDED, SlurmJob
from gpu_launcher.processes.signals import StopSignals

_log = get_logger("nodes.sbatch_bridge")

AGENT_END_SECONDS = 20.0
"""Maximum seconds for the agent to end after its input has. It needs 15 s if it cannot hear that."""
SOON_SECONDS = 2.0
"""Seconds between two looks at a job that has started to run, but is not connected."""
QUEUED_SECONDS = 20.0
"""Seconds between two looks at a job in the queue."""
MAX_OUTPUT = 1000
"""Maximum number of bytes shown of what the job has printed. The head keeps 300 characters."""


def main() -> None:
    """Run an agent in a job of Slurm, with the head at standard input and output."""
    set_role("sbatch_bridge")
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        sys.exit(_SbatchBridge(sys.argv[1:], output).run())
    except _NoNodeError as error:
        sys.exit(str(error))


class _NoNodeError(Exception):
    """There is no agent. The message is for the user of the head."""


class _SbatchBridge:
    def __init__(self, words: Sequence[str], output: int) -> None:
        self._words = words
        self._output = output
        self._input_ended: float | None = None
        """When the input has ended, in seconds of the monotonic clock."""
        self._wakes, self._wake = os.pipe()
        """Readable when the input has ended."""

    def run(self) -> int:
        """Run the agent, and return its exit status. Raises _NoNodeError."""
        key = new_key()
        with StopSignals() as signals:
            with Listener(key) as listener:
                try:
                    directory = RendezvousDirectory.create(Path.cwd(), Contact(own_addresses(), listener.port, key))
                except OSError as error:
                    raise _NoNodeError(f"cannot write the key of the connection: {error}") from error
                try:
                    job = _submit(command_of_job(self._words, directory))
                    try:
                        connection = self._wait_for_agent(listener, directory, job, signals)
                    except BaseException:
                        job.cancel()
                        raise
                finally:
                    directory.remove()
            if connection is None:
                job.cancel()
                return 1
            with connection:
                status = self._pass_on(connection, signals)
            if status is None:
                job.cancel()
                return 1
            return status

    def _wait_for_agent(
        self, listener: Listener, directory: RendezvousDirectory, job: SlurmJob, signals: StopSignals
    ) -> AuthenticatedSocket | None:
        """Wait for the connection from the job. Return None if it is not wanted any more. Raises _NoNodeError."""
        poll = select.poll()
        poll.register(0, 0)  # says only when the input has ended
        poll.register(signals, select.POLLIN)
        poll.register(listener, select.POLLIN)
        looked = time.monotonic()
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(1000)}
            if 0 in ready or (signals.fileno() in ready and signals.take()):
                return None
            if (connection := listener.accept()) is not None:
                return connection
            started = directory.output.exists() or not directory.has_key
            patience = SOON_SECONDS if started else QUEUED_SECONDS
            if time.monotonic() - looked >= patience:
                state, looked = job.state(), time.monotonic()
                if state in ENDED:
                    raise _NoNodeError(self._why_ended(directory, state, listener.port))

    def _why_ended(self, directory: RendezvousDirectory, state: str, port: int) -> str:
        if not directory.has_key:
            return f"{NOT_CONNECTED} port {port} of {', '.join(own_addresses())}"
        printed = directory.printed(MAX_OUTPUT).strip()
        return f"{NOT_STARTED} ({state})" + (f": {printed}" if printed else "")

    def _pass_on(self, connection: AuthenticatedSocket, signals: StopSignals) -> int | None:
        """Pass on everything until the agent has ended. Return its exit status, or None if that is not known."""
        threading.Thread(target=self._pass_on_input, args=(connection,), daemon=True).start()
        poll = select.poll()
        for source in (connection, signals, self._wakes):
            poll.register(source, select.POLLIN)
        while True:
            wait = None
            if self._input_ended is not None:
                wait = 1000 * (self._input_ended + AGENT_END_SECONDS - time.monotonic())
                if wait <= 0:
                    _tell("the agent has not ended")
                    return None
            ready = {descriptor for descriptor, _ in poll.poll(wait)}
            if signals.fileno() in ready and signals.take():
                return None
            if self._wakes in ready:
                os.read(self._wakes, 1)
            if connection.fileno() not in ready:
                continue
            try:
                frames = connection.receive()
            except OSError as error:
                _tell(f"lost the connection to the job: {error}")
                return None
            for frame in frames:
                if frame.kind is FrameKind.END:
                    return int(frame.data)
                self._write(self._output if frame.kind is FrameKind.DATA else 2, frame.data)

    def _write(self, descriptor: int, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except BrokenPipeError:  # the head is gone, and the agent will hear that
            pass

    def _pass_on_input(self, connection: AuthenticatedSocket) -> None:
        try:
            while data := os.read(0, MAX_CONTENT - 1):
                connection.send(FrameKind.DATA, data)
            connection.send(FrameKind.END)
        except OSError as error:  # the other thread sees that, too
            _log.info("the connection is lost: %s", error)
        self._input_ended = time.monotonic()
        os.write(self._wake, b"\0")


def _tell(what: str) -> None:
    """Say something to the user of the head, if there is one. The job must be cancelled even if there is none."""
    with contextlib.suppress(OSError):
        os.write(2, f"{what}\n".encode())


def command_of_job(words: Sequence[str], directory: RendezvousDirectory) -> tuple[str, ...]:
    """Return the command that submits the job. `words` are options of sbatch, and maybe a script of the user's.

    Slurm runs the script with our words behind the user's. If the user named no script, ours is the script. Either way
    ours ends up as the program that it executes last.
    """
    output = str(directory.output).replace("%", "%%")
    sbatch = ("sbatch", "--parsable", "--nodes=1", "--ntasks=1", "--no-requeue", "--job-name=gpu-launcher")
    node = (*module_command("sbatch_node"), str(directory.key_file), *agent_command())
    return (*sbatch, f"--output={output}", *words, str(directory.script), *node)


def _submit(command: Sequence[str]) -> SlurmJob:
    """Submit a job. Raises _NoNodeError."""
    try:
        # A session of its own: the job must be known before a signal to this process group ends anything.
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        raise _NoNodeError(f"cannot run sbatch: {error.strerror}") from error
    match = re.fullmatch(r"(\d+)(?:;(\S+))?", done.stdout.strip())
    if match is None:
        raise _NoNodeError(f"sbatch has submitted nothing (exit status {done.returncode}) {done.stdout.strip()}")
    _tell(f"{SUBMITTED} {match[1]}")
    return SlurmJob(match[1], match[2] or "")
