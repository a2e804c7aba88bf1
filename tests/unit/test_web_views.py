"""Tests of answers that need no server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.requests import Request
from starlette.responses import Response

from gpu_launcher.jobs.events import JobEnded, JobStarted, Outcome
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.web.catalogue import Catalogue, id_of
from gpu_launcher.web.templating import templates
from gpu_launcher.web.views import Views


class OneJob:
    """A sweep whose only job runs, and answers about it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "0" / "train.log"
        self.log.parent.mkdir()
        self.log.write_text("begun\n")
        self.recorder = Recorder(directory, [Job(0, "", ["x=1"])], "train.py")
        self.recorder.handle(JobStarted(0.0, 0, "", (), str(self.log)))
        self.now = 0.0
        self.views = Views(cast(Any, None), Catalogue([directory], lambda: self.now), None)

    def end(self) -> None:
        self.recorder.handle(JobEnded(0.0, 0, "", (), Outcome.COMPLETED, 1.0, None, str(self.log)))
        self.recorder.close()
        self.now += 60.0

    def request(self, path: str = "", query: str = "") -> Request:
        asked = {"id": id_of(self.directory), "number": "0", "path": path}
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "path_params": asked}
        return Request({**scope, "query_string": query.encode()})

    def log_more(self, after: int, seen: int) -> Response:
        file = self.log.stat().st_ino
        return self.views.log_more(self.request(query=f"log=train.log&file={file}&after={after}&seen={seen}"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[OneJob]:
    job = OneJob(tmp_path)
    yield job
    job.recorder.close()


def spans(answer: Response) -> list[str]:
    """The texts of the parts of a log: of what does not change any more, and of what is asked for again."""
    assert answer.status_code == 200
    return re.findall(r"<span[^>]*>([^<]*)</span>", bytes(answer.body).decode())


def test_a_download_that_is_never_sent_keeps_no_file_open(job: OneJob) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    answer = job.views.job_files(job.request("train.log"))
    assert answer.headers["content-length"] == "6"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_line_of_a_log_is_shown_again_while_it_is_written(job: OneJob) -> None:
    job.log.write_bytes(b"begun\n 10%\r 20%")
    assert spans(job.log_more(0, 0)) == ["begun\n", " 20%"]
    assert job.log_more(11, 15).status_code == 204
    with job.log.open("ab") as file:
        file.write(b"\r 30%\nsa")
    assert spans(job.log_more(11, 15)) == [" 30%\n", "sa"]
    job.end()
    assert spans(job.log_more(21, 23)) == ["sa"]


@pytest.mark.parametrize("time", [2.0**61, -(2.0**61), 1e15])
def test_a_time_that_no_calendar_has_is_shown(time: float) -> None:
    assert templates().filters["clock"](time)
