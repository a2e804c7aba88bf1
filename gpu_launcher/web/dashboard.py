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
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
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
from gpu_launcher.processes.linux import dying_with_parent
from gpu_launcher.requirements import check_version
from gpu_launcher.studies.report_curves import study_file
from gpu_launcher.text import one_line, read_digits
from gpu_launcher.web.catalogue import Catalogue, SweepSummary
from gpu_launcher.web.gate import POLICY

DISTRIBUTION = "optuna-dashboard"
MAX_PROCESSES = 4
"""Maximum number of studies that are open. The one that was asked for longest ago is closed for another."""
MAX_PENDING = 4
"""Maximum number of requests to one study at a time. A browser has six connections, and other pages need some."""
ANSWER_SECONDS = 180.0
"""A first reading of 20,000 trials takes 16 seconds of a CPU."""
ENDING_SECONDS = 2.0
MAX_ANSWER_BYTES = 2**28
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
        self._open: OrderedDict[tuple[int, ...], _StudyProcess] = OrderedDict()

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
        except (_UnavailableError, StorageError, UnsupportedVersionError, OSError) as error:
            return self._problem(request, error)

    async def _of_any(self, request: Request) -> Response:
        """What is the same for all studies."""
        if not self._open:
            raise HTTPException(404, "no study is open")
        try:
            return await self._ask(next(reversed(self._open.values())), request)
        except _UnavailableError as error:
            return self._problem(request, error)

    async def _studies(self, request: Request) -> Response:
        """The studies that are open."""
        found = []
        for process in list(self._open.values()):
            with suppress(_UnavailableError):  # that study's own page says so
                found += json.loads(bytes((await self._ask(process, request)).body)).get("study_summaries", [])
        return JSONResponse({"study_summaries": found})

    async def _elsewhere(self, request: Request) -> Response:
        return RedirectResponse("/sweeps", 303)

    async def _process(self, number: int | None) -> _StudyProcess:
        if number is None:
            raise HTTPException(404, "study not found")
        file, status = await run_in_threadpool(self._study, number)
        key = (number, status.st_dev, status.st_ino)  # if the file is another one, nothing that is known of it holds
        process = self._open.setdefault(key, _StudyProcess(file, number))
        self._open.move_to_end(key)
        while len(self._open) > MAX_PROCESSES:
            await self._open.popitem(last=False)[1].close()
        return process

    def _study(self, number: int) -> tuple[Path, os.stat_result]:
        check_version(DISTRIBUTION)
        found = self._catalogue.directories().items()
        file = next((study_file(directory) for id, directory in found if study_number(id) == number), None)
        if file is None:
            raise HTTPException(404, "study not found")
        return file, file.lstat()

    async def _ask(self, process: _StudyProcess, request: Request) -> Response:
        head, body = await process.ask(
            {
                "PATH_INFO": request.url.path.encode().decode("latin-1"),
                "QUERY_STRING": request.url.query,
                "HTTP_ACCEPT_ENCODING": request.headers.get("accept-encoding", ""),
            }
        )
        if head["status"] >= 500:
            raise _UnavailableError(f"the study cannot be shown: {head['problem']}")
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


class _UnavailableError(Exception):
    """optuna-dashboard does not answer, or fails."""


class _StudyProcess:
    """A process that is started when it is first asked, and answers one request after another."""

    def __init__(self, file: Path, number: int) -> None:
        self._command = (sys.executable, "-c", _MAIN, str(file), str(number))
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self._pending = 0
        self._is_closed = False

    async def ask(self, environ: dict[str, str]) -> tuple[dict[str, Any], bytes]:
        """Return what `dashboard_process` answers. Raises _UnavailableError."""
        if self._pending >= MAX_PENDING:
            raise _UnavailableError("the study is being read")
        self._pending += 1
        try:
            async with self._lock:
                return await asyncio.wait_for(self._exchange(environ), ANSWER_SECONDS)
        except asyncio.TimeoutError:
            raise _UnavailableError(f"optuna-dashboard did not answer within {ANSWER_SECONDS:.0f} s") from None
        except asyncio.CancelledError:
            raise _UnavailableError("the server is ending") from None
        except EOFError:
            why = f": {MAX_PROCESSES} other studies were opened" if self._is_closed else ""
            raise _UnavailableError(f"optuna-dashboard has ended{why}") from None
        except OSError as error:
            raise _UnavailableError(f"optuna-dashboard has ended: {error}") from None
        finally:
            self._pending -= 1

    async def _exchange(self, environ: dict[str, str]) -> tuple[dict[str, Any], bytes]:
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(environ).encode() + b"\n")
            await process.stdin.drain()
            head = json.loads(await process.stdout.readuntil(b"\n"))
            if head["length"] > MAX_ANSWER_BYTES:
                raise OSError("the answer is too large")
            return head, await process.stdout.readexactly(head["length"])
        except BaseException:  # the rest of this answer would be taken for the next one
            self._kill()
            raise

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent(self._command, signal.SIGKILL),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,  # so that Ctrl-C does not reach it
        )
        if self._is_closed:
            process.kill()
        return process

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def close(self) -> None:
        """End the process, and do not start it again."""
        self._is_closed, process = True, self._process
        self._kill()
        if process is not None:
            with suppress(asyncio.TimeoutError):  # the kernel ends it when what it waits for answers
                await asyncio.wait_for(process.wait(), ENDING_SECONDS)


_MAIN = f"""
import sys
sys.path[:] = {list(filter(None, sys.path))!r}  # nothing is imported from the working directory
from gpu_launcher.web.dashboard_process import main
main()
"""
