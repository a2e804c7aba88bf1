"""Authenticated connections over real sockets, under attack: only an end with the key gets in, and nothing stops it."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gpu_launcher.nodes import authenticated_socket
from gpu_launcher.nodes.authenticated_socket import (
    HANDSHAKE_SECONDS,
    MAX_HANDSHAKES,
    AuthenticatedSocket,
    FrameKind,
    Listener,
    connect,
    own_addresses,
)
from gpu_launcher.nodes.authentication import MAGIC, MAX_CONTENT, new_key

LONG = 60.0
"""Maximum seconds for what takes milliseconds on an idle machine."""


@pytest.fixture
def key() -> bytes:
    return new_key()


@pytest.fixture
def listener(key: bytes) -> Iterator[Listener]:
    with Listener(key) as listening:
        yield listening


def until_accepted(listener: Listener) -> AuthenticatedSocket:
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        select.select([listener], [], [], 0.05)
        if (connection := listener.accept()) is not None:
            return connection
    raise AssertionError("no connection is accepted")


def serve(listener: Listener, over: Callable[[], bool]) -> None:
    """Let the listener work until something is true, and expect that it accepts nothing."""
    end = time.monotonic() + LONG
    while not over():
        assert time.monotonic() < end, "it does not become true"
        select.select([listener], [], [], 0.05)
        assert listener.accept() is None


@contextlib.contextmanager
def connecting(listener: Listener, key: bytes, *addresses: str) -> Iterator[list[AuthenticatedSocket | str]]:
    """Connect in a thread. The list gets the connection, or what is wrong."""
    found: list[AuthenticatedSocket | str] = []

    def run() -> None:
        try:
            found.append(connect(addresses or ("127.0.0.1",), listener.port, key))
        except ConnectionError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        thread.join(LONG)
        for one in found:
            if isinstance(one, AuthenticatedSocket):
                one.close()


@pytest.fixture
def pair(listener: Listener, key: bytes) -> Iterator[tuple[AuthenticatedSocket, AuthenticatedSocket]]:
    with connecting(listener, key) as found, until_accepted(listener) as accepted:
        serve(listener, lambda: bool(found))
        (there,) = found
        assert isinstance(there, AuthenticatedSocket)
        yield accepted, there


def stranger(listener: Listener) -> socket.socket:
    return socket.create_connection(("127.0.0.1", listener.port), LONG)


def closed(connection: socket.socket) -> bool:
    """Whether the other end has closed the connection."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def test_both_ends_exchange_data_of_any_size(pair):
    here, there = pair
    data = bytes(range(256)) * 1024
    sender = threading.Thread(target=here.send, args=(FrameKind.DATA, data))
    sender.start()
    arrived = b""
    while len(arrived) < len(data):
        arrived += b"".join(frame.data for frame in there.receive())
    sender.join(LONG)
    assert arrived == data
    there.send(FrameKind.ERRORS, b"oops")
    there.send(FrameKind.END)
    frames = []
    while len(frames) < 2:
        frames += here.receive()
    assert [(frame.kind, frame.data) for frame in frames] == [(FrameKind.ERRORS, b"oops"), (FrameKind.END, b"")]


def test_connection_that_ends_without_saying_so_is_lost(pair):
    here, there = pair
    there.close()
    with pytest.raises(ConnectionError, match="the connection was closed"):
        here.receive()


def test_connector_tries_all_addresses(listener, key):
    with connecting(listener, key, "a..b", "255.255.255.255", "127.0.0.1"), until_accepted(listener):
        pass


def test_own_addresses_are_those_of_this_machine(listener, key):
    addresses = own_addresses()
    assert addresses[-1] == "127.0.0.1"
    assert addresses[0] == socket.gethostname()
    assert len(set(addresses)) == len(addresses)
    with connecting(listener, key, *addresses), until_accepted(listener):
        pass


def test_connector_gives_up_at_once_if_nothing_listens(key):
    with Listener(key) as gone:
        port = gone.port
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1: .*refused"):
        connect(("127.0.0.1",), port, key)


def test_connector_without_the_key_is_refused(listener):
    with connecting(listener, new_key()) as found:
        serve(listener, lambda: bool(found))
    (problem,) = found
    assert isinstance(problem, str)
    assert "has closed the connection" in problem or "reset" in problem


def test_listener_without_the_key_is_refused(key):
    with Listener(new_key()) as other, connecting(other, key) as found:
        serve(other, lambda: bool(found))
    assert isinstance(found[0], str)


def test_man_in_the_middle_without_the_key_can_only_cut_the_connection(pair, listener):
    here, there = pair
    there._socket.sendall(struct.pack(">I", 5) + b"drm -f" + bytes(32))
    with pytest.raises(ConnectionError, match="a frame is not the next one that the other end sent"):
        here.receive()


def test_frame_that_announces_a_gigabyte_costs_no_memory(pair):
    here, there = pair
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    there._socket.sendall(struct.pack(">I", 10**9) + bytes(1000))
    with pytest.raises(ConnectionError, match=f"must have 1 to {MAX_CONTENT}"):
        here.receive()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_whoever_sends_something_else_is_dropped(listener):
    with stranger(listener) as attacker:
        attacker.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
        serve(listener, lambda: closed(attacker))


def test_stranger_learns_no_more_than_a_random_number(listener):
    with stranger(listener) as attacker:
        attacker.sendall(bytes(64))
        serve(listener, lambda: select.select([attacker], [], [], 0)[0] != [])
        heard = attacker.recv(4096)
        serve(listener, lambda: closed(attacker))
    assert heard.startswith(MAGIC)
    assert len(heard) == len(MAGIC) + 32


def test_silent_and_slow_strangers_do_not_hold_up_the_agent(listener, key):
    with contextlib.ExitStack() as stack:
        attackers = [stack.enter_context(stranger(listener)) for _ in range(MAX_HANDSHAKES // 2)]
        for attacker in attackers[::2]:
            attacker.sendall(b"x" * 63)
        serve(listener, lambda: len(listener._candidates) == len(attackers))
        with connecting(listener, key), until_accepted(listener):
            pass


def test_stranger_who_says_nothing_is_dropped(listener, monkeypatch):
    monkeypatch.setattr(authenticated_socket, "HANDSHAKE_SECONDS", 0.2)
    with stranger(listener) as attacker:
        serve(listener, lambda: closed(attacker))
    assert HANDSHAKE_SECONDS == 10.0


def test_number_of_strangers_is_bounded_and_the_newest_are_kept(listener, key):
    with contextlib.ExitStack() as stack:
        attackers = [stack.enter_context(stranger(listener)) for _ in range(3 * MAX_HANDSHAKES)]
        serve(listener, lambda: sum(map(closed, attackers)) == 2 * MAX_HANDSHAKES)
        assert len(listener._candidates) == MAX_HANDSHAKES
        assert all(map(closed, attackers[: 2 * MAX_HANDSHAKES]))
        with connecting(listener, key), until_accepted(listener):
            pass


def test_only_one_connection_is_accepted_and_the_others_are_closed(key):
    with Listener(key) as listener:
        second = stranger(listener)
        serve(listener, lambda: len(listener._candidates) == 1)
        with connecting(listener, key), until_accepted(listener):
            listener.close()
            serve_closed = time.monotonic() + LONG
            while not closed(second):
                assert time.monotonic() < serve_closed
            with pytest.raises(ConnectionError):
                connect(("127.0.0.1",), listener.port, key)
        second.close()


def test_connector_does_not_wait_for_a_listener_that_says_nothing(key, monkeypatch):
    monkeypatch.setattr(authenticated_socket, "HANDSHAKE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ConnectionError, match="timed out"):
        connect(("127.0.0.1",), silent.getsockname()[1], key)


def test_connector_does_not_wait_for_a_listener_that_speaks_slowly(key, monkeypatch):
    monkeypatch.setattr(authenticated_socket, "HANDSHAKE_SECONDS", 0.3)
    monkeypatch.setattr(authenticated_socket, "MAX_ROUNDS", 1)
    over = threading.Event()

    def drip(server: socket.socket) -> None:
        with contextlib.suppress(OSError), server.accept()[0] as connection:
            for byte in MAGIC * 1000:
                if over.wait(0.01):
                    return
                connection.sendall(bytes([byte]))

    with socket.create_server(("127.0.0.1", 0)) as slow:
        thread = threading.Thread(target=drip, args=(slow,))
        thread.start()
        with pytest.raises(ConnectionError, match=r"is too slow|timed out|is not gpu-launcher"):
            connect(("127.0.0.1",), slow.getsockname()[1], key)
        over.set()
        thread.join(LONG)
