"""Messages between the node, the fork server, supervisors and jobs, and the functions that send and receive them.

One message is one datagram of a `SOCK_SEQPACKET` socket pair. Messages arrive whole or not at all, in order, and may
carry descriptors. The peers are processes of one program, so pickle is safe here. The head and the node use the same
functions for messages of their own (`jobs.node_messages`).
"""

from __future__ import annotations

import array
import errno
import json
import os
import pickle
import socket
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from gpu_launcher.json_data import Fields, Values, load_object
from gpu_launcher.model import Request

_MAX_DATAGRAM = 64 * 1024
"""Maximum size in bytes of a message sent as a datagram, which must fit the socket's send buffer (socket(7)).

A larger message is sent as a memory file.
"""

_MAX_DESCRIPTORS = 64

_MAX_COMPRESSED = 256 * 1024
"""Maximum size in bytes of a payload that is compressed. Compressing a larger one takes too long."""

_REPORT_FORMAT = 1
_MAX_MESSAGE = 64 * 1024
"""Maximum number of characters of a report's message and origin. The rest is cut off."""


class ChannelClosedError(ConnectionError):
    """Raised when the other end of a channel is closed, usually because its process is gone."""


class DescriptorsLostError(OSError):
    """Raised when a message arrives without its descriptors because this process has too many open files."""

    message: Any = None
    """The message; None if one of the lost descriptors contained it."""


def channel() -> tuple[socket.socket, socket.socket]:
    """Return two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, message: object, descriptors: tuple[int, ...] = (), *, wait: bool = True) -> None:
    """Send one message. The receiver gets copies of `descriptors`; the sender's stay open.

    Raises ChannelClosedError if the other end is closed. Without `wait`, raises BlockingIOError if the socket's buffer
    is full.
    """
    send_data(to, pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL), descriptors, wait=wait)


def send_data(to: socket.socket, data: bytes, descriptors: tuple[int, ...] = (), *, wait: bool = True) -> None:
    """Send one message that is pickled already. See `send`."""
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
    """Wait for one message. Returns it with its descriptors, which the caller must close.

    Raises ChannelClosedError if the other end is closed. Without `wait`, or if the socket is non-blocking, raises
    BlockingIOError if there is no message.
    """
    data, descriptors = receive_data(source, wait=wait)
    return pickle.loads(data), descriptors


def receive_data(source: socket.socket, *, wait: bool = True) -> tuple[bytes, tuple[int, ...]]:
    """Wait for one message, and return it pickled. See `receive`."""
    how = 0 if wait else socket.MSG_DONTWAIT
    try:
        data, descriptors, flags = _receive_datagram(source, how)
    except ConnectionResetError:
        # The other end closed without reading everything that we sent. The kernel reports this once, before it
        # delivers what the other end had sent.
        data, descriptors, flags = _receive_datagram(source, how)
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
            data = _read_all(memory)
        finally:
            os.close(memory)
        descriptors = rest
    return data, tuple(descriptors)


def _receive_datagram(source: socket.socket, how: int) -> tuple[bytes, list[int], int]:
    """Receive a datagram with its descriptors, and flags. Like `socket.recv_fds`, which ignores `how`."""
    received = array.array("i")
    room = socket.CMSG_LEN(_MAX_DESCRIPTORS * received.itemsize)
    data, ancillary, flags, _ = source.recvmsg(2 * _MAX_DATAGRAM, room, how)
    for level, kind, descriptors in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(descriptors[: len(descriptors) // received.itemsize * received.itemsize])
    return data, received.tolist(), flags


def _read_all(descriptor: int) -> bytes:
    """Return the content of a file from its beginning. One call of pread(2) returns less than 2 GiB."""
    size, parts, read = os.fstat(descriptor).st_size, [], 0
    while part := os.pread(descriptor, size - read, read):
        parts.append(part)
        read += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


# From the node to the fork server.


@dataclass(frozen=True, slots=True)
class StartSupervisor:
    """Fork a supervisor. Carries one descriptor: the supervisor's end of a channel to the node."""

    supervisor: int
    """The node's number for the supervisor."""


# From the fork server to the node.


@dataclass(frozen=True, slots=True)
class SupervisorDied:
    """A supervisor was killed. Its job's processes have been killed too."""

    supervisor: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A supervisor could not be forked, or could not fork its job."""

    supervisor: int
    problem: str


# From the node to a supervisor.


@dataclass(frozen=True, slots=True)
class StartJob:
    """Fork a job and supervise it. Carries one descriptor: the job's end of its channel to the node."""


@dataclass(frozen=True, slots=True)
class HoldLease:
    """Keep this message's descriptors open until the job's whole process tree is gone."""


@dataclass(frozen=True, slots=True)
class SignalJob:
    """Send `signum` to the job's process group, as a terminal does."""

    signum: int


@dataclass(frozen=True, slots=True)
class KillJob:
    """Kill the job's whole process tree with SIGKILL."""


# From a supervisor to the node.


@dataclass(frozen=True, slots=True)
class JobExited:
    """The job and all its descendants are gone, and the supervisor's copy of the lease is closed.

    The supervisor waits for the next job, unless this one was `abandoned`.
    """

    status: int
    """Status of the job's main process, as `os.waitpid` returns it."""
    abandoned: bool = False
    """Whether the job was ended because the fork server was killed."""
    printed: bytes = b""
    """The end of what the job printed before it had a log."""
    left_behind: tuple[str, ...] = ()
    """Processes that outlived the job's main process and had to be ended: `tensorboard --logdir runs (pid 4711)`."""
    peak_memory: int = field(default=0, compare=False)
    """Most bytes of memory that one of its processes had resident. A measurement, which does not count in tests of
    equality."""


# From the node to a job.


@dataclass(frozen=True, slots=True)
class Assignment:
    """The first message that a job receives. The job prepares itself and then waits for its grant.

    It may carry a descriptor: the job's end of a channel to its source.
    """

    number: int
    spec: Any
    """The program's input for this job, such as the list of overrides."""
    result: str
    """Path of the file to write the Report to."""
    attempt: int = 1
    """Number of this attempt, counted from 1."""
    about: Any = None
    """Data for the program's code, such as the trial."""
    title: str = ""
    """Name of the job's process in `ps`."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The job has its devices and may run. Carries the lease's descriptors, which stay open while the job lives."""

    environment: dict[str, str]
    """Variables to set before any code of the user runs, such as `CUDA_VISIBLE_DEVICES`."""
    cpus: frozenset[int] | None = None
    """CPUs to run on; None for all that the node may use."""


@dataclass(frozen=True, slots=True)
class JobReply:
    """A message from the source of the job, sent after the grant."""

    what: Any


@dataclass(frozen=True, slots=True)
class LogFile:
    """The job's log file, which may differ from the one it proposed."""

    path: str


# From a job to the node.


@dataclass(frozen=True, slots=True)
class JobPrepared:
    """The job has done everything that does not need devices, and waits for its grant."""

    request: Request
    log: str | None
    """Proposed path of the file for its stdout and stderr. The job waits for a LogFile before it opens the file."""
    pid: int
    options: Any = None
    """Options that apply to this job only, in a form that its program defines; None to use the sweep's."""
    place: tuple[int, int] | None = None
    """Device and inode of the log's directory, which identify it under any name."""


@dataclass(frozen=True, slots=True)
class JobMessage:
    """A message for the source of the job, which may send a JobReply."""

    what: Any


@dataclass(frozen=True, slots=True)
class ResultWritten:
    """The Report is in its file. Other users may replace a file in a shared directory; the digest detects that."""

    digest: bytes
    """SHA-256 of the file's content."""


@dataclass(frozen=True, slots=True)
class ResultLost:
    """The Report could not be written to its file."""

    problem: str
    """Error message. It names only the directory, so that jobs that fail on a full disk share one message."""


INTERRUPTED = "was interrupted"
"""The message of a report of a job that got SIGINT and let it end itself."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a job, as stored in its result file.

    The file contains a line of JSON, which anyone may read, and the compressed payload, which only the program that
    started the job unpickles.
    """

    ok: bool
    message: str | None
    """Cause of a failure in one line."""
    payload: bytes
    """Pickled data for the program that started the job."""
    out_of_memory: bool = False
    """Whether a failed job's GPU ran out of memory."""
    pruned: bool = False
    """Whether the job is a trial that was pruned. `ok` is then False, but it is not a failure."""
    origin: str = ""
    """Origin of a failure: the user's line that raised, or the last line that a command printed to stderr."""
    values: Values = field(default_factory=dict)
    """What a completed job returned for tables, by name; empty for anything that has no place in one."""
    killed: bool = False
    """Whether a signal ended the command that a job runs."""

    def dump(self, number: int) -> bytes:
        """Return the content of the result file of job `number`.

        Small payloads are compressed, because thousands of files are kept.
        """
        header = {
            "format": _REPORT_FORMAT,
            "number": number,
            "ok": self.ok,
            "message": self.message and self.message[:_MAX_MESSAGE],
            "out_of_memory": self.out_of_memory,
            "pruned": self.pruned,
            "origin": self.origin[:_MAX_MESSAGE],
            "values": self.values,
            "killed": self.killed,
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
            header = load_object(line)
            fields = Fields(header)
            fields.integer("format", _REPORT_FORMAT, _REPORT_FORMAT)
            ok, out_of_memory, pruned = (fields.boolean(name) for name in ("ok", "out_of_memory", "pruned"))
            killed = "killed" in header and fields.boolean("killed")  # earlier versions did not write it
            message, origin = fields.text_or_none("message"), fields.text("origin")
            return cls(ok, message, b"", out_of_memory, pruned, origin, fields.values("values"), killed)
        except ValueError as error:
            raise ValueError(f"invalid report: {error}") from error
