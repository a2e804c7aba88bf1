"""What the launching program, the fork server, supervisors and jobs say to each other, and how it travels.

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

_LARGE = 64 * 1024
"""Bytes above which a message travels in a memory file: a datagram must fit the socket's send buffer (socket(7))."""

_MOST_DESCRIPTORS = 64

_MAX_COMPRESSED = 256 * 1024
"""Bytes up to which a payload is compressed, which takes some milliseconds."""

_REPORT_FORMAT = 1
_MAX_MESSAGE = 64 * 1024
"""Characters of a job's message that are kept."""


class ChannelClosedError(ConnectionError):
    """The process at the other end is gone."""


def channel() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, message: object, descriptors: tuple[int, ...] = (), *, wait: bool = True) -> None:
    """Send one message. The receiver gets copies of `descriptors`; those here stay open.

    Raises ChannelClosedError if nobody can receive it any more, and, if it is not to `wait`, BlockingIOError while
    there is no room for it.
    """
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    memory: int | None = None
    try:
        if len(data) > _LARGE:
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


def receive(source: socket.socket) -> tuple[Any, tuple[int, ...]]:
    """Wait for one message; returns it with its descriptors, which the caller must close.

    Raises ChannelClosedError at the end of the conversation, and BlockingIOError on a non-blocking socket
    with nothing to read.
    """
    try:
        data, descriptors, flags, _ = socket.recv_fds(source, 2 * _LARGE, _MOST_DESCRIPTORS)
    except ConnectionResetError:
        # The other end closed without having read all that we sent. The kernel says so once, before it hands out
        # what the other end had still sent.
        data, descriptors, flags, _ = socket.recv_fds(source, 2 * _LARGE, _MOST_DESCRIPTORS)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # SCM_RIGHTS descriptors arrive without close-on-exec
    if flags & socket.MSG_CTRUNC:
        for descriptor in descriptors:
            os.close(descriptor)
        raise OSError(errno.EMFILE, "a message came without its descriptors: too many open files (`ulimit -n`)")
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
    """A supervisor was killed; what it supervised has been killed and is gone."""

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
    """Whether they were ended because the fork server had been killed."""
    printed: bytes = b""
    """The end of what the job printed before it had a log."""
    left_behind: tuple[str, ...] = ()
    """Processes that outlived the job's main process and had to be ended: `tensorboard --logdir runs (pid 4711)`."""


# From the launching program to a job.


@dataclass(frozen=True, slots=True)
class Assignment:
    """The first message a job gets: which one it is. It prepares itself and then waits for its grant."""

    number: int
    spec: Any
    """What the program needs to know, such as the list of overrides."""
    result: str
    """Path of the file in which to leave the Report."""
    attempt: int = 1
    """How many times it has been started, this time included."""
    about: Any = None
    """What the program's code may want to know, such as which trial it is."""
    title: str = ""
    """The name of its process in `ps`."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Go. The descriptors that come with it are the lease's; they stay open as long as the job lives."""

    environment: dict[str, str]
    """To be set before any code of the user runs, such as `CUDA_VISIBLE_DEVICES`."""
    cpus: frozenset[int] | None = None
    """To run on those CPUs only; None for wherever the launching program may."""


@dataclass(frozen=True, slots=True)
class JobReply:
    """What whoever asked for the job has to say to it, after the grant."""

    what: Any


@dataclass(frozen=True, slots=True)
class LogFile:
    """The job's log file, which may be another one than it proposed."""

    path: str


# From a job to the launching program.


@dataclass(frozen=True, slots=True)
class JobPrepared:
    """The job has done what needs no devices, and waits."""

    request: Request
    log: str | None
    """Path of the file that is to get its stdout and stderr. The job waits for a LogFile before it opens it."""
    pid: int
    options: Any = None
    """Options of its own, as the program and the launching program have agreed; None for those of the sweep."""
    place: tuple[int, int] | None = None
    """Device and inode of the log's directory, which may have several names."""


@dataclass(frozen=True, slots=True)
class JobMessage:
    """Something for the source of the job, which may send a JobReply."""

    what: Any


@dataclass(frozen=True, slots=True)
class ResultWritten:
    """The Report is in its file. Anybody may replace a file in a shared directory; nobody else has this channel."""

    digest: bytes
    """SHA-256 of the file's content."""


@dataclass(frozen=True, slots=True)
class ResultLost:
    """The Report could not be written to its file."""

    problem: str
    """Names the directory, so that jobs which fail together on a full disk fail in the same way."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a job, as it is in its result file.

    The file is a line of JSON, which anybody may read, and the compressed payload, which only the program that started
    the job unpickles.
    """

    ok: bool
    message: str | None
    """For a failed job: the cause in one line."""
    payload: bytes
    """For the program that started the job; pickled and unpickled there."""
    out_of_memory: bool = False
    """For a failed job: whether its GPU's memory was not enough."""
    pruned: bool = False
    """For a failed job: whether it is a trial that ended itself early, which is no failure."""
    origin: str = ""
    """For a failed job: the line of the user's code that raised, or the last line that a command printed to stderr."""
    values: tuple[float, ...] = ()
    """For a completed job: what it returned, if that is a number or a few of them."""

    def dump(self, number: int) -> bytes:
        """Content of the result file of job `number`. Thousands are kept, so it is made small where that is quick."""
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
