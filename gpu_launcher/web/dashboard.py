"""optuna-dashboard, for the study of a search, in the session of the pages.

It runs in a process of its own for each study, which only reads: see `dashboard_process.py`. Its paths begin at the
root of the server, and none is one of ours. Only requests that read are passed on. Its pages may contain styles and
pictures, but run no script except its own: a script in a study could start programs, as our pages can. So could HTML in
a study that loads our htmx, for example in a frame with `srcdoc`. So the policy allows scripts by nonce, not by server.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from gpu_launcher.errors import StorageError, UnsupportedVersionError
from gpu_launcher.requirements import check_version
from gpu_launcher.studies.report_curves import study_file
from gpu_launcher.text import one_line, read_digits
from gpu_launcher.web.catalogue import Catalogue, SweepSummary
from gpu_launcher.web.gate import POLICY
from gpu_launcher.web.study_process import StudyProcess, UnavailableError

DISTRIBUTION = "optuna-dashboard"
MODULE = "gpu_launcher.web.dashboard_process"
MAX_PROCESSES = 4
"""Maximum number of studies that are open. The one that was asked for longest ago is closed for another."""
MAX_PENDING = 4
"""Maximum number of requests to one study at a time. A browser has six connections, and other pages need some."""
ANSWER_SECONDS = 180.0
"""A first reading of 20,000 trials takes 16 seconds of a CPU."""
LIST_SECONDS = 5.0
"""Seconds after which the list of studies leaves out those that have not answered."""
MAX_STUDY_NUMBER = 2**53 - 1
"""JavaScript's numbers have 53 bits."""
DASHBOARD_POLICY = (
    POLICY.replace("script-src 'self'", "script-src 'nonce-{nonce}'")
    .replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
    .replace("img-src 'self'", "img-src 'self' data: blob:")
    .replace("form-action 'self'", "form-action 'none'")
)
PASSED_ON = ("content-type", "content-encoding", "content-disposition")


@dataclass(frozen=True, slots=True)
class StudyLink:
    """Where a page shows the study of a search."""

    url: str
    problem: str | None
    """Why optuna-dashboard cannot be used. None if it can."""


def study_link(sweep: SweepSummary) -> StudyLink | None:
    """None if the sweep's directory has no study."""
    problem = None
    try:
        if study_file(sweep.directory) is None:
            return None
        check_version(DISTRIBUTION)
    except StorageError:
        return None
    except UnsupportedVersionError as error:
        problem = str(error)
    return StudyLink(f"/dashboard/studies/{study_number(sweep.id)}", problem)


def study_number(id: str) -> int:
    """The number, up to MAX_STUDY_NUMBER, that optuna-dashboard's URLs have for the study of the sweep with this id."""
    return int(id[:13], 16)


class Dashboard:
    """Passes requests on to optuna-dashboard."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._open: OrderedDict[tuple[int, ...], StudyProcess] = OrderedDict()
        self._listing: set[asyncio.Task[list[Any]]] = set()

    def routes(self) -> list[Route]:
        of_study = ("/dashboard/studies/{study}", "/api/studies/{study}", "/csv/{study}")
        return [
            *(Route(f"{path}{rest}", self._of_study) for path in of_study for rest in ("", "/{rest:path}")),
            *(Route(path, self._of_any) for path in ("/static/bundle.js", "/favicon.ico", "/api/meta")),
            Route("/api/studies", self._studies),
            *(Route(path, self._elsewhere) for path in ("/dashboard", "/dashboard/{rest:path}")),
        ]

    async def close(self) -> None:
        for process in self._open.values():
            await process.close()

    async def _of_study(self, request: Request) -> Response:
        try:
            process = await self._process(read_digits(request.path_params["study"], MAX_STUDY_NUMBER))
            return await self._ask(process, request)
        except (UnavailableError, StorageError, UnsupportedVersionError, OSError) as error:
            return self._problem(request, error)

    async def _of_any(self, request: Request) -> Response:
        """What is the same for all studies."""
        if not self._open:
            raise HTTPException(404, "no study is open")
        try:
            return await self._ask(next(reversed(self._open.values())), request)
        except UnavailableError as error:
            return self._problem(request, error)

    async def _studies(self, request: Request) -> Response:
        """The studies that are open and answer in time."""
        asked = [asyncio.create_task(self._summaries(process, request)) for process in self._open.values()]
        self._listing.update(asked)
        for task in asked:
            task.add_done_callback(self._listing.discard)
        if asked:  # the others continue: ending one kills a process from which the study's page may expect an answer
            await asyncio.wait(asked, timeout=LIST_SECONDS)
        found = [summary for task in asked if task.done() for summary in task.result()]
        return JSONResponse({"study_summaries": found})

    async def _summaries(self, process: StudyProcess, request: Request) -> list[Any]:
        found: list[Any] = []
        with suppress(UnavailableError):  # that study's own page says so
            found = json.loads(bytes((await self._ask(process, request)).body)).get("study_summaries", [])
        return found

    async def _elsewhere(self, request: Request) -> Response:
        return RedirectResponse("/sweeps", 303)

    async def _process(self, number: int | None) -> StudyProcess:
        if number is None:
            raise HTTPException(404, "study not found")
        file, status = await run_in_threadpool(self._study, number)
        key = (number, status.st_dev, status.st_ino)  # if the file is another one, nothing that is known of it holds
        if key not in self._open:
            self._open[key] = StudyProcess(
                DISTRIBUTION, MODULE, str(file), str(number), seconds=ANSWER_SECONDS, pending=MAX_PENDING
            )
        process = self._open[key]
        self._open.move_to_end(key)
        while len(self._open) > MAX_PROCESSES:
            await self._open.popitem(last=False)[1].close(f"{MAX_PROCESSES} other studies were opened")
        return process

    def _study(self, number: int) -> tuple[Path, os.stat_result]:
        check_version(DISTRIBUTION)
        found = self._catalogue.directories().items()
        file = next((study_file(directory) for id, directory in found if study_number(id) == number), None)
        if file is None:
            raise HTTPException(404, "study not found")
        return file, file.lstat()

    async def _ask(self, process: StudyProcess, request: Request) -> Response:
        head, body = await process.ask(
            {
                "PATH_INFO": request.url.path.encode().decode("latin-1"),
                "QUERY_STRING": request.url.query,
                "HTTP_ACCEPT_ENCODING": request.headers.get("accept-encoding", ""),
            }
        )
        if head["status"] >= 500:
            raise UnavailableError(f"the study cannot be shown: {head['problem']}")
        headers = {name: value for name, value in head["headers"] if name.lower() in PASSED_ON}
        nonce = secrets.token_urlsafe(16)
        if request.url.path.startswith("/dashboard/"):  # its only page, which contains nothing of a study
            body = body.replace(b"<script ", f'<script nonce="{nonce}" '.encode())
        return Response(
            body, head["status"], {**headers, "content-security-policy": DASHBOARD_POLICY.format(nonce=nonce)}
        )

    def _problem(self, request: Request, error: Exception) -> Response:
        said = one_line(str(error), 300)
        if request.url.path.startswith("/api/"):
            return JSONResponse({"reason": said}, 503)  # which the page shows
        raise HTTPException(503, said)
