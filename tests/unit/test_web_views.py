"""Tests of answers that need no server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.requests import Request
from starlette.responses import Response

from gpu_launcher.jobs.events import JobEnded, JobStarted, Outcome
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.web import dashboard
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


class OneStudy:
    """A study that is open in optuna-dashboard."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.may_answer = asyncio.Event()
        self.answered = 0

    async def ask(self, request: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
        await self.may_answer.wait()
        self.answered += 1
        return {"status": 200, "headers": []}, json.dumps({"study_summaries": [self.number]}).encode()


def test_the_list_of_studies_leaves_out_those_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "LIST_SECONDS", 0.0)

    async def ask() -> None:
        first, second = OneStudy(1), OneStudy(2)
        second.may_answer.set()
        shown = dashboard.Dashboard(cast(Any, None))
        shown._open.update({(study.number,): cast(Any, study) for study in (first, second)})

        async def listed() -> Any:
            request = Request(
                {"type": "http", "method": "GET", "path": "/api/studies", "query_string": b"", "headers": []}
            )
            return json.loads(bytes((await shown._studies(request)).body))["study_summaries"]

        assert await listed() == [2]
        first.may_answer.set()
        await asyncio.gather(*shown._listing)
        assert first.answered == 1, "its own page may wait for the same process, so that is not ended"
        assert await listed() == [1, 2]
        assert not shown._listing

    asyncio.run(asyncio.wait_for(ask(), 100))
