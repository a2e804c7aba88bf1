"""The control socket of a sweep: a Unix socket in the sweep's directory, served by the head.

Theory of operation. The head binds `.gpu_launcher/launch-<id>.sock`, which only its user and root can open, and also
asks the kernel who connects. It never waits for a client: what a client sends is read as it arrives, a request is
carried out as soon as its line is complete, and a client that does not read its answer is disconnected. What a client
may make the head keep is bounded, and so is the number of clients: the oldest gives way to a new one, after what it has
sent was answered.

A client that watches (`WatchSweep`) stays connected until the sweep ends. It gets the state of the sweep and then each
event (`jobs.event_lines`). If it does not read fast enough, the events that it misses are dropped, and once it has read
the rest it gets a new state. Such clients are counted apart, and do not give way.

The socket has no copy in other processes of ours, so connecting to the socket of a dead head is refused.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from gpu_launcher.debug_log import get_logger
from gpu_launcher.jobs.control import (
    MAX_LINE,
    Answer,
    Steering,
    WatchSweep,
    read_request,
    write_answer,
    write_refusal,
)

_log = get_logger("jobs.control_socket")

MAX_CLIENTS = 16
"""Maximum number of simultaneous clients."""
MAX_WATCHERS = 16
"""Maximum number of simultaneous clients that watch."""
MAX_UNREAD = 2**20
"""Maximum number of bytes of events that are kept for a client that does not read them."""
MAX_ACCEPTS = 64
"""Maximum number of connections that are accepted in one turn."""
RETRY_SECONDS = 0.02
"""Seconds between two attempts to connect to a head that does not listen yet, or has many clients to accept."""
ROOT = 0
_CREDENTIALS = struct.Struct("3i")
"""Layout of struct ucred: process id, user id, group id."""


class ControlSocket:
    """The head's end: it listens, and answers requests when `fileno()` is readable."""

    def __init__(self, directory: Path, name: str) -> None:
        """Listen as the file `name` in `directory`. Raises OSError, such as on a file system without sockets."""
        self._path = directory / name
        self._process = os.getpid()
        self._clients: dict[int, _Client] = {}
        """By descriptor, the oldest first."""
        self._watchers: dict[int, _Watcher] = {}
        """Clients that watch, by descriptor."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(self._listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)  # the mode that the file gets
            with _opened(directory, os.O_DIRECTORY) as home:
                self._listener.bind(f"/proc/self/fd/{home}/{name}")  # the path itself may be too long for a socket
            self._listener.listen(MAX_CLIENTS)
            self._epoll = select.epoll()
            # Edge-triggered: no busy loop if a connection cannot be accepted for lack of descriptors.
            self._epoll.register(self._listener, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self._listener.close()
            raise

    def fileno(self) -> int:
        """Return a descriptor that is readable when `serve` has something to do."""
        return self._epoll.fileno()

    @property
    def is_watched(self) -> bool:
        """Whether a client watches."""
        return bool(self._watchers)

    def serve(self, carry_out: Callable[[Steering], Answer], state: Callable[[], bytes]) -> None:
        """Accept clients, answer the requests that have arrived, and send what those who watch have not read yet.

        Never waits. `carry_out` raises ValueError for a request that it refuses; the message is for the sender. `state`
        returns the line of the sweep's present state.
        """

        def answer(request: Steering) -> Answer:
            if not isinstance(request, WatchSweep):
                return carry_out(request)
            if len(self._watchers) == MAX_WATCHERS:
                raise ValueError(f"{MAX_WATCHERS} programs watch it already")
            return {}

        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                self._accept(answer, state)
            elif (watcher := self._watchers.get(descriptor)) is not None:
                self._keep(watcher, watcher.is_connected() and watcher.send(state))
            elif descriptor in self._clients:
                self._serve(descriptor, answer, state)

    def publish(self, line: bytes) -> None:
        """Send the line of an event to those who watch. Never waits."""
        for watcher in list(self._watchers.values()):
            self._keep(watcher, watcher.tell(line))

    def _serve(self, descriptor: int, answer: Callable[[Steering], Answer], state: Callable[[], bytes]) -> None:
        client = self._clients[descriptor]
        if not client.serve(answer):
            self._drop(descriptor)
        elif client.watches:
            watcher = self._watchers[descriptor] = _Watcher(self._clients.pop(descriptor).connection)
            self._keep(watcher, watcher.send(state))

    def _keep(self, watcher: _Watcher, connected: bool) -> None:
        """Continue with a client that watches, if it is connected."""
        if connected:
            self._epoll.modify(watcher.connection, select.EPOLLIN | (select.EPOLLOUT if watcher.waits else 0))
        else:
            del self._watchers[watcher.connection.fileno()]
            watcher.connection.close()

    def _accept(self, answer: Callable[[Steering], Answer], state: Callable[[], bytes]) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # no more, or too many open files
                return
            connection.setblocking(False)
            if not _may_steer(connection):
                connection.close()
                continue
            if len(self._clients) == MAX_CLIENTS:
                oldest = next(iter(self._clients))
                self._serve(oldest, answer, state)
                if oldest in self._clients:
                    self._drop(oldest)
            self._clients[connection.fileno()] = _Client(connection)
            self._epoll.register(connection, select.EPOLLIN)

    def _drop(self, descriptor: int) -> None:
        self._clients.pop(descriptor).connection.close()

    def close(self) -> None:
        """Stop listening. In a fork of the head, only close its copies."""
        if os.getpid() == self._process:
            with suppress(OSError):
                self._path.unlink()
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # forks of the head may have a copy
        self._listener.close()
        for client in self._clients.values():
            client.connection.close()
        for watcher in self._watchers.values():
            watcher.connection.close()
        self._clients.clear()
        self._watchers.clear()
        self._epoll.close()


def open_control(directory: Path, name: str) -> ControlSocket | None:
    """Open a sweep's control socket. Returns None if its directory cannot hold one; the jobs run anyway."""
    try:
        return ControlSocket(directory, name)
    except OSError as error:
        _log.warning("no control socket in %s: %s", directory, error)
        return None


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.watches = False
        """Whether it has asked to watch."""
        self._received = b""

    def serve(self, carry_out: Callable[[Steering], Answer]) -> bool:
        """Answer the requests that are complete. Returns whether the client may send more."""
        try:
            arrived = self.connection.recv(MAX_LINE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, self._received = (self._received + arrived).split(b"\n")
        for line in lines:
            request, answer = _answer(line, carry_out)
            if not self._send(answer):
                return False
            if isinstance(request, WatchSweep):
                self.watches = True
                return True
        if len(self._received) > MAX_LINE:
            self._send(write_refusal(f"a control request has at most {MAX_LINE} bytes"))
            return False
        return bool(arrived)

    def _send(self, line: bytes) -> bool:
        """Send an answer, unless the client does not read."""
        try:
            return self.connection.send(line, socket.MSG_NOSIGNAL) == len(line)
        except OSError:
            return False


class _Watcher:
    """One connection whose client watches."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._lines: deque[bytes] = deque()
        """What it has not been sent yet. A part of the first line may have been."""
        self._sent_of_first = 0
        self._unread = 0
        """Number of bytes of events among the lines."""
        self._needs_state = True
        """Whether it gets a state next, which contains all events until then."""

    @property
    def waits(self) -> bool:
        """Whether there is something to send when the client has read more."""
        return bool(self._lines) or self._needs_state

    def is_connected(self) -> bool:
        """Return whether the client is connected. What it sends is ignored."""
        try:
            return bool(self.connection.recv(MAX_LINE))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def tell(self, line: bytes) -> bool:
        """Send the line of an event. Returns whether the client is connected."""
        if self._needs_state:
            return True
        if self._unread + len(line) > MAX_UNREAD:
            self._needs_state = True
            while len(self._lines) > bool(self._sent_of_first):
                self._lines.pop()
            return True
        self._lines.append(line)
        self._unread += len(line)
        return self._flush()

    def send(self, state: Callable[[], bytes]) -> bool:
        """Send what the client has not read yet. Returns whether it is connected."""
        connected = self._flush()
        if connected and self._needs_state and not self._lines:
            self._needs_state = False
            self._lines.append(state())
            connected = self._flush()
        return connected

    def _flush(self) -> bool:
        while self._lines:
            line = self._lines[0]
            try:
                self._sent_of_first += self.connection.send(line[self._sent_of_first :], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if self._sent_of_first == len(line):
                self._lines.popleft()
                self._sent_of_first = 0
        self._unread = 0
        return True


def _answer(line: bytes, carry_out: Callable[[Steering], Answer]) -> tuple[Steering | None, bytes]:
    """Return a request and its answer. Without the request if it was refused."""
    try:
        request = read_request(line)
        _log.info("request: %s", request)
        return request, write_answer(carry_out(request))
    except ValueError as error:
        _log.info("refused a request: %s", error)
        return None, write_refusal(str(error))


def _may_steer(connection: socket.socket) -> bool:
    """Whether the process that connected belongs to this user or root."""
    try:
        content = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return False
    _, user, _ = _CREDENTIALS.unpack(content)
    return user in (ROOT, os.geteuid())


def connect(path: Path, seconds: float) -> socket.socket:
    """Connect to a control socket. The connection's operations wait at most `seconds`.

    Raises OSError: FileNotFoundError if there is no such file, ConnectionRefusedError if its head has ended,
    PermissionError if it is another user's, and BlockingIOError if too many clients wait for as long as that.
    """
    until = time.monotonic() + seconds
    with _opened(path, os.O_NOFOLLOW) as file:
        if not stat.S_ISSOCK(os.fstat(file).st_mode):
            raise FileNotFoundError(f"{path} is not a socket")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(seconds)
            while True:
                try:
                    connection.connect(f"/proc/self/fd/{file}")
                    break
                except BlockingIOError:  # the queue of connections is full; connect(2) does not wait with a timeout
                    if time.monotonic() >= until:
                        raise
                    time.sleep(RETRY_SECONDS)
        except BaseException:
            connection.close()
            raise
    return connection


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
