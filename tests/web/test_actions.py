"""What the pages do to sweeps that run, and what they show of them meanwhile."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_launcher.web.catalogue import id_of
from tests.waiting import until
from tests.web.serving import WebServer

SEARCH = """
import sys, time
from pathlib import Path

import optuna

import gpu_launcher


def objective(trial):
    trial.suggest_float("x", 0, 1)
    if trial.number == 0:
        raise ValueError("no")
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)
    return 1.0


pool = gpu_launcher.Pool(devices="simulated:1")
gpu_launcher.optimize(optuna.create_study(), objective, 2, pool=pool, catch=ValueError, directory="runs")
"""

Running = tuple[WebServer, str, "subprocess.Popen[bytes]"]


@pytest.fixture
def running(tmp_path: Path, serving: Callable[..., WebServer]) -> Iterator[Running]:
    """A server, the URL of a map whose jobs run until the file `go` exists, and the map."""
    server = serving()
    directory = tmp_path / "runs"
    script = f'echo begun; while [ ! -e "{tmp_path}/go" ]; do sleep 0.05; done; echo done'
    process = server.start_map(directory, script, "--devices", "simulated:2", "--param", "x=range(0,6)")
    url = f"/sweeps/{id_of(directory)}"
    until(lambda: "2 running" in server(url).text, "the jobs did not start")
    yield server, url, process
    (tmp_path / "go").touch()
    process.wait(100)


def said(server: WebServer, url: str, action: str, body: str = "") -> str:
    reply = server(f"{url}/{action}", "POST", body)
    assert reply.status == 200
    return reply.text


def test_the_pool_shows_the_devices_of_nodes(tmp_path: Path, serving: Callable[..., WebServer]) -> None:
    server = serving()
    assert "Devices of nodes" not in server("/pool").text
    directory = tmp_path / "runs"
    node = f"command:env GPU_LAUNCHER_POOL_DIR={tmp_path}/other"
    script = f'while [ ! -e "{tmp_path}/go" ]; do sleep 0.05; done'
    process = server.start_map(directory, script, "--devices", "simulated:2", "--nodes", node, "--param", "x=0,1")
    try:
        url = f"/sweeps/{id_of(directory)}"
        rows = rf'<a href="{url}">runs</a>.*{url}/jobs/[01]">job [01]</a> x=[01]'
        until(lambda: len(re.findall(rows, server("/pool").text.replace("\n", " ").replace("<tr>", "\n"))) == 2)
    finally:
        (tmp_path / "go").touch()
        process.wait(100)
    until(lambda: "Devices of nodes" not in server("/pool").text)


def test_a_running_sweep_is_shown_and_steered(running: Running, tmp_path: Path) -> None:
    server, url, process = running
    page = server(url)
    assert "0 of 6" in page.text
    assert "4 waiting" in page.text
    until(lambda: "begun" in server(f"{url}/jobs/0?log=stdout.txt").text)
    until(lambda: server("/pool").text.count('class="hold"') == 2)
    assert "is paused" in said(server, url, "pause")
    until(lambda: ">paused<" in server(url).text)
    assert "continues" in said(server, url, "continue")
    assert "at most 1 device " in said(server, url, "limit", "devices=1")
    assert "no limit" in said(server, url, "limit", "devices=")
    for wrong in ("-1", "0", "²", "9" * 5000):
        assert "is not a number" in said(server, url, "limit", f"devices={wrong}")
        assert "is not a job" in said(server, url, "cancel", f"jobs={wrong}x")
    assert "is not a job" in said(server, url, "cancel", f"jobs={'9' * 5000}")
    assert "job 5 cancelled before the start" in said(server, url, "cancel", "jobs=5")
    assert "has no job 77" in said(server, url, "cancel", "jobs=77")
    assert 'class="problem"' in said(server, url, "cancel", "jobs=x")
    assert server(f"{url}/nonsense", "POST", "").status == 404
    (tmp_path / "go").touch()
    process.wait(100)
    until(lambda: ">ended<" in server(url).text)
    until(lambda: "5 completed" in server(url).text)
    until(lambda: "1 cancelled" in server(url).text)
    assert "has ended" in said(server, url, "pause")


def test_failed_jobs_are_retried(tmp_path: Path, serving: Callable[..., WebServer]) -> None:
    server = serving()
    directory = tmp_path / "runs"
    script = f'cd "{tmp_path}"; [ "$0" != 1 -o -e fixed ] || exit 3; while [ ! -e go ]; do sleep 0.05; done'
    process = server.start_map(directory, script, "--devices", "simulated:3", "--param", "x=range(0,3)")
    try:
        url = f"/sweeps/{id_of(directory)}"
        until(lambda: {"2 running", "1 failed"} <= set(re.findall(r"\d [a-z]+", server(url).text)))
        assert "Retry this job" in server(f"{url}/jobs/1").text
        assert "Cancel this job" in server(f"{url}/jobs/0").text
        assert "job 1 runs again" in said(server, url, "retry", "jobs=1")
        until(lambda: re.search('"state failed".*<dt>attempts</dt><dd>2<', server(f"{url}/jobs/1").text, re.DOTALL))
        (tmp_path / "fixed").touch()
        assert "job 1 runs again" in said(server, url, "retry-failed")
        until(lambda: "3 running" in server(url).text)
        assert "has no job that has failed" in said(server, url, "retry-failed")
        assert "job 0 has not ended yet" in said(server, url, "retry", "jobs=0")
        assert "has no job 77" in said(server, url, "retry", "jobs=77")
        for action in ("cancel", "retry"):
            assert "no job is named" in said(server, url, action, "jobs=+")
    finally:
        (tmp_path / "go").touch()
        process.wait(100)
    until(lambda: ">ended<" in server(url).text)
    assert "3 completed" in server(url).text
    assert "Retry this job" not in server(f"{url}/jobs/1").text
    assert "has ended" in said(server, url, "retry", "jobs=1")


def test_trials_of_a_search_are_not_offered_to_be_retried(tmp_path: Path, serving: Callable[..., WebServer]) -> None:
    server = serving()
    directory = tmp_path / "runs"
    (tmp_path / "search.py").write_text(SEARCH)
    command = [sys.executable, "search.py", str(tmp_path / "go")]
    process = subprocess.Popen(command, env=server.environ, cwd=tmp_path)
    try:
        url = f"/sweeps/{id_of(directory)}"
        until(lambda: {"1 running", "1 failed"} <= set(re.findall(r"\d [a-z]+", server(url).text)) or process.poll())
        assert "Cancel jobs" in server(url).text
        assert "ValueError: no" in server(f"{url}/jobs/0").text
        for page in (url, f"{url}/jobs/0"):
            assert "Retry" not in server(page).text
        assert "call study.enqueue_trial" in said(server, url, "retry", "jobs=0")
    finally:
        (tmp_path / "go").touch()
        try:
            process.wait(100)
        finally:
            process.kill()


def test_a_sweep_is_stopped(running: Running) -> None:
    server, url, process = running
    assert "stops: 2 running jobs killed" in said(server, url, "kill")
    process.wait(100)
    until(lambda: ">ended<" in server(url).text)
    until(lambda: "To run what did not complete" in server(url).text)


def test_a_sweep_whose_program_was_killed_has_lost_its_jobs(running: Running) -> None:
    server, url, process = running
    process.kill()
    process.wait()
    until(lambda: ">ended<" in server(url).text)
    until(lambda: re.search(r"\d lost<", server(url).text))
