"""Tests of which requests to the pages are admitted."""

from __future__ import annotations

import pytest

from gpu_launcher.web.gate import MAX_BODY_BYTES, Credentials, rejection, token_in_cookies

OURS = Credentials("secret", "gpu_launcher_1", frozenset(("localhost", "127.0.0.1", "::1", "proxy.example")))


def status(method: str, **headers: str) -> int:
    """The status with which a request is rejected, or 200."""
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    found = rejection(OURS, method, pairs)
    return 200 if found is None else found.status


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:8420", 200),
        ("LOCALHOST", 200),
        ("[::1]:1", 200),
        ("proxy.example", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example#localhost", 421),
        ("localhost@evil.example", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_the_host_is_one_of_this_servers_names(host: str, expected: int) -> None:
    assert status("GET", host=host) == expected


def test_a_host_is_needed() -> None:
    assert status("GET") == 421


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8420", 200),
        ("https://localhost:8420", 200),
        ("http://localhost", 403),
        ("http://127.0.0.1:8420", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[::1", 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_origin_is_this_server(method: str, origin: str, expected: int) -> None:
    assert status(method, host="localhost:8420", origin=origin) == expected


@pytest.mark.parametrize(
    ("length", "expected"),
    [("0", 200), (str(MAX_BODY_BYTES), 200), (str(MAX_BODY_BYTES + 1), 413), ("-1", 413), ("9" * 5000, 413)],
)
def test_a_body_is_small(length: str, expected: int) -> None:
    assert status("POST", host="localhost", origin="http://localhost", content_length=length) == expected


def test_a_body_says_its_length() -> None:
    assert status("POST", host="localhost", origin="http://localhost", transfer_encoding="chunked") == 411


@pytest.mark.parametrize(("method", "expected"), [("GET", 200), ("HEAD", 200), ("POST", 403), ("PUT", 405)])
def test_methods(method: str, expected: int) -> None:
    assert status(method, host="localhost") == expected


@pytest.mark.parametrize(
    ("cookie", "admitted"),
    [
        ("gpu_launcher_1=secret", True),
        ("other=1; gpu_launcher_1=secret; more=2", True),
        ('other={"a": 1}; gpu_launcher_1=secret', True),
        ("b@d=1; x=\xe9; no value; gpu_launcher_1=secret", True),
        ("gpu_launcher_1=old; gpu_launcher_1=secret", True),
        ("gpu_launcher_1=", False),
        ("gpu_launcher_1=Secret", False),
        ("gpu_launcher_2=secret", False),
        ("secret", False),
        ("gpu_launcher_1=s\xe9", False),
        ("", False),
    ],
)
def test_the_token_is_in_the_cookie(cookie: str, admitted: bool) -> None:
    assert token_in_cookies(OURS, [(b"cookie", cookie.encode("latin-1"))]) is admitted
