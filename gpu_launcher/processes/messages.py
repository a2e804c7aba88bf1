"""Messages between the launching program, the fork server, supervisors and jobs, and how they are sent.

One message is one datagram of a `SOCK_SEQPACKET` socket pair: it arrives whole or not at all, in order, and may carry
descriptors. The peers are processes of one program, so pickle is safe here.
"""

from __future__ import annotations

import array
import errno
import json
import os
import pickle
import socket
import zlib
from dataclasses import dataclass, replace
from typing import Any

from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.model import Request

_MAX_DATAGRAM = 64 * 1024
"""Bytes up to which a message is sent as a datagram, which must fit the socket's send buffer (socket(7)). A larger one
is sent as a memory file."""

_MAX_DESCRIPTORS = 64

_MAX_COMPRESSED = 256 * 1024
"""Bytes up to which a payload is compressed: more takes too long."""

_REPORT_FORMAT = 1
_MAX_MESSAGE = 64 * 1024
"""Characters kept of a job's message."""


class ChannelClosedError(ConnectionError):
    """The process at the other end is gone."""


class DescriptorsLostError(OSError):
    """This process has too many open files, so that a message came without its descriptors."""

    message: Any = None
    """The message, if it was not in one of them."""


def channel() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, message: object, descriptors: tuple[int, ...] = (), *, wait: bool = True) -> None:
    """Send one message. The receiver gets copies of `descriptors`; those here stay open.

    Raises ChannelClosedError if the other end is closed. Unless it may `wait`, raises BlockingIOError while the
    socket's buffer is full.
    """
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    memory: int | None = None
    try:
        if len(data) > _MAX_DATAGRAM:
            memory = os.memfd_create("gpu-launcher-message")
            _write_all(memory, data)
            descriptors = (*descriptors, memory)
            data = b""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        to.sendmsg([data or b"\0"], rights, 0 if wait else socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ChannelClosedError(*error.args) from None
    finally:
        if memory is not None:
            os.close(memory)


def receive(source: socket.socket, *, wait: bool = True) -> tuple[Any, tuple[int, ...]]:
    """Wait for one message; returns it with its descriptors, which the caller must close.

    Raises ChannelClosedError if the other end is closed, and BlockingIOError if there is no message and it is not to
    `wait` or the socket is non-blocking.
    """
    how = 0 if wait else socket.MSG_DONTWAIT
    try:
        data, descriptors, flags, _ = socket.recv_fds(source, 2 * _MAX_DATAGRAM, _MAX_DESCRIPTORS, how)
    except ConnectionResetError:
        # The other end closed without having read all that we sent. The kernel says so once, before it hands out
        # what the other end had still sent.
        data, descriptors, flags, _ = socket.recv_fds(source, 2 * _MAX_DATAGRAM, _MAX_DESCRIPTORS, how)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # SCM_RIGHTS descriptors arrive without close-on-exec
    if flags & socket.MSG_CTRUNC:
        for descriptor in descriptors:
            os.close(descriptor)
        lost = DescriptorsLostError(
            errno.EMFILE, "a message came without its descriptors: too many open files (`ulimit -n`)"
        )
        lost.message = None if data in (b"", b"\0") else pickle.loads(data)
        raise lost
    if not data:
        raise ChannelClosedError("the other end is closed")
    if data == b"\0":
        *rest, memory = descriptors
        try:
            data = os.pread(memory, os.fstat(memory).st_size, 0)
        finally:
            os.close(memory)
        descriptors = rest
    return pickle.loads(data), tuple(descriptors)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


# From the launching program to the fork server.


@dataclass(frozen=True, slots=True)
class StartSupervisor:
    """Fork a supervisor. Carries one descriptor: its end of a channel to the launching program."""

    supervisor: int
    """The launching program's number for it."""


# From the fork server to the launching program.


@dataclass(frozen=True, slots=True)
class SupervisorDied:
    """A supervisor was killed. Its job's processes have been killed as well."""

    supervisor: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A supervisor could not be forked, or could not fork its job."""

    supervisor: int
    problem: str


# From the launching program to a supervisor.


@dataclass(frozen=True, slots=True)
class StartJob:
    """Fork a job and supervise it. Carries one descriptor: the job's end of its channel to the launching program."""


@dataclass(frozen=True, slots=True)
class HoldLease:
    """Keep the descriptors that come with this message open until the job's whole process tree is gone."""


@dataclass(frozen=True, slots=True)
class SignalJob:
    """Send `signum` to the job's process group, as a terminal would."""

    signum: int


@dataclass(frozen=True, slots=True)
class KillJob:
    """SIGKILL the whole process tree of the job."""


# From a supervisor to the launching program.


@dataclass(frozen=True, slots=True)
class JobExited:
    """The job and all its descendants are gone, and the supervisor's copy of the lease is closed.

    The supervisor waits for the next job, unless this one was `abandoned`.
    """

    status: int
    """Of the job's main process, as `os.waitpid` gives it."""
    abandoned: bool = False
    """Whether they were ended because the fork server was killed."""
    printed: bytes = b""
    """The last output of the job before it had a log."""
    left_behind: tuple[str, ...] = ()
    """Processes that outlived the job's main process and had to be ended: `tensorboard --logdir runs (pid 4711)`."""


# From the launching program to a job.


@dataclass(frozen=True, slots=True)
class Assignment:
    """The first message that a job receives: which job it is. It prepares itself and then waits for its grant.

    May carry a descriptor: the job's end of a channel to its source.
    """

    number: int
    spec: Any
    """What the program needs to know, such as the list of overrides."""
    result: str
    """Path of the file to write the Report to."""
    attempt: int = 1
    """Number of this start of the job, counted from 1."""
    about: Any = None
    """Data for the program's code, such as the trial."""
    title: str = ""
    """The name of its process in `ps`."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The job has its devices and may run. Carries the lease's descriptors, which stay open while the job lives."""

    environment: dict[str, str]
    """Variables to set before any code of the user runs, such as `CUDA_VISIBLE_DEVICES`."""
    cpus: frozenset[int] | None = None
    """CPUs to run on; None for all that the launching program may use."""


@dataclass(frozen=True, slots=True)
class JobReply:
    """Something from the source of the job, after the grant."""

    what: Any


@dataclass(frozen=True, slots=True)
class LogFile:
    """The job's log file, which may differ from the one it proposed."""

    path: str


# From a job to the launching program.


@dataclass(frozen=True, slots=True)
class JobPrepared:
    """The job has done what needs no devices and waits for its grant."""

    request: Request
    log: str | None
    """Proposed path of the file for its stdout and stderr. The job waits for a LogFile before it opens one."""
    pid: int
    options: Any = None
    """Options of this job alone, in a form that its program defines; None to use the sweep's."""
    place: tuple[int, int] | None = None
    """Device and inode of the log's directory, which identify it under any name."""


@dataclass(frozen=True, slots=True)
class JobMessage:
    """Something for the source of the job, which may send a JobReply."""

    what: Any


@dataclass(frozen=True, slots=True)
class ResultWritten:
    """The Report is in its file. The digest proves that, because others may replace a file in a shared directory."""

    digest: bytes
    """SHA-256 of the file's content."""


@dataclass(frozen=True, slots=True)
class ResultLost:
    """The Report could not be written to its file."""

    problem: str
    """Error message. It names the directory, so that jobs that fail together on a full disk have one message."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a job, as its result file has it.

    The file has a line of JSON, which anyone may read, and the compressed payload, which only the program that started
    the job unpickles.
    """

    ok: bool
    message: str | None
    """For a failed job: the cause in one line."""
    payload: bytes
    """For the program that started the job; pickled and unpickled there."""
    out_of_memory: bool = False
    """For a failed job: whether its GPU ran out of memory."""
    pruned: bool = False
    """For a failed job: whether it is a trial that was pruned, which is not a failure."""
    origin: str = ""
    """For a failed job: the line of the user's code that raised, or the last line that a command printed to stderr."""
    values: tuple[float, ...] = ()
    """For a completed job: the number or numbers that it returned; empty for anything else."""

    def dump(self, number: int) -> bytes:
        """Return the content of the result file of job `number`, compressed if small: thousands are kept."""
        header = {
            "format": _REPORT_FORMAT,
            "number": number,
            "ok": self.ok,
            "message": self.message and self.message[:_MAX_MESSAGE],
            "out_of_memory": self.out_of_memory,
            "pruned": self.pruned,
            "origin": self.origin[:_MAX_MESSAGE],
            "values": self.values,
        }
        payload = zlib.compress(self.payload, 1 if len(self.payload) <= _MAX_COMPRESSED else 0)
        return json.dumps(header).encode() + b"\n" + payload

    @classmethod
    def load(cls, data: bytes) -> Report:
        """Read what `dump` returned. Raises ValueError for anything else."""
        report = cls.load_header(data)
        try:
            return replace(report, payload=zlib.decompress(data[data.index(b"\n") + 1 :]))
        except zlib.error as error:
            raise ValueError(f"invalid report: {error}") from error

    @classmethod
    def load_header(cls, data: bytes) -> Report:
        """Read what `dump` returned, or its first line, without the payload. Raises ValueError for anything else."""
        line, newline, _ = data.partition(b"\n")
        if not newline:
            raise ValueError("invalid report: no header")
        try:
            fields = Fields(load_object(line))
            fields.integer("format", _REPORT_FORMAT, _REPORT_FORMAT)
            ok, out_of_memory, pruned = (fields.boolean(name) for name in ("ok", "out_of_memory", "pruned"))
            message, origin = fields.text_or_none("message"), fields.text("origin")
            return cls(ok, message, b"", out_of_memory, pruned, origin, fields.numbers("values"))
        except ValueError as error:
            raise ValueError(f"invalid report: {error}") from error
