"""Tests of connections to the pages' server, and of what threads share."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from gpu_launcher.errors import WebError
from gpu_launcher.web import listener
from gpu_launcher.web.gate import Receive, Scope, Send
from gpu_launcher.web.listener import WebConnection, WebOptions, serve
from gpu_launcher.web.pool_watch import History, PoolWatch


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def conversation(sent: bytes) -> bytes:
    """Send something to the server, and return all that it says until it closes the connection."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(sent)
        ours.setblocking(False)
        config = uvicorn.Config(answer, http=WebConnection, log_config=None, timeout_keep_alive=0)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: WebConnection(config, ServerState(), {}), theirs)
        said = b""
        with suppress(ConnectionResetError):  # it closed the connection before it had read all
            while part := await loop.sock_recv(ours, 65536):
                said += part
        return said


@pytest.mark.parametrize("sent", [b"", b"GET / HT"])
def test_a_connection_without_a_request_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "REQUEST_SECONDS", 0.0)
    assert asyncio.run(asyncio.wait_for(conversation(sent), 100)) == b""


def test_a_connection_with_a_request_is_answered() -> None:
    said = asyncio.run(asyncio.wait_for(conversation(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"), 100))
    assert said.endswith(b"ok")


def test_the_oldest_connection_without_a_request_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS", 4)

    async def converse() -> tuple[list[bytes], bytes]:
        config = uvicorn.Config(answer, http=WebConnection, log_config=None, limit_concurrency=4)
        loop, state, ours = asyncio.get_running_loop(), ServerState(), []

        async def connect(sent: bytes) -> None:
            mine, theirs = socket.socketpair()
            mine.sendall(sent)
            mine.setblocking(False)
            ours.append(mine)
            await loop.connect_accepted_socket(lambda: WebConnection(config, state, {}), theirs)

        for sent in (b"", b"GET / HT", b"", b""):
            await connect(sent)
        await connect(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        closed = [await loop.sock_recv(silent, 65536) for silent in ours[:2]]
        said = b""
        while not said.endswith(b"ok"):
            said += await loop.sock_recv(ours[-1], 65536)
        assert len(state.connections) == 3
        for mine in ours:
            mine.close()
        return closed, said

    closed, said = asyncio.run(asyncio.wait_for(converse(), 100))
    assert closed == [b"", b""]
    assert said.startswith(b"HTTP/1.1 200")


def options_of(socket: Path) -> WebOptions:
    return WebOptions([socket.parent], socket=socket)


def test_ctrl_c_before_the_server_runs_leaves_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"

    def interrupt(line: str) -> None:
        assert path.is_socket()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(options_of(path), cast("PoolWatch", None), interrupt, interrupt)
    assert not path.exists()


def test_the_socket_of_a_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with listener._on_socket(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("kind", ["server", "suspended", "file"])
def test_a_path_in_use_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "web.sock"
    with ExitStack() as stack:
        if kind == "file":
            path.touch()
        else:
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.bind(str(path))
            other.listen(0)
        if kind == "suspended":  # another connection would wait until it is accepted
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        with pytest.raises(WebError, match=r"web.sock \(Address already in use\): name another with --socket$"):
            serve(options_of(path), cast("PoolWatch", None), pytest.fail, pytest.fail)
    assert path.exists()


def test_a_history_may_grow_while_it_is_drawn() -> None:
    history = History()

    class Growing(float):
        def __lt__(self, other: float) -> bool:
            history.points.append((20.0, 0.5))
            return float.__lt__(self, other)

    history.points.append((10.0, Growing(0.5)))
    assert history.line(30.0, 240, 32).count(",") == 1
