"""Listens on an address or a Unix socket, and serves until the server is told to end."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import secrets
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpu_launcher.errors import WebError
from gpu_launcher.web.app import create_app
from gpu_launcher.web.catalogue import Catalogue
from gpu_launcher.web.gate import LOOPBACK, Credentials
from gpu_launcher.web.pool_watch import PoolWatch
from gpu_launcher.web.programs import Programs
from gpu_launcher.web.views import NewSweeps

PORT = 8420
"""The port that is taken if it is free and the user does not name one."""
CONNECTIONS = 200
"""Maximum number of connections and requests at a time. More are refused."""
BACKLOG = 128
"""Maximum number of connections that wait to be accepted. All of them may be accepted before the first is closed."""
REQUEST_SECONDS = 30.0
"""Seconds for which a new connection may have no request."""
ENDING_SECONDS = 2


@dataclass(frozen=True, slots=True)
class WebOptions:
    """How the pages are served."""

    roots: Sequence[Path]
    """Directories below which sweeps are shown."""
    host: str = "127.0.0.1"
    port: int | None = None
    socket: Path | None = None
    """A Unix socket, instead of host and port."""
    allowed_hosts: Sequence[str] = ()
    """More names under which browsers reach the server, such as a proxy's."""
    read_only: bool = False
    launcher: str = "gpu-launcher"
    """The program that starts sweeps."""
    devices: str = ""
    """Devices for new sweeps, if they are not those that a sweep uses by default."""
    pool_dir: Path | None = None
    """The pool of new sweeps, if it is not the default one."""


def serve(options: WebOptions, pool: PoolWatch, tell: Callable[[str], None], log: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `tell` gets the link, and `log` refusals and problems. Raises WebError."""
    with ExitStack() as at_end:  # the server closes it, too, while it still catches signals
        if options.socket is not None:
            listening = at_end.enter_context(_on_socket(options.socket))
            at_end.callback(options.socket.unlink, missing_ok=True)
        else:
            listening = at_end.enter_context(_on_port(options.host, options.port))
        credentials = _credentials(options, listening)
        for line in _about(options, listening, credentials):
            tell(line)

        new = None
        if not options.read_only:
            new = NewSweeps(options.launcher, Programs(), options.devices, options.pool_dir)
            at_end.callback(new.programs.close)
        app = create_app(pool, Catalogue(options.roots), credentials, new=new, log=log, at_end=at_end.close)
        _log_problems(log)
        config = uvicorn.Config(
            app,
            http=WebConnection,  # h11 closes it if the request's body was not read; another parser would read that
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            backlog=BACKLOG,
            timeout_graceful_shutdown=ENDING_SECONDS,
        )
        PageServer(config).run(sockets=[listening])


class PageServer(uvicorn.Server):
    """A server that ends in order, also if the user presses Ctrl-C again because that takes a second or two."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle_exit)
        try:
            yield
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):  # nothing is left to do: another one ends the program
                signal.signal(signum, signal.SIG_DFL)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True


class WebConnection(H11Protocol):
    """A connection that is closed if its first request does not arrive: all users of the machine may open CONNECTIONS.

    If all are open, the oldest one without a request is closed at once. Later requests arrive only from those who know
    the token: others are refused, which closes the connection.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.began = self.loop.time()
        self.loop.call_later(REQUEST_SECONDS, self._close_without_request)
        if len(self.connections) >= CONNECTIONS:
            others = [other for other in self.connections if isinstance(other, WebConnection) and other is not self]
            silent = [other for other in others if other.scope is None and not other.transport.is_closing()]
            if silent:
                min(silent, key=lambda other: other.began).transport.close()

    def _close_without_request(self) -> None:
        if self.scope is None:
            self.transport.close()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return False


def _credentials(options: WebOptions, listening: socket.socket) -> Credentials:
    name = listening.getsockname()
    port = name if isinstance(name, str) else name[1]
    server = hashlib.sha256(f"{os.uname().nodename} {os.getuid()} {port}".encode()).hexdigest()[:8]
    hosts = {*LOOPBACK, options.host, *options.allowed_hosts}
    if not is_loopback(options.host) and options.socket is None:
        hosts |= {os.uname().nodename, socket.getfqdn()}
    return Credentials(secrets.token_urlsafe(32), f"gpu_launcher_{server}", frozenset(host.lower() for host in hosts))


def _about(options: WebOptions, listening: socket.socket, credentials: Credentials) -> list[str]:
    """What the user is told: the link, and what else must be known."""
    query = f"/?token={credentials.token}"
    if options.socket is not None:
        return [
            f"listening on {options.socket}, which only this user may open. The link, with the proxy's host name:",
            f"http://localhost{query}",
        ]
    host, port = listening.getsockname()[:2]
    lines = []
    if not is_loopback(options.host):
        what = "look at its sweeps" if options.read_only else "run programs"
        lines.append(
            f"listening on {options.host}: the connection is not encrypted, and who reads the link on the network can "
            f"{what} as this user. An SSH tunnel is safer: ssh -L {port}:127.0.0.1:{port} {os.uname().nodename}"
        )
        host = os.uname().nodename if host in ("0.0.0.0", "::") else host
    return [*lines, f"http://{f'[{host}]' if ':' in host else host}:{port}{query}"]


def _on_port(host: str, port: int | None) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise WebError(f"cannot listen on {host}: {error.strerror}") from None
    for candidate in (PORT, 0) if port is None else (port,):
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address[0], candidate, *address[2:]))
            listening.listen(BACKLOG)
            return listening
        except OSError as error:
            listening.close()
            if port is None and candidate and error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            another = ": name another with --port" if error.errno == errno.EADDRINUSE else ""
            raise WebError(f"cannot listen on port {candidate} of {host} ({error.strerror}){another}") from None
    raise AssertionError("the last port ends the loop")


def _on_socket(path: Path) -> socket.socket:
    """Listen on a socket that only this user may open. The socket of a server that has ended is replaced."""
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        with suppress(OSError):
            if stat.S_ISSOCK(path.lstat().st_mode) and _is_dead(path):
                path.unlink()
        listening.bind(os.fspath(path))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        another = ": name another with --socket" if error.errno == errno.EADDRINUSE else ""
        raise WebError(f"cannot listen on {path} ({error.strerror or error}){another}") from None
    finally:
        os.umask(before)
    return listening


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)  # otherwise it would wait for a server that is suspended
        try:
            client.connect(os.fspath(path))
        except ConnectionRefusedError:
            return True
    return False


class _Lines(logging.Handler):
    """Passes on what the server logs."""

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log(self.format(record))


def _log_problems(log: Callable[[str], None]) -> None:
    logger = logging.getLogger("uvicorn")
    logger.handlers, logger.propagate = [_Lines(log)], False
