"""Decides which requests are admitted, and tells browsers what a page may do.

Anyone who knows the token may look and act as this server's user. The token is in the link that is printed. The first
visit makes it a cookie, which scripts cannot read and which requests of other sites do not have. The rest does not
depend on it:

- The Host must be a name that was meant, so a name that an attacker lets resolve to this machine is refused.
- An Origin, which browsers send with each request that may change something, must be this server.
- A request that may change something is a POST, and its body is small.
- Pages load nothing from elsewhere and run no script that they contain: see POLICY.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gpu_launcher.text import one_line, read_digits

MAX_BODY_BYTES = 256 * 2**10
"""Maximum number of bytes of a request's body. The largest form, that of a new sweep, has each parameter twice."""
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
READING = ("GET", "HEAD")

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
"""What pages may do: nothing but load this server's own scripts, styles and data."""
HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)
"""Headers of all answers that do not have their own."""

WELCOME = """<!doctype html>
<title>gpu-launcher</title>
<link rel="icon" href="/static/icon.svg">
<meta http-equiv="refresh" content="0;url=/pool">
<p><a href="/pool">gpu-launcher</a></p>
"""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a request is not admitted."""

    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a request must have."""

    token: str
    cookie: str
    """Name of the cookie that has the token. Cookies do not keep to a port, so each server has a name of its own."""
    hosts: frozenset[str]
    """Names that may stand for this server, without a port: the user may forward any."""

    def knows(self, value: str) -> bool:
        """Whether a value is the token. Takes as long for each wrong one."""
        return secrets.compare_digest(value.encode("utf-8", "surrogatepass"), self.token.encode())


def rejection(credentials: Credentials, method: str, headers: list[tuple[bytes, bytes]]) -> Rejection | None:
    """Return why a request is refused before its token is looked at. None if it is not."""
    hosts = _values(headers, b"host")
    if len(hosts) != 1 or _host_name(hosts[0]) not in credentials.hosts:
        return Rejection(421, f"Host {', '.join(hosts)!r} is not this server: --allow-host admits it")
    origins = _values(headers, b"origin")
    if any(_netloc(origin) != hosts[0] for origin in origins):
        return Rejection(403, f"Origin {', '.join(origins)!r} is another site")
    if method not in (*READING, "POST"):
        return Rejection(405, "method not allowed")
    if method == "POST" and not origins:
        return Rejection(403, "there is no Origin")
    if _values(headers, b"transfer-encoding"):  # no browser sends one, and it does not say how large the body is
        return Rejection(411, "the length of the body is not known")
    if not all(map(_is_small, _values(headers, b"content-length"))):
        return Rejection(413, f"the body has more than {MAX_BODY_BYTES} bytes")
    return None


def token_in_cookies(credentials: Credentials, headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the request has the cookie with the token.

    The other cookies are those of all servers of the host, on any port. Because of some of them, such as `x={"a": 1}`,
    `http.cookies` would ignore ours.
    """
    pairs = (pair.strip().partition("=") for value in _values(headers, b"cookie") for pair in value.split(";"))
    return any(name == credentials.cookie and credentials.knows(value) for name, _, value in pairs)


class Gate:
    """An ASGI application that passes on what is admitted."""

    def __init__(self, app: Asgi, credentials: Credentials, log: Callable[[str], None]) -> None:
        """`log` gets a line for each request that is refused."""
        self._app = app
        self._credentials = credentials
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        method, path, headers = scope["method"], scope["path"], scope["headers"]
        send = _with_headers(send)
        if (refused := rejection(self._credentials, method, headers)) is not None:
            await self._refuse(scope, send, refused)
        elif token_in_cookies(self._credentials, headers):
            await self._app(scope, receive, send)
        elif method in READING and path == "/" and (given := _token_in(scope["query_string"])) is not None:
            if self._credentials.knows(given):
                await self._welcome(send)
            else:
                await self._refuse(
                    scope, send, Rejection(403, "the token is wrong: open the link of the running server")
                )
        else:
            await self._refuse(scope, send, Rejection(403, "open the link that `gpu-launcher web` printed"))

    async def _welcome(self, send: Send) -> None:
        """Set the cookie, and continue at a URL without the token.

        By the page itself: after a redirect from another site's link, a browser would not send the cookie.
        """
        cookie = f"{self._credentials.cookie}={self._credentials.token}; Path=/; HttpOnly; SameSite=Strict"
        await _answer(send, 200, WELCOME, "text/html", [(b"set-cookie", cookie.encode())])

    async def _refuse(self, scope: Scope, send: Send, refused: Rejection) -> None:
        who = (scope.get("client") or ("the socket",))[0]
        self._log(one_line(f"refused {scope['method']} {scope['path']} from {who}: {refused.reason}", 300))
        # The body is not read, so the connection cannot be used again.
        await _answer(send, refused.status, f"{refused.reason}\n", "text/plain", [(b"connection", b"close")])


async def _answer(send: Send, status: int, text: str, kind: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = text.encode("utf-8", "backslashreplace")
    about = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*about, *headers]})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    """Send with HEADERS where the answer does not have them."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            missing = [(name.lower().encode(), value.encode()) for name, value in HEADERS]
            message["headers"] = [*message["headers"], *(pair for pair in missing if pair[0] not in present)]
        await send(message)

    return sending


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1") for found, value in headers if found == name]


def _is_small(length: str) -> bool:
    return read_digits(length, MAX_BODY_BYTES) is not None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _token_in(query: bytes) -> str | None:
    try:
        return next(iter(parse_qs(query.decode("latin-1"), max_num_fields=8).get("token", ())), None)
    except ValueError:
        return None
