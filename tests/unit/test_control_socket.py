"""The head's end of a control socket, with clients that misbehave."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from gpu_launcher.jobs import control_socket
from gpu_launcher.jobs.control import (
    MAX_LINE,
    Answer,
    AskStatus,
    Steering,
    WatchSweep,
    read_answer,
    write_answer,
    write_request,
)
from gpu_launcher.jobs.control_socket import MAX_CLIENTS, MAX_UNREAD, MAX_WATCHERS, ControlSocket, connect
from tests.waiting import until

ASK = write_request(AskStatus())
WATCH = write_request(WatchSweep())
WATCHES = write_answer({})


Watching = Callable[[], socket.socket]


class Head:
    """Answers requests, and remembers them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "launch-abc.sock"
        self.socket = ControlSocket(directory, self.path.name)
        self.heard: list[Steering] = []
        self.states = 0
        """How often the state was asked for."""
        self.line = b"state\n"

    def carry_out(self, request: Steering) -> Answer:
        self.heard.append(request)
        return {"number": len(self.heard)}

    def state(self) -> bytes:
        self.states += 1
        return self.line

    def connect(self) -> socket.socket:
        return connect(self.path, 10.0)

    def serve(self, turns: int = 3) -> None:
        for _ in range(turns):
            self.socket.serve(self.carry_out, self.state)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    head = Head(tmp_path)
    yield head
    head.socket.close()


def test_request_is_answered(head: Head) -> None:
    with head.connect() as client:
        client.sendall(ASK)
        head.serve()
        assert read_answer(client.recv(1000))["number"] == 1
        client.sendall(ASK + ASK)
        head.serve()
        until(lambda: len(head.heard) == 3)
        assert client.recv(1000).count(b"\n") == 2


def test_only_its_user_can_open_the_socket_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        head = Head(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(head.path.stat().st_mode) == 0o600
    head.socket.close()
    assert not head.path.exists()


def test_path_may_be_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120) / ("y" * 120)
    deep.mkdir(parents=True)
    head = Head(deep)
    head.connect().close()
    head.socket.close()


def test_request_in_pieces_is_carried_out_once_it_is_complete(head: Head) -> None:
    with head.connect() as client:
        for byte in ASK[:-1]:
            client.sendall(bytes([byte]))
            head.serve()
        assert not head.heard
        client.sendall(ASK[-1:])
        head.serve()
        assert head.heard == [AskStatus()]


def test_request_of_a_client_that_is_gone_is_carried_out(head: Head) -> None:
    with head.connect() as client:
        client.sendall(ASK)
    head.serve()
    assert head.heard == [AskStatus()]


def test_half_a_request_of_a_client_that_is_gone_is_dropped(head: Head) -> None:
    with head.connect() as client:
        client.sendall(ASK[:-1])
    head.serve()
    assert head.heard == []


def test_garbage_is_refused_and_the_next_request_answered(head: Head) -> None:
    with head.connect() as client:
        client.sendall(b"\xff\x00 GET / HTTP/1.1\n" + ASK)
        head.serve()
        refusal, answer = client.recv(10_000).splitlines()
        assert read_answer(refusal)["problem"] == "this is not a control request of gpu-launcher"
        assert read_answer(answer)["ok"] is True


def test_endless_line_is_cut_off(head: Head) -> None:
    with head.connect() as client:
        client.settimeout(0.0)
        sent = 0
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012  (until it is disconnected)
            for _ in range(10_000):
                try:
                    sent += client.send(b"x" * 10_000)
                except BlockingIOError:
                    head.serve()
    assert sent < 100 * MAX_LINE
    assert not head.heard


def test_client_that_never_reads_is_disconnected(head: Head) -> None:
    with head.connect() as client:
        client.settimeout(0.0)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012  (until it is disconnected)
            for _ in range(1_000_000):
                try:
                    client.send(ASK * 100)
                except BlockingIOError:
                    head.serve()


def test_silent_clients_give_way_to_new_ones(head: Head) -> None:
    silent = []
    for _ in range(MAX_CLIENTS + 3):
        silent.append(head.connect())
        head.serve()
    with head.connect() as client:
        client.sendall(ASK)
        head.serve()
        assert read_answer(client.recv(1000))["ok"] is True
    for one in silent:
        one.settimeout(0.0)
    closed = [one for one in silent if _is_closed(one)]
    assert closed == silent[:4]
    for one in silent:
        one.close()


def test_requests_of_more_clients_than_are_kept_are_answered(head: Head) -> None:
    clients = [head.connect() for _ in range(MAX_CLIENTS + 1)]  # the head is busy meanwhile
    for client in clients:
        client.sendall(ASK)
    head.serve()
    for client in clients:
        assert read_answer(client.recv(1000))["ok"] is True
        client.close()


def test_client_waits_for_a_place_while_the_head_is_busy(head: Head) -> None:
    waiting = []
    with contextlib.suppress(BlockingIOError):
        while True:
            waiting.append(connect(head.path, 0.0))
    with ThreadPoolExecutor() as pool:
        coming = pool.submit(head.connect)
        wait([coming], 0.2)
        until(lambda: head.serve() or coming.done())
    for one in [*waiting, coming.result()]:
        one.close()


def _is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


@pytest.fixture
def watching(head: Head) -> Iterator[Watching]:
    """Return a client that watches."""
    clients = []

    def watch() -> socket.socket:
        clients.append(head.connect())
        clients[-1].sendall(WATCH)
        head.serve()
        return clients[-1]

    yield watch
    for client in clients:
        client.close()


def test_client_that_watches_gets_the_state_and_then_each_event(head: Head, watching: Watching) -> None:
    head.socket.publish(b"earlier\n")
    assert not head.socket.is_watched
    one = watching()
    assert head.socket.is_watched
    head.socket.publish(b"first\n")
    other = watching()
    head.socket.publish(b"second\n")
    assert one.recv(1000) == WATCHES + b"state\nfirst\nsecond\n"
    assert other.recv(1000) == WATCHES + b"state\nsecond\n"
    one.close()
    head.serve()
    head.socket.publish(b"third\n")
    assert other.recv(1000) == b"third\n"
    head.socket.close()
    assert other.recv(1000) == b""


def test_client_that_watches_and_does_not_read_gets_a_new_state_later(head: Head, watching: Watching) -> None:
    client = watching()
    event = b"x" * 999 + b"\n"
    for _ in range(10_000):
        head.socket.publish(event)
    assert head.states == 1
    (watcher,) = head.socket._watchers.values()
    assert sum(map(len, watcher._lines)) <= MAX_UNREAD
    head.line = b"new\n"
    client.settimeout(0.0)
    received = b""
    while not received.endswith(b"new\n"):
        head.serve(1)
        with contextlib.suppress(BlockingIOError):
            received += client.recv(100_000)
    assert head.states == 2
    lines = received.removeprefix(WATCHES + b"state\n").removesuffix(b"new\n").splitlines(keepends=True)
    assert set(lines) == {event}
    assert len(lines) < 10_000
    head.socket.publish(b"next\n")
    assert client.recv(1000) == b"next\n"


def test_state_larger_than_the_buffer_arrives_whole(head: Head, watching: Watching) -> None:
    head.line = b"s" * 3_000_000 + b"\n"
    client = watching()
    head.socket.publish(b"event\n")
    client.settimeout(0.0)
    received = b""
    while not received.endswith(b"event\n"):
        head.serve(1)
        with contextlib.suppress(BlockingIOError):
            received += client.recv(100_000)
    assert received == WATCHES + head.line + b"event\n"


def test_head_does_not_spin_for_a_client_that_does_not_read(head: Head, watching: Watching) -> None:
    head.line = b"s" * 3_000_000 + b"\n"
    watching()
    with select.epoll() as epoll:
        epoll.register(head.socket.fileno(), select.EPOLLIN)
        assert epoll.poll(0) == []


def test_clients_that_watch_do_not_give_way_and_are_limited(head: Head, watching: Watching) -> None:
    clients = [watching() for _ in range(MAX_WATCHERS + 1)]
    *accepted, refused = [client.recv(1000).splitlines() for client in clients]
    assert all(len(lines) == 2 for lines in accepted)
    assert read_answer(refused[0])["problem"] == f"{MAX_WATCHERS} programs watch it already"
    for _ in range(MAX_CLIENTS + 3):
        with head.connect() as client:
            client.sendall(ASK)
            head.serve()
            assert read_answer(client.recv(1000))["ok"] is True
    head.socket.publish(b"event\n")
    assert [client.recv(1000) for client in clients[:-1]] == [b"event\n"] * MAX_WATCHERS


def test_oldest_client_that_asks_to_watch_as_it_gives_way_is_kept(head: Head) -> None:
    clients = [head.connect() for _ in range(MAX_CLIENTS + 1)]
    clients[0].sendall(WATCH)
    head.serve()
    assert clients[0].recv(1000) == WATCHES + b"state\n"
    for client in clients:
        client.close()


def test_killed_client_that_watches_is_forgotten(head: Head, watching: Watching) -> None:
    client = watching()
    client.close()
    head.socket.publish(b"event\n")
    head.serve()
    assert not head.socket.is_watched


def test_process_of_another_user_is_disconnected(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket.os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(control_socket, "ROOT", os.getuid() + 2)
    with head.connect() as client:
        client.sendall(ASK)
        head.serve()
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    assert not head.heard


def test_socket_of_a_head_that_has_ended_is_refused(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        Head(tmp_path)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / "launch-abc.sock").exists()
    with pytest.raises(ConnectionRefusedError):
        connect(tmp_path / "launch-abc.sock", 10.0)


def test_fork_of_a_head_does_not_keep_its_socket_alive(head: Head) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    os.link(head.path, head.path.with_suffix(".kept"))
    head.socket.close()
    with pytest.raises(ConnectionRefusedError):
        connect(head.path.with_suffix(".kept"), 10.0)
    os.close(write)
    os.waitpid(pid, 0)


def test_closing_it_in_a_fork_leaves_the_heads_socket(head: Head) -> None:
    pid = os.fork()
    if not pid:
        head.socket.close()
        os._exit(0)
    os.waitpid(pid, 0)
    with head.connect() as client:
        client.sendall(ASK)
        head.serve()
        assert read_answer(client.recv(1000))["ok"] is True


def test_links_and_files_are_not_connected_to(head: Head, tmp_path: Path) -> None:
    (tmp_path / "link.sock").symlink_to(head.path)
    (tmp_path / "file.sock").touch()
    for name in ("link.sock", "file.sock", "missing.sock"):
        with pytest.raises(FileNotFoundError):
            connect(tmp_path / name, 10.0)
