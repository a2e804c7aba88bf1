"""TCP connections whose ends have proved to each other that they have the same key. See `authentication`."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import psutil

from gpu_launcher.debug_log import get_logger
from gpu_launcher.nodes.authentication import MAX_CONTENT, AuthenticationError, Handshake, Session, Side

_log = get_logger("nodes.authenticated_socket")

MAX_HANDSHAKES = 32
"""Maximum number of connections that have not proved anything yet. Another one replaces the oldest."""
HANDSHAKE_SECONDS = 10.0
"""Maximum seconds for a handshake."""
CONNECT_SECONDS = 5.0
"""Maximum seconds to reach one address."""
MAX_ROUNDS = 3
"""How often all addresses are tried if something answers, but does not complete the handshake."""
MAX_ADDRESSES = 32
READ_BYTES = 256 * 1024


class FrameKind(Enum):
    """What a frame contains, as its first byte."""

    DATA = b"d"
    """Bytes of the stream."""
    ERRORS = b"e"
    """Bytes of the standard error."""
    END = b"x"
    """The stream ends here. The content says how."""


@dataclass(frozen=True, slots=True)
class ReceivedFrame:
    """A frame that the other end sent."""

    kind: FrameKind
    data: bytes


class AuthenticatedSocket:
    """A connection after its handshake. One thread may receive while others send."""

    def __init__(self, connection: socket.socket, session: Session) -> None:
        """Take over a connected socket."""
        self._socket = connection
        self._sealer, self._opener = session.sealer, session.opener
        self._sending = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> AuthenticatedSocket:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to receive."""
        return self._socket.fileno()

    def send(self, kind: FrameKind, data: bytes = b"") -> None:
        """Send a frame, or several if `data` is large. Waits until there is room. Raises OSError."""
        most = MAX_CONTENT - 1
        for begin in range(0, max(1, len(data)), most):
            with self._sending:  # the order of numbers is that of sending
                self._socket.sendall(self._sealer.seal(kind.value + data[begin : begin + most]))

    def receive(self) -> list[ReceivedFrame]:
        """Wait for something, and return the frames that are complete.

        Raises ConnectionError if the other end has closed the connection, which it announces with END, or if something
        else has arrived than what it sent.
        """
        data = self._socket.recv(READ_BYTES)
        if not data:
            raise ConnectionAbortedError("the connection was closed")
        try:
            contents = self._opener.open(data)
            return [ReceivedFrame(FrameKind(content[:1]), content[1:]) for content in contents]
        except AuthenticationError as error:
            raise ConnectionAbortedError(str(error)) from error

    def close(self) -> None:
        self._socket.close()


@dataclass(slots=True)
class _Candidate:
    """A connection that has not proved anything yet."""

    connection: socket.socket
    handshake: Handshake
    until: float


class Listener:
    """Waits for the one connection whose other end has the key. Others are closed."""

    def __init__(self, key: bytes) -> None:
        """Listen on all addresses of this machine. Raises OSError."""
        self._key = key
        self._candidates: dict[int, _Candidate] = {}
        """By descriptor, the oldest first."""
        try:
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
        except (OSError, ValueError):  # a machine without IPv6
            self._server = socket.create_server(("", 0), backlog=128)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self._epoll = select.epoll()
        self._epoll.register(self._server, select.EPOLLIN)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return a descriptor that is readable when `accept` has something to do."""
        return self._epoll.fileno()

    def accept(self) -> AuthenticatedSocket | None:
        """Continue all handshakes, and return the first connection that completes its own. Never waits."""
        now = time.monotonic()
        for candidate in list(self._candidates.values()):
            if now >= candidate.until:
                self._drop(candidate, "took too long")
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._server.fileno():
                self._take_new(now)
            elif descriptor in self._candidates:
                ready = self._candidates[descriptor]
                if (session := self._advance(ready)) is not None:
                    self._forget(ready)
                    return AuthenticatedSocket(ready.connection, session)
        return None

    def _take_new(self, now: float) -> None:
        for _ in range(MAX_HANDSHAKES):
            try:
                connection, _ = self._server.accept()
            except OSError:  # none is left, or it was reset already; see accept(2)
                return
            connection.setblocking(False)
            candidate = _Candidate(connection, Handshake(self._key, Side.LISTENER), now + HANDSHAKE_SECONDS)
            if len(self._candidates) >= MAX_HANDSHAKES:
                self._drop(next(iter(self._candidates.values())), "gives way to a newer one")
            self._candidates[connection.fileno()] = candidate
            self._epoll.register(connection, select.EPOLLIN)
            self._say(candidate, candidate.handshake.greeting)

    def _advance(self, candidate: _Candidate) -> Session | None:
        try:
            data = candidate.connection.recv(candidate.handshake.missing)
            if not data:
                self._drop(candidate, "was closed")
                return None
            answer = candidate.handshake.receive(data)
        except BlockingIOError:
            return None
        except (OSError, AuthenticationError) as error:
            self._drop(candidate, str(error))
            return None
        if answer and not self._say(candidate, answer):
            return None
        return candidate.handshake.session

    def _say(self, candidate: _Candidate, data: bytes) -> bool:
        """Send a few bytes, for which a new connection always has room."""
        try:
            sent = candidate.connection.send(data)
        except OSError:
            sent = 0
        if sent < len(data):
            self._drop(candidate, "could not be written to")
        return sent == len(data)

    def _forget(self, candidate: _Candidate) -> None:
        del self._candidates[candidate.connection.fileno()]
        self._epoll.unregister(candidate.connection)

    def _drop(self, candidate: _Candidate, why: str) -> None:
        _log.info("a connection %s", why)
        self._forget(candidate)
        candidate.connection.close()

    def close(self) -> None:
        """Listen no more, and close all connections that have not proved anything. Idempotent."""
        for candidate in self._candidates.values():
            candidate.connection.close()
        self._candidates.clear()
        self._server.close()
        self._epoll.close()


def own_addresses() -> tuple[str, ...]:
    """Return the name of this machine and its addresses, those first that others can probably reach."""
    found = [socket.gethostname()]
    for family in (socket.AF_INET, socket.AF_INET6):
        for addresses in psutil.net_if_addrs().values():
            found += [one.address for one in addresses if one.family == family]
    far = [one for one in found if not one.startswith(("127.", "fe80:")) and one != "::1"]
    return tuple(dict.fromkeys([*far, "127.0.0.1"]))[:MAX_ADDRESSES]  # the last for a node on the same machine


def connect(addresses: Sequence[str], port: int, key: bytes) -> AuthenticatedSocket:
    """Connect to the first of the addresses at which a listener has the key. Raises ConnectionError."""
    problems: list[str] = []
    for _ in range(MAX_ROUNDS):
        problems.clear()
        answered = False
        for address in addresses:
            try:
                with contextlib.ExitStack() as stack:
                    connection = socket.create_connection((address, port), CONNECT_SECONDS)
                    stack.callback(connection.close)
                    answered = True
                    session = _shake_hands(connection, key)
                    stack.pop_all()
                    return AuthenticatedSocket(connection, session)
            except (OSError, UnicodeError, AuthenticationError) as error:  # a host's name may be invalid
                problems.append(f"{address}: {error}")
        if not answered:
            break
    raise ConnectionError("; ".join(problems))


def _shake_hands(connection: socket.socket, key: bytes) -> Session:
    handshake = Handshake(key, Side.CONNECTOR)
    end = time.monotonic() + HANDSHAKE_SECONDS
    while handshake.session is None:
        connection.settimeout(max(0.001, end - time.monotonic()))
        data = connection.recv(handshake.missing)
        if not data:
            raise AuthenticationError("the other end has closed the connection")
        if answer := handshake.receive(data):
            connection.sendall(answer)
        if time.monotonic() >= end:
            raise AuthenticationError("the other end is too slow")
    return handshake.session
