"""Attacks on the pages: each is refused and logged, and changes nothing."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpu_launcher.web.actions import ACTIONS
from gpu_launcher.web.listener import CONNECTIONS
from tests.waiting import until
from tests.web.serving import SCRIPT, WebServer, WrittenSweep, ask_on_socket, write_sweep

WRONG = "x" * 43
MANY_DIGITS = "9" * 5000
"""More than int() reads."""
STUDIES = ("/dashboard/studies", "/api/studies", "/csv")


def test_without_the_token_nothing_is_shown(server: WebServer) -> None:
    many = "/?" + "a=b&" * 1000
    for path in ("/", "/pool", "/sweeps", "/static/page.js", "/nowhere", f"/?token={WRONG}", "/pool?token=", many):
        reply = server(path, cookie="a=b")
        assert (reply.status, "gpu-launcher web" in reply.text or "token is wrong" in reply.text) == (403, True), path
        assert "set-cookie" not in reply.headers


def test_the_token_counts_only_in_the_link(server: WebServer) -> None:
    assert server(f"/pool?token={server.token}", cookie="a=b").status == 403
    assert server(f"/?token={server.token}", "POST", "", cookie="a=b").status == 403


@pytest.mark.parametrize("value", [WRONG, "", "ä", '"', "a=b; c", "\xff"])
def test_a_wrong_cookie_is_refused(server: WebServer, value: str) -> None:
    name = server.signed_in.partition("=")[0]
    assert server("/pool", cookie=f"{name}={value}".encode("latin-1").decode("latin-1")).status == 403


def test_scripts_and_other_sites_do_not_get_the_cookie(server: WebServer) -> None:
    reply = server(f"/?token={server.token}", cookie="a=b")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(reply.headers["set-cookie"].split("; "))
    assert server.token not in reply.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8420", "127.0.0.1.evil.example", "", "[::1", "localhost@evil"]
)
def test_another_host_is_refused(server: WebServer, host: str) -> None:
    with _raw(server) as client:
        client.sendall(
            f"GET /pool HTTP/1.1\r\nHost: {host}\r\nCookie: {server.signed_in}\r\nConnection: close\r\n\r\n".encode()
        )
        assert _read(client).split()[1] in (b"421", b"400", b"403")


def test_two_hosts_are_refused(server: WebServer) -> None:
    with _raw(server) as client:
        hosts = f"Host: {server.host}\r\nHost: evil.example\r\n"
        client.sendall(f"GET /pool HTTP/1.1\r\n{hosts}Cookie: {server.signed_in}\r\n\r\n".encode())
        assert _read(client).split()[1] in (b"421", b"400")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1", "file://"]
)
def test_requests_of_other_sites_are_refused(server: WebServer, sweep: WrittenSweep, origin: str) -> None:
    assert server(f"{sweep.url}/stop", "POST", "", origin=origin).status == 403
    assert server("/pool", origin=origin).status == 403


def test_a_post_without_an_origin_is_refused(server: WebServer, sweep: WrittenSweep) -> None:
    assert server(f"{sweep.url}/stop", "POST", "", Origin="").status == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_a_post_acts(server: WebServer, sweep: WrittenSweep, method: str) -> None:
    assert server(f"{sweep.url}/stop", method).status in (404, 405)


def test_a_large_body_is_refused_unread(server: WebServer, sweep: WrittenSweep) -> None:
    head = f"POST {sweep.url}/limit HTTP/1.1\r\nHost: {server.host}\r\nOrigin: http://{server.host}\r\n"
    head += f"Cookie: {server.signed_in}\r\nContent-Length: {2**30}\r\n\r\n"
    with _raw(server) as client:
        client.sendall(head.encode())
        assert _read(client).split()[1] == b"413"  # and the connection is closed


def test_a_body_of_unknown_size_is_refused_unread(server: WebServer, sweep: WrittenSweep) -> None:
    head = f"POST {sweep.url}/limit HTTP/1.1\r\nHost: {server.host}\r\nOrigin: http://{server.host}\r\n"
    head += f"Cookie: {server.signed_in}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with _raw(server) as client:
        client.sendall(head.encode())
        assert _read(client).split()[1] == b"411"  # and the connection is closed


def test_connections_that_say_nothing_keep_nobody_out(server: WebServer) -> None:
    with ExitStack() as stack:
        for number in range(CONNECTIONS + 50):
            client = stack.enter_context(_raw(server))
            client.sendall(b"GET / HT"[: number % 2 * 8])
        assert [server("/pool").status for _ in range(3)] == [200] * 3


def test_refusals_are_logged_without_what_is_secret(serving: Callable[..., WebServer]) -> None:
    server = serving()
    server("/pool\x1b[31m".replace("\x1b", "%1b"), cookie="a=b")
    server(f"/?token={WRONG}", cookie="a=b")
    server("/pool", Host="evil.example")
    server.end()
    log = server.log.read_text()
    assert log.count("refused GET") == 3
    assert "evil.example" in log
    assert WRONG not in log
    assert server.token not in log
    assert "\x1b" not in log


@pytest.mark.parametrize("path", ["/pool", "/nowhere", "/static/page.js", "/sweeps/x/results.csv"])
def test_every_answer_has_the_strict_headers(server: WebServer, path: str) -> None:
    for reply in (server(path), server(path, cookie="a=b")):
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert "server" not in reply.headers


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/passwd",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/secret",
        "%2fetc%2fpasswd",
        "..%5c..%5csecret",
        "train.log%00.txt",
        "link",
        "linked/secret",
        "fifo",
        "../.gpu_launcher/manifest.jsonl",
        "%2e%2e/.gpu_launcher/manifest.jsonl",
        ".gpu_launcher/manifest.jsonl",
        "../1/train.log",
    ],
)
def test_only_files_of_the_job_are_served(server: WebServer, sweep: WrittenSweep, path: str) -> None:
    job = sweep.directory / "0"
    (sweep.directory / "secret").write_text("secret")
    if not (job / "link").is_symlink():
        (job / "link").symlink_to("/etc/passwd")
        (job / "linked").symlink_to(sweep.directory)
        os.mkfifo(job / "fifo")
    reply = server(f"{sweep.url}/jobs/0/files/{path}")
    assert reply.status == 404
    assert b"secret" not in reply.body
    assert b"root:" not in reply.body


def test_a_log_outside_the_sweep_is_not_shown(server: WebServer, sweeps: Path) -> None:
    (sweeps.parent / "outside").mkdir(exist_ok=True)
    (sweeps.parent / "outside" / "x.log").write_text("private words")
    other = write_sweep(sweeps / "outside")
    manifest = other.directory / ".gpu_launcher" / "manifest.jsonl"
    manifest.write_text(
        manifest.read_text().replace(str(other.directory / "0" / "train.log"), str(sweeps.parent / "outside" / "x.log"))
    )
    (other.directory / "1" / "train.log").unlink()
    (other.directory / "1" / "train.log").symlink_to(sweeps.parent / "outside" / "x.log")
    (other.directory / "2" / "train.log").unlink()
    (other.directory / "2").joinpath(".hydra", "overrides.yaml").unlink()
    (other.directory / "2").joinpath(".hydra").rmdir()
    (other.directory / "2").rmdir()
    (other.directory / "2").symlink_to(sweeps.parent / "outside")
    until(lambda: server(other.url).status == 200, "the sweep was not found")
    for number in range(3):
        page = server(f"{other.url}/jobs/{number}")
        assert page.status == 200
        assert "private words" not in page.text
        assert server(f"{other.url}/jobs/{number}/log?log=train.log").status == 404
        assert server(f"{other.url}/jobs/{number}/log?log=x.log").status == 404
        assert server(f"{other.url}/jobs/{number}/files/x.log").status == 404


def test_what_others_wrote_is_never_markup(server: WebServer, sweep: WrittenSweep) -> None:
    for path in (
        "/sweeps",
        sweep.url,
        f"{sweep.url}/jobs/2",
        f"{sweep.url}/jobs/0/log/search?log=train.log&text=epoch",
    ):
        page = server(path)
        assert page.status == 200
        assert "alert(1)" in page.text
        assert SCRIPT not in page.text
        assert "<script>" not in page.text
        assert "\x1b" not in page.text


def test_texts_that_cannot_be_encoded_are_escaped(server: WebServer, sweeps: Path) -> None:
    other = write_sweep(sweeps / "surrogates")
    manifest = other.directory / ".gpu_launcher" / "manifest.jsonl"
    text = manifest.read_text().replace('"loss"', r'"lo\ud800ss"').replace('"seed=1"', r'"se\ud800ed=\ud800"')
    manifest.write_text(text.replace("raised ValueError", r"raised \ud800").replace("3/train.log", r"3/\ud800.log"))
    until(lambda: server(other.url).status == 200, "the sweep was not found")
    assert r"lo\ud800ss" in server(other.url).text
    assert r"lo\ud800ss" in server(f"{other.url}/results.csv").text
    assert r"raised \ud800" in server(f"{other.url}/jobs/2").text
    assert "There is no log" in server(f"{other.url}/jobs/3").text


def test_files_are_downloads_that_do_nothing(server: WebServer, sweep: WrittenSweep) -> None:
    (sweep.directory / "1" / "a page;'.html").write_text(SCRIPT)
    reply = server(f"{sweep.url}/jobs/1/files/a%20page%3B%27.html")
    assert (reply.status, reply.text) == (200, SCRIPT)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-disposition"] == "attachment; filename*=utf-8''a%20page%3B%27.html"
    assert reply.headers["content-security-policy"] == "sandbox"


def test_the_config_has_no_secrets(server: WebServer, sweep: WrittenSweep) -> None:
    assert "hunter2" not in server(f"{sweep.url}/jobs/1").text


@pytest.mark.parametrize(
    "path",
    [
        "/sweeps/0123456789abcdef",
        "/sweeps/..",
        "/sweeps/%2e%2e%2fetc",
        "{sweep}/jobs/77",
        "{sweep}/jobs/-1",
        "{sweep}/jobs/x",
        *("{sweep}/jobs/" + MANY_DIGITS, "/sweeps/" + MANY_DIGITS, "/new/programs/" + MANY_DIGITS),
        *(f"{path}/{MANY_DIGITS}{rest}" for path in STUDIES for rest in ("", "/param_importances")),
    ],
)
def test_what_does_not_exist_is_a_page(server: WebServer, sweep: WrittenSweep, path: str) -> None:
    assert server(path.format(sweep=sweep.url)).status in (404, 405)


def test_numbers_without_end_in_a_query_or_a_form_are_no_fault(server: WebServer, sweep: WrittenSweep) -> None:
    for path in ("", "/charts", "/jobs/0", "/jobs/0/log"):
        for name in ("page", "before", "at", "after", "seen", "value"):
            reply = server(f"{sweep.url}{path}?log=train.log&{name}={MANY_DIGITS}")
            assert reply.status in (200, 404), (path, name)
    for name in ("root", "devices", "gpus", "max_parallel", "timeout", "retries", "priority"):
        reply = server("/new/start", "POST", f"kind=map&root=0&command=true&parameters=x=1&{name}={MANY_DIGITS}")
        assert reply.status == 200, name


def test_a_reader_cannot_act(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    written = write_sweep(tmp_path / "runs")
    server = serving("--read-only")
    assert "Pause" not in server(written.url).text
    for action in ACTIONS:
        assert server(f"{written.url}/{action}", "POST", "jobs=1").status == 403


def test_the_socket_is_this_users_alone(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    server = serving("--socket", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    link = f"/?token={server.token}".encode()
    answer = ask_on_socket(path, b"GET " + link + b" HTTP/1.1\r\nHost: localhost:9000\r\nConnection: close\r\n\r\n")
    assert answer.split()[1] == b"200"
    answer = ask_on_socket(path, b"GET " + link + b" HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert answer.split()[1] == b"421"
    server.end()
    assert not path.exists()


def test_another_address_is_explained(serving: Callable[..., WebServer]) -> None:
    server = serving("--host", "0.0.0.0", "--port", str(_free_port()))
    assert "not encrypted" in " ".join(server.said)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _raw(server: WebServer) -> socket.socket:
    server.signed_in  # noqa: B018
    return socket.create_connection(server.address, timeout=200)


def _read(client: socket.socket) -> bytes:
    """All that the server says until it closes the connection."""
    parts = []
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)
