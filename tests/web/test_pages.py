"""What the pages show of sweeps that have ended, and of the pool."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from tests.waiting import until
from tests.web.serving import CLI, Reply, WebServer, WrittenSweep, title_of, write_large_sweep, write_sweep


def numbers(page: Reply) -> list[int]:
    """The jobs in the table of a sweep's page."""
    return [int(number) for number in re.findall(r'<tr id="job-(\d+)"', page.text)]


def test_the_pool_shows_devices_and_the_queue(server: WebServer) -> None:
    page = server("/pool")
    assert title_of(page) == "Pool"
    assert page.text.count('<li class="device"') == 2
    assert "The queue is empty" in page.text


def test_the_start_is_the_pool(server: WebServer) -> None:
    assert server("/").headers["location"] == "/pool"
    assert server(f"/?token={server.token}").headers["location"] == "/pool"
    assert "/pool" in server(f"/?token={server.token}", cookie="a=b").text


@pytest.mark.smoke
def test_sweeps_are_listed(server: WebServer, sweep: WrittenSweep) -> None:
    until(lambda: "2 completed" in server("/sweeps").text, "it is not read")  # few are read for one answer
    page = server("/sweeps")
    assert f'href="{sweep.url}"' in page.text
    assert "2 failed" in page.text
    assert "1 lost" in page.text


def test_a_sweep_shows_its_jobs_best_failures_and_continuation(server: WebServer, sweep: WrittenSweep) -> None:
    page = server(sweep.url)
    assert numbers(page) == [0, 1, 2, 3, 4]
    assert re.search(r"Best: <a [^>]*/jobs/0\"><b>0.5</b>", page.text)
    assert re.search(r">2 jobs</a>: <code>raised ValueError", page.text)
    assert "python train.py -m" in page.text
    assert "alert(1)" in page.text
    assert "seed" not in page.text.partition("<tbody>")[0].partition("<table")[2]  # it is the same for all jobs


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("?sort=-loss", [1, 0, 2, 3, 4]),
        ("?sort=lr", [4, 3, 2, 1, 0]),
        ("?state=failed", [2, 3]),
        ("?text=valueerror", [2, 3]),
        ("?text=lr=0.01+seed", [2]),
        ("?text=nothing", []),
        ("?sort=nonsense&state=nonsense&page=x&column=nonsense", [0, 1, 2, 3, 4]),
        ("?page=99999999999999999999", [0, 1, 2, 3, 4]),
        ("?" + "&".join("a=b" for _ in range(1000)), [0, 1, 2, 3, 4]),
    ],
)
def test_jobs_are_sorted_and_filtered(server: WebServer, sweep: WrittenSweep, query: str, found: list[int]) -> None:
    assert numbers(server(sweep.url + query)) == found


def test_columns_are_chosen(server: WebServer, sweep: WrittenSweep) -> None:
    page = server(f"{sweep.url}?column=message&column=lr")
    assert re.findall(r'<th scope="col"[^>]*><a [^>]*>([a-z ]+)<', page.text) == ["job", "message", "lr"]


def test_a_part_that_the_browser_has_is_not_sent_again(server: WebServer, sweep: WrittenSweep) -> None:
    for path in (sweep.url, "/sweeps", f"{sweep.url}/jobs/0"):
        part = server(path, HX_Request="true")
        assert part.status == 200
        assert "<html" not in part.text

        def seen(path: str = path) -> bool:
            """Whether nothing is sent again. What is shown may change meanwhile."""
            version = server(path, HX_Request="true").headers["x-seen"]
            return server(path, HX_Request="true", X_Seen=version).status == 204

        until(seen, f"{path} is always sent")
        assert server(path, HX_Request="true", X_Seen="another").status == 200


def test_a_sweep_is_downloaded_as_csv(server: WebServer, sweep: WrittenSweep) -> None:
    reply = server(f"{sweep.url}/results.csv")
    assert reply.headers["content-type"].startswith("text/csv")
    assert reply.text.splitlines()[0].startswith("number,outcome,")
    assert len(reply.text.splitlines()) == 6


def test_charts_have_the_values(server: WebServer, sweep: WrittenSweep) -> None:
    charts = json.loads(server(f"{sweep.url}/charts?value=loss").text)
    assert [chart["title"] for chart in charts] == ["loss and parameters", "loss over time", "loss by lr"]
    assert [point["value"][1] for point in charts[1]["option"]["series"][0]["data"]] == [0.5, 1.5]
    assert server(f"{sweep.url}/charts?value=nonsense").status == 404


def test_a_job_shows_log_config_and_files(server: WebServer, sweep: WrittenSweep) -> None:
    page = server(f"{sweep.url}/jobs/1")
    assert title_of(page) == "Job 1"
    assert "needle 1" in page.text
    assert "overrides.yaml" in page.text
    assert "lr=0.1" in page.text
    assert "train.log</a>" in page.text


def test_a_job_that_never_ran_has_a_page(server: WebServer, sweep: WrittenSweep) -> None:
    page = server(f"{sweep.url}/jobs/4")
    assert "There is no log" in page.text


def test_a_log_is_searched_in_any_case(server: WebServer, sweep: WrittenSweep) -> None:
    found = server(f"{sweep.url}/jobs/1/log/search?log=train.log&text=NEEDLE")
    assert "1 line" in found.text
    assert "needle 1" in found.text
    assert server(f"{sweep.url}/jobs/1/log/search?log=../secret&text=x").status == 404


def test_a_log_of_300_mb_is_shown_from_its_end(server: WebServer, sweeps: Path) -> None:
    large = write_sweep(sweeps / "large")
    log = large.directory / "0" / "train.log"
    with log.open("r+b") as file:
        file.seek(300_000_000)  # a hole, which reads as zeros
        file.write(b"\n" + b"".join(b"line %d\n" % number for number in range(20_000)) + b"the end\n")
    until(lambda: server(large.url).status == 200, "the sweep was not found")
    page = server(f"{large.url}/jobs/0")
    assert "the end" in page.text
    assert len(page.body) < 2**19
    earlier = re.search(r'href="([^"]*before=\d+)"', page.text)
    assert earlier is not None
    before = server(earlier[1].replace("&amp;", "&"))
    assert "the end" not in before.text
    assert "line " in before.text
    found = server(f"{large.url}/jobs/0/log/search?log=train.log&text=line+777")
    assert "12 lines" in found.text or "11 lines" in found.text
    size = log.stat().st_size
    inode = log.stat().st_ino
    more = server(f"{large.url}/jobs/0/log?log=train.log&file={inode}&after={size - 8}")
    assert "the end" in more.text
    skipped = server(f"{large.url}/jobs/0/log?log=train.log&file={inode}&after=0")
    assert "are not shown here" in skipped.text
    assert len(skipped.body) < 2**19
    again = server(f"{large.url}/jobs/0/log?log=train.log&file=1&after={size}")
    assert "begins again" in again.text


def test_a_manifest_that_cannot_be_read_is_said(server: WebServer, sweeps: Path) -> None:
    newer = write_sweep(sweeps / "newer")
    with (newer.directory / DIRECTORY / MANIFEST).open("a") as file:
        file.write('{"format": 99}\n')
    until(lambda: "newer version of gpu-launcher" in server(newer.url).text)
    assert server(newer.url).status == 404
    until(lambda: "newer version of gpu-launcher" in server("/sweeps").text)
    (newer.directory / DIRECTORY / MANIFEST).unlink()


def test_the_first_of_20000_jobs_are_shown_before_all_are_read(
    serving: Callable[..., WebServer], tmp_path: Path
) -> None:
    large = write_large_sweep(tmp_path / "large", 20_000)
    server = serving()
    page = server(large.url)
    assert "is being read" in page.text
    assert len(numbers(page)) == 100
    assert "lost</a>" not in page.text
    pages = 1
    while "is being read" in page.text:
        page = server(large.url)
        pages += 1
    assert pages > 2
    assert "20000 completed" in page.text
    assert "To run what did not complete" not in page.text
    assert numbers(server(f"{large.url}?sort=-loss&page=200"))[-1] == 0


def test_an_empty_directory_is_explained(serving: Callable[..., WebServer]) -> None:
    assert "There is no sweep below" in serving()("/sweeps").text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("missing",), "missing is not a directory"),
        (("--socket", "x", "--port", "1"), "cannot be combined"),
        (("--socket", "no/such/directory"), "cannot listen on"),
        (("--host", "256.1.1.1"), "cannot listen on 256.1.1.1"),
        (("--devices", "nonsense"), "--devices"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    done = subprocess.run([*CLI, "web", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode in (1, 2)
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said(server: WebServer) -> None:
    done = subprocess.run(
        [*CLI, "web", "--devices", "cpu:1", "--port", str(server.address[1])],
        cwd=server.log.parent,
        env=server.environ,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1
    assert "name another with --port" in done.stderr


def test_ctrl_c_ends_the_server_in_order_however_often_it_is_pressed(serving: Callable[..., WebServer]) -> None:
    server = serving()
    assert server("/pool").status == 200
    while server.process.poll() is None:
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert server.process.wait() in (0, -signal.SIGINT)  # the latter if it had nothing left to do
    assert server.log.read_text() == ""
