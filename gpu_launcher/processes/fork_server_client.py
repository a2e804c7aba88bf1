"""The node's side of the fork server: starts the server and jobs, with a channel to each supervisor and each job.

The node asks the fork server for a supervisor, and the supervisor for a job. Afterwards it talks to both directly; on
its own channel the fork server reports only supervisors that died or could not start. A supervisor whose job has ended
is used for the next job.

With `start_method=auto` the server is forked from the node if that is safe. Other threads are counted only after the
fork, because OpenBLAS and similar libraries shut down their threads for a fork. If any remain, the forked server is
discarded, and a spawning one is started.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from gpu_launcher.debug_log import environment, get_logger
from gpu_launcher.errors import ServerDiedError
from gpu_launcher.processes import spawn
from gpu_launcher.processes.fork_server import serve
from gpu_launcher.processes.forking import flush_all, fork_child, tqdm_monitors_paused
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.job_output import JobOutput
from gpu_launcher.processes.linux import cuda_in_use, other_threads
from gpu_launcher.processes.messages import (
    Assignment,
    ChannelClosedError,
    Grant,
    HoldLease,
    KillJob,
    SignalJob,
    StartFailed,
    StartJob,
    StartSupervisor,
    SupervisorDied,
    channel,
    receive,
    send,
)
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.worker import Program, forget_the_parent, use_own_positions, work
from gpu_launcher.validation import StartMethod

_log = get_logger("processes.fork_server_client")

_OUR_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


SUPERVISOR_DIED = "was ended because its supervisor was killed"


@dataclass(frozen=True, slots=True)
class Lost:
    """A job whose supervisor cannot report how the job ended. All of the job's processes are gone."""

    number: int
    problem: str
    """The reason, as a sentence without its subject."""
    started: bool = True
    """False if the job could not be started."""


@dataclass(frozen=True, slots=True)
class JobProcess:
    """A job that was started: its channels to its supervisor and to the job itself."""

    number: int
    supervisor: socket.socket
    job: socket.socket
    slot: int
    """The supervisor's number, which the fork server uses too."""

    def grant(self, grant: Grant, lease: tuple[int, ...]) -> None:
        """Hand over the lease. The supervisor gets it first, so that it holds the lease when the job begins."""
        send(self.supervisor, HoldLease(), lease)
        send(self.job, grant, lease)

    def signal(self, signum: signal.Signals) -> None:
        """Send `signum` to the job's process group."""
        send(self.supervisor, SignalJob(signum))

    def kill(self) -> None:
        """Kill the job's whole process tree with SIGKILL."""
        send(self.supervisor, KillJob())

    def close(self) -> None:
        """Close the channels. If the supervisor is still alive, it kills its process tree and ends."""
        self.supervisor.close()
        self.job.close()


class ForkServer:
    """Runs a program's jobs in their own processes. Create it before this package starts threads in this process."""

    def __init__(
        self,
        program: Program,
        method: StartMethod = "auto",
        *,
        option: str = "start_method",
        unsafe: str | None = None,
        in_child: Callable[[], None] = lambda: None,
        captured: bool = True,
        keep: tuple[int, ...] = (),
        generators: Generators | None = None,
        open_files: OpenFiles | None = None,
    ) -> None:
        """Start the server. Afterwards `method` says how jobs are started, and `reason` why they are spawned.

        `option` is the name of the user's option for the method. `unsafe` says why forking from this process is not
        safe, if that is known. `in_child` is called in a server forked from this process, and drops what belongs to
        this process alone. If `captured`, the output of jobs is kept in memory until they have a log; otherwise
        it goes where this process's output goes. The descriptors `keep` stay open as long as the server or a job's
        supervisor lives, even if the server is not a fork of this process. `generators` and `open_files` are those of
        the user's program, if this process is a fork of it.

        Raises OptionError if the program has to be pickled and cannot be.
        """
        self._program = program
        self._asked = method
        self._option = option
        self._unsafe = unsafe
        self._captured = captured
        self._keep = keep
        self._generators = generators or Generators()
        self._open_files = open_files
        self._files_notice: str | None = None
        self._handlers = {signum: signal.getsignal(signum) for signum in _OUR_SIGNALS}
        self._slots = itertools.count()
        self._jobs: dict[int, int] = {}
        """The job that each of this server's supervisors runs: job number by slot."""
        self._idle: dict[int, socket.socket] = {}
        """Channels to supervisors without a job, by slot."""
        self._start_server(in_child)

    def restart(self, in_child: Callable[[], None]) -> None:
        """Replace a server that died. `in_child` is called in the new server if it is a fork of this process.

        Raises OptionError for the same reason as `__init__`.
        """
        self.close()
        self._start_server(in_child)

    def _start_server(self, in_child: Callable[[], None]) -> None:
        self.reason: str | None = None
        self._pid: int | None = None
        if self._asked == "spawn":
            self.reason = "start_method=spawn"
        elif (unsafe := self._unsafe or cuda_in_use()) and self._asked == "auto":
            self.reason = unsafe
        else:
            with tqdm_monitors_paused():
                self._fork(in_child)
                unsafe = _threads_in_use()
            if unsafe and self._asked == "auto":
                self.close()
                self.reason = unsafe
        self.method: Literal["fork", "spawn"] = "fork" if self.reason is None else "spawn"
        _log.info("jobs start by %s%s", self.method, f": {self.reason}" if self.reason else "")
        if self.method == "spawn":
            self._spawn()

    @property
    def notices(self) -> list[str]:
        """Notices for the user about the start method, open files and random generators."""
        if self.method == "spawn":
            of_method = [f"jobs start in fresh interpreters (spawn): {self.reason}"]
        else:
            of_method = [self._files_notice] if self._files_notice else []
        return of_method + self._generators.notices(self.method)

    def fileno(self) -> int:
        """Return a descriptor that is readable when the server has sent a message or died."""
        return self._control.fileno()

    def receive(self) -> Lost | None:
        """Read a message from the server. Returns the job that it is about; None if the supervisor had no job.

        Raises ServerDiedError if the server has died.
        """
        try:
            message = receive(self._control)[0]
        except ChannelClosedError:
            raise ServerDiedError("the fork server was killed") from None
        assert isinstance(message, (SupervisorDied, StartFailed)), message
        number = self._jobs.pop(message.supervisor, None)
        if number is None:
            return None
        if isinstance(message, StartFailed):
            return Lost(number, f"could not be started: {message.problem}", started=False)
        return Lost(number, SUPERVISOR_DIED)

    def start(
        self,
        number: int,
        spec: Any,
        result: Path,
        attempt: int = 1,
        about: Any = None,
        title: str = "",
        to_source: int | None = None,
    ) -> JobProcess:
        """Start the process of job `number`, for the `attempt`-th time. The process begins to prepare itself.

        The job's code can read `about` (`processes.job_channel`). `ps` shows `title` as the process's name.
        `to_source` is the job's end of a channel to its source. Raises ServerDiedError.
        """
        job, job_end = channel()
        with job_end:
            # Send this first: the channel cannot be closed while this process holds the other end.
            assignment = Assignment(number, spec, str(result), attempt, about, title)
            send(job, assignment, () if to_source is None else (to_source,))
            try:
                slot, supervisor = self._slot_with(job_end)
            except BaseException:
                job.close()
                raise
        self._jobs[slot] = number
        return JobProcess(number, supervisor, job, slot)

    def finished(self, process: JobProcess) -> None:
        """Close the channel of a job that JobExited reported as not abandoned. Its supervisor is free again."""
        process.job.close()
        if self._jobs.pop(process.slot, None) is None:
            process.supervisor.close()  # it belonged to a server that has died
        else:
            self._idle[process.slot] = process.supervisor

    def _slot_with(self, job_end: socket.socket) -> tuple[int, socket.socket]:
        """Let a supervisor, idle or new, start a job. Raises ServerDiedError."""
        while self._idle:
            slot, supervisor = self._idle.popitem()
            try:
                send(supervisor, StartJob(), (job_end.fileno(),))
            except ChannelClosedError:  # it was killed; `receive` ignores that, because it had no job
                supervisor.close()
            else:
                return slot, supervisor
        slot = next(self._slots)
        supervisor, supervisor_end = channel()
        try:
            with supervisor_end:
                send(supervisor, StartJob(), (job_end.fileno(),))
                send(self._control, StartSupervisor(slot), (supervisor_end.fileno(),))
        except ChannelClosedError:
            supervisor.close()
            raise ServerDiedError("the fork server was killed") from None
        except OSError:
            supervisor.close()
            raise
        return slot, supervisor

    def close(self) -> None:
        """End the server and every job that still runs. Idempotent."""
        self._jobs.clear()
        while self._idle:
            self._idle.popitem()[1].close()
        if self._control.fileno() >= 0:
            # Closing is not enough: a process that was forked after this server may have a copy of the descriptor.
            self._control.shutdown(socket.SHUT_RDWR)
            self._control.close()
        if self._pid is not None:
            pid, self._pid = self._pid, None
            with contextlib.suppress(ChildProcessError):  # the user's handler or setting of SIGCHLD has reaped it
                os.waitpid(pid, 0)

    def _fork(self, in_child: Callable[[], None]) -> None:
        program = self._program
        self._control, server_end = channel()
        launcher = os.getpid()
        handlers, captured, generators = self._handlers, self._captured, self._generators
        flush_all()
        open_files = self._open_files or OpenFiles.of_this_process(besides=self._keep)

        def run_job(job: socket.socket) -> NoReturn:
            forget_the_parent(handlers)
            generators.renew()
            use_own_positions(open_files)
            work(job, JobOutput(), lambda: program)

        def be_the_server() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._control.close()
            in_child()
            serve(server_end, launcher, run_job, captured=captured)

        pid = fork_child(be_the_server, internal=True)
        server_end.close()
        self._pid = pid
        self._files_notice = open_files.notice()

    def _spawn(self) -> None:
        pickled = spawn.pickled_program(
            self._program,
            self._option,
            f"jobs start in fresh interpreters (spawn: {self.reason})",
            f"set {self._option}=fork",
        )
        self._control, server_end = channel()
        payload = os.memfd_create("gpu-launcher-program")
        try:
            os.write(payload, spawn.describe_interpreter(pickled, self._generators.pickled_globals()))
            line = spawn.command("serve_spawning", server_end.fileno(), os.getpid(), payload, int(self._captured))
            server = subprocess.Popen(
                line,
                pass_fds=(server_end.fileno(), payload, *self._keep),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment()},
            )
        finally:
            os.close(payload)
            server_end.close()
        self._pid = server.pid
        server.returncode = 0  # we reap it ourselves


def _threads_in_use() -> str | None:
    """Return a text that names the other threads of this process; None if there are none.

    Call this right after a fork: OpenBLAS and similar libraries shut down their threads for it.
    """
    names = other_threads()
    if not names:
        return None
    return f"{len(names)} other thread(s) run in this program ({', '.join(sorted(set(names)))})"
