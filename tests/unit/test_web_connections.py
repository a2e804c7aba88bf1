"""Tests of connections to the pages' server, and of what threads share."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import pytest
import uvicorn
from uvicorn.server import ServerState

from gpu_launcher.web import listener
from gpu_launcher.web.gate import Receive, Scope, Send
from gpu_launcher.web.listener import WebConnection
from gpu_launcher.web.pool_watch import History


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


def test_a_history_may_grow_while_it_is_drawn() -> None:
    history = History()

    class Growing(float):
        def __lt__(self, other: float) -> bool:
            history.points.append((20.0, 0.5))
            return float.__lt__(self, other)

    history.points.append((10.0, Growing(0.5)))
    assert history.line(30.0, 240, 32).count(",") == 1
