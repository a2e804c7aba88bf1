"""optuna-dashboard for the study of a search, which another user may have written: it shows, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.errors import UnsupportedVersionError
from gpu_launcher.studies.report_curves import STUDY_FILE
from gpu_launcher.web import dashboard
from gpu_launcher.web.catalogue import SweepReader, id_of
from gpu_launcher.web.dashboard import MAX_PROCESSES, StudyLink, study_link, study_number
from tests.waiting import until
from tests.web.serving import SCRIPT, WebServer, WrittenSweep, ask_on_socket, title_of, write_sweep
from tests.web.studies import close, found_sweep, write_study

IS_INSTALLED = find_spec("optuna_dashboard") is not None
needs_dashboard = pytest.mark.skipif(
    not IS_INSTALLED, reason="optuna-dashboard is not installed: pip install optuna-dashboard"
)


@pytest.fixture(scope="module")
def search(server: WebServer, sweeps: Path) -> WrittenSweep:
    """A search with a study of two trials that nothing writes to."""
    found = found_sweep(server, sweeps / "search")
    close(write_study(found.directory, [{0: 1.5}, {}], told=1))
    return found


def page_of(search: WrittenSweep) -> str:
    return f"/dashboard/studies/{study_number(id_of(search.directory))}"


def api_of(search: WrittenSweep) -> str:
    return f"/api/studies/{study_number(id_of(search.directory))}"


def state_of(directory: Path) -> dict[str, tuple[object, ...]]:
    """The files beside the study, with what would change if they were written."""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    return {
        file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns, file.stat().st_ino)
        for file in files
    }


def processes_of(server: WebServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


@pytest.mark.smoke  # `make test` runs without optuna-dashboard, other targets with it
@pytest.mark.skipif(IS_INSTALLED, reason="optuna-dashboard is installed")
def test_without_optuna_dashboard_the_page_says_what_to_install(server: WebServer, search: WrittenSweep) -> None:
    assert "pip install &#39;gpu-launcher[dashboard]&#39;" in server(search.url).text
    reply = server(api_of(search))
    assert (reply.status, "pip install" in json.loads(reply.text)["reason"]) == (503, True)
    assert server(page_of(search)).status == 503


def test_an_unsupported_version_is_a_problem_of_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(distribution: str) -> None:
        raise UnsupportedVersionError(distribution, "0.1", ">=0.21")

    search = write_sweep(tmp_path / "search")
    reading = SweepReader(search.directory).read()
    assert study_link(reading) is None
    close(write_study(search.directory, [{}]))
    monkeypatch.setattr(dashboard, "check_version", lambda distribution: None)
    assert study_link(reading) == StudyLink(page_of(search), None)
    monkeypatch.setattr(dashboard, "check_version", refuse)
    link = study_link(reading)
    assert link is not None
    assert "optuna-dashboard 0.1 is not supported" in str(link.problem)


def test_a_sweep_without_a_study_has_no_dashboard(server: WebServer, sweep: WrittenSweep) -> None:
    assert "optuna-dashboard" not in server(sweep.url).text


@needs_dashboard
def test_the_study_is_shown(server: WebServer, search: WrittenSweep) -> None:
    assert f'href="{page_of(search)}"' in server(search.url).text
    page = server(page_of(search))
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=UTF-8")
    assert server("/static/bundle.js").headers["content-type"].startswith(("text/javascript", "application/javascript"))
    study = json.loads(server(api_of(search)).text)
    assert [trial["state"] for trial in study["trials"]] == ["Complete", "Running"]
    assert {trial["study_id"] for trial in study["trials"]} == {study_number(id_of(search.directory))}
    listed = json.loads(server("/api/studies").text)["study_summaries"]
    assert (study_number(id_of(search.directory)), "train") in [(one["study_id"], one["study_name"]) for one in listed]
    assert server(f"/csv/{study_number(id_of(search.directory))}").text.startswith("Number,State,Value")
    assert server("/dashboard").headers["location"] == "/sweeps"


@needs_dashboard
def test_what_is_added_to_the_study_is_shown(server: WebServer, sweeps: Path) -> None:
    search = found_sweep(server, sweeps / "running")
    study = write_study(search.directory, [{0: 1.0}])
    assert len(json.loads(server(api_of(search)).text)["trials"]) == 1
    study.tell(0, 0.5)
    study.ask()
    # optuna-dashboard reads a small study again after two seconds
    until(lambda: len(json.loads(server(api_of(search)).text)["trials"]) == 2, "the new trial is not shown")
    close(study)
    assert json.loads(server(api_of(search)).text)["best_trials"][0]["values"] == [0.5]


@needs_dashboard
def test_another_study_in_the_same_place_is_read_anew(server: WebServer, sweeps: Path) -> None:
    search = found_sweep(server, sweeps / "replaced")
    close(write_study(search.directory, [{}, {}]))
    assert len(json.loads(server(api_of(search)).text)["trials"]) == 2
    (search.directory / STUDY_FILE).rename(search.directory / "old.db")
    close(write_study(search.directory, [{}, {}, {}]))
    found = json.loads(server(api_of(search)).text)["trials"]
    assert [trial["state"] for trial in found] == ["Running"] * 3


@needs_dashboard
@pytest.mark.parametrize("is_open", [True, False])
def test_looking_changes_no_file(server: WebServer, sweeps: Path, is_open: bool) -> None:
    search = found_sweep(server, sweeps / f"unchanged {is_open}")
    study = write_study(search.directory, [{0: 1.0}], told=1)
    if not is_open:
        close(study)
    before = state_of(search.directory)
    assert (STUDY_FILE + "-wal" in before) == is_open
    for path in (page_of(search), api_of(search), f"{api_of(search)}/param_importances", "/api/studies"):
        assert server(path).status in (200, 400)  # of one trial, there are no importances
    assert state_of(search.directory) == before
    if is_open:
        close(study)


@needs_dashboard
def test_nothing_is_written_into_a_file_that_is_linked_beside_the_study(server: WebServer, sweeps: Path) -> None:
    source = sweeps / "source"
    study = write_study(source, [{0: 1.0}])
    search = found_sweep(server, sweeps / "linked")
    for name in (STUDY_FILE, f"{STUDY_FILE}-wal"):
        (search.directory / name).write_bytes((source / name).read_bytes())
    close(study)
    precious = sweeps / "precious"
    precious.write_bytes(b"precious " * 10_000)
    os.link(precious, search.directory / f"{STUDY_FILE}-shm")
    before = state_of(search.directory)
    server(api_of(search))
    assert state_of(search.directory) == before
    assert precious.read_bytes() == b"precious " * 10_000


@needs_dashboard
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_that_changes_a_study_reaches_it(server: WebServer, search: WrittenSweep, method: str) -> None:
    before = state_of(search.directory)
    assert server(api_of(search)).status == 200
    for path in (api_of(search), f"{api_of(search)}/note", f"{api_of(search)}/rename", "/api/studies", page_of(search)):
        assert server(path, method, "{}", origin=f"http://{server.host}").status == 405, path
    assert server("/api/trials/1/tell", method, "{}", origin=f"http://{server.host}").status in (404, 405)
    assert state_of(search.directory) == before


@needs_dashboard
def test_the_gate_is_that_of_the_other_pages(server: WebServer, search: WrittenSweep) -> None:
    for path in (page_of(search), api_of(search), "/api/studies", "/api/meta", "/static/bundle.js", "/favicon.ico"):
        assert server(path, cookie="a=b").status == 403
        assert server(path, origin="http://evil.example").status == 403
        assert server(path, Host="evil.example").status == 421
    page, again = server(page_of(search)), server(page_of(search))
    policy = page.headers["content-security-policy"]
    (nonce,) = re.findall(r"; script-src 'nonce-([\w-]{22})';", policy)
    assert re.findall("<script[^>]*>", page.text) == [f'<script nonce="{nonce}" defer src="/static/bundle.js">']
    assert nonce not in again.text
    assert "unsafe-eval" not in policy
    assert "unsafe" not in server(search.url).headers["content-security-policy"]


@needs_dashboard
def test_only_studies_of_sweeps_that_are_shown_are_opened(
    server: WebServer, tmp_path: Path, sweep: WrittenSweep
) -> None:
    outside = WrittenSweep(tmp_path / "outside")
    close(write_study(outside.directory, [{}]))
    for search in (outside, sweep):
        assert (server(api_of(search)).status, server(page_of(search)).status) == (404, 404)
    assert server("/api/studies/x").status == 404
    assert server(f"/api/studies/{2**70}").status == 404


def link(file: Path) -> None:
    close(write_study(file.parent / "elsewhere", [{0: 1.0}]))
    file.symlink_to(file.parent / "elsewhere" / STUDY_FILE)


@needs_dashboard
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (link, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda file: file.write_bytes(b"SQLite format 3\0" + b"x" * 5000), "cannot be shown"),
        (lambda file: file.write_text(SCRIPT), "file is not a database"),
    ],
)
def test_what_is_not_a_study_is_not_shown(
    server: WebServer, sweeps: Path, request: pytest.FixtureRequest, make: Callable[[Path], Any], problem: str
) -> None:
    search = found_sweep(server, sweeps / request.node.name.replace("/", "_"))
    make(search.directory / STUDY_FILE)
    reply = server(api_of(search))
    assert (reply.status, problem in json.loads(reply.text)["reason"]) == (503, True), reply.text
    assert title_of(server(search.url))


@needs_dashboard
def test_a_study_without_end_does_not_stop_other_pages(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    search = found_sweep(server, tmp_path / "endless")
    close(write_study(search.directory, [{0: 1.0}]))
    endless = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT i AS study_id FROM n"
    with closing(sqlite3.connect(search.directory / STUDY_FILE)) as database, database:
        database.execute("DROP TABLE study_directions")
        database.execute(f"CREATE VIEW study_directions AS {endless} WHERE i < 0")
    with closing(server.connect()) as asking:
        asking.request("GET", api_of(search), headers={"Cookie": server.signed_in})
        until(lambda: len(processes_of(server)) == 1, "no process was started")
        for path in ("/pool", "/sweeps", search.url):
            assert server(path).status == 200
        (process,) = processes_of(server)
        process.suspend()  # nor does it matter whether it can end by itself
        assert server.end() == 0
        assert "Traceback" not in server.log.read_text()
    assert not process.is_running()


@needs_dashboard
def test_a_process_that_ends_is_started_again(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    search = found_sweep(server, tmp_path / "search")
    close(write_study(search.directory, [{0: 1.0}]))
    assert server(api_of(search)).status == 200
    (process,) = processes_of(server)
    process.kill()
    until(lambda: server(api_of(search)).status == 200, "the study is not shown again")
    assert process.pid not in [other.pid for other in processes_of(server)]


@needs_dashboard
def test_processes_are_few_and_end_with_the_server(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    searches = [found_sweep(server, tmp_path / f"search{number}") for number in range(MAX_PROCESSES + 1)]
    for search in searches:
        close(write_study(search.directory, [{0: 1.0}]))
        assert server(api_of(search)).status == 200
    listed = json.loads(server("/api/studies").text)["study_summaries"]
    assert len(listed) == MAX_PROCESSES
    until(lambda: len(processes_of(server)) == MAX_PROCESSES, "a process was not closed")
    left = processes_of(server)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(100)
    psutil.wait_procs(left, 100)
    assert not any(process.is_running() for process in left)


@needs_dashboard
def test_a_study_that_is_closed_for_others_says_so(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    searches = [found_sweep(server, tmp_path / f"search{number}") for number in range(MAX_PROCESSES + 1)]
    for search in searches:
        close(write_study(search.directory, [{0: 1.0}]))
    silent, *others, last = searches
    assert server(api_of(silent)).status == 200
    (process,) = processes_of(server)
    for search in others:
        assert server(api_of(search)).status == 200
    process.suspend()
    with closing(server.connect()) as asking:
        asking.request("GET", api_of(silent), headers={"Cookie": server.signed_in})
        time.sleep(0.3)  # until it is asked; what follows must take less than ANSWER_SECONDS
        for search in (*others, last):  # each has a process but the last
            assert server(api_of(search)).status == 200
        reply = asking.getresponse()
        assert (reply.status, "other studies were opened" in reply.read().decode()) == (503, True)


@needs_dashboard
def test_the_study_is_shown_on_a_socket(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    server = serving("--socket", str(path))
    about = "Host: localhost:9000\r\nConnection: close\r\n"
    welcome = ask_on_socket(path, f"GET /?token={server.token} HTTP/1.1\r\n{about}\r\n".encode())
    cookie = next(line for line in welcome.decode().split("\r\n") if line.startswith("set-cookie: "))[12:]
    about += f"Cookie: {cookie.partition(';')[0]}\r\n"
    search = WrittenSweep(tmp_path / "search")
    (search.directory / ".gpu_launcher").mkdir(parents=True)
    (search.directory / ".gpu_launcher" / "manifest.jsonl").touch()
    close(write_study(search.directory, [{0: 1.0}]))

    def ask() -> bytes:
        return ask_on_socket(path, f"GET {api_of(search)} HTTP/1.1\r\n{about}\r\n".encode())

    until(lambda: ask().split()[1] == b"200", "the server does not find the study")
    assert b'"name": "train"' in ask()
