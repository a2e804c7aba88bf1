"""The pages: each reads, and fills a template. A part of a page that changes is asked for with `HX-Request`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from gpu_launcher.errors import ManifestError, OptionError, PoolDirectoryError, StorageError
from gpu_launcher.jobs.control import MAX_NUMBER
from gpu_launcher.jobs.manifest import Entry, State
from gpu_launcher.sizes import show_memory
from gpu_launcher.text import one_line, read_digits
from gpu_launcher.web.actions import ACTIONS, act
from gpu_launcher.web.catalogue import MAX_LISTED_SWEEPS, Catalogue, SweepReading, id_of
from gpu_launcher.web.charts import charts, report_charts
from gpu_launcher.web.dashboard import study_link
from gpu_launcher.web.job_files import MAX_LISTED, JobFiles
from gpu_launcher.web.log_text import MAX_QUERY, PART_BYTES, LogPart, read_part, search
from gpu_launcher.web.new_sweep import LABELS, Plan, SweepForm, find_problems, make_plan
from gpu_launcher.web.pool_watch import PoolWatch
from gpu_launcher.web.programs import ProgramReading, Programs
from gpu_launcher.web.study_curves import StudyCurves
from gpu_launcher.web.table_page import TableQuery, select
from gpu_launcher.web.templating import templates

SEEN = "X-Seen"
"""Header with which a browser says which version of a part it has."""
CATCH_UP_BYTES = 4 * PART_BYTES
"""A log that has grown by more than this since the last look is not shown in full."""
COPY_BYTES = 2**18
MAX_POSITION = 2**63 - 1
"""Largest position in a file."""


@dataclass(frozen=True, slots=True)
class NewSweeps:
    """What a form for a new sweep needs."""

    launcher: str
    """The program gpu-launcher."""
    programs: Programs
    devices: str
    """The devices that the form suggests."""
    pool_dir: Path | None


class Views:
    """Answers requests. `new` is None if the server is read-only, which disables what changes something."""

    def __init__(self, pool: PoolWatch, catalogue: Catalogue, new: NewSweeps | None) -> None:
        self._pool = pool
        self._catalogue = catalogue
        self._new = new
        self.curves = StudyCurves()
        self._templates = templates()
        self._templates.globals.update(read_only=new is None, roots=catalogue.roots, max_listed=MAX_LISTED)
        self._templates.globals.update(sweep_of=self._sweep_of)

    # Pages

    def start(self, request: Request) -> Response:
        return RedirectResponse("/pool", 303)

    def pool(self, request: Request) -> Response:
        try:
            survey, problem = self._pool.look(), None
        except PoolDirectoryError as error:
            survey, problem = None, str(error)
        nodes = self._catalogue.nodes()
        histories = self._pool.histories
        return self._page(request, "pool", survey=survey, problem=problem, histories=histories, nodes=nodes)

    def sweeps(self, request: Request) -> Response:
        found, problems, unread = self._catalogue.summaries()
        more = max(0, len(self._catalogue.directories()) - MAX_LISTED_SWEEPS)
        return self._page(request, "sweeps", sweeps=found, problems=problems, unread=unread, more=more)

    def sweep(self, request: Request) -> Response:
        sweep = self._sweep(request)
        page = select(sweep.table, TableQuery.read(_query(request)))
        return self._page(
            request,
            "sweep",
            sweep=sweep,
            page=page,
            best=None if sweep.best is None else sweep.table.best,
            study=study_link(sweep),
        )

    def sweep_charts(self, request: Request) -> Response:
        sweep = self._sweep(request)
        value = (_query(request).get("value") or [""])[0]
        try:
            found = charts(sweep.table, value)
        except OptionError as error:
            raise HTTPException(404, str(error)) from None
        return self._unless_seen(request, json.dumps(found), "application/json")

    async def sweep_reports(self, request: Request) -> Response:
        """A chart of what jobs report while they run, if there is one."""
        sweep = await run_in_threadpool(self._sweep, request)
        try:
            curves, has_more = await self.curves.read(sweep.directory)
        except StorageError as error:
            raise HTTPException(503, str(error)) from None
        found = await run_in_threadpool(report_charts, sweep.table, curves, are_all=not has_more)
        return self._unless_seen(request, json.dumps(found), "application/json")

    def sweep_csv(self, request: Request) -> Response:
        sweep = self._sweep(request)
        text = _encodable(sweep.table.to_csv())
        return Response(text, media_type="text/csv", headers=_download(f"{sweep.directory.name}.csv"))

    def job(self, request: Request) -> Response:
        sweep, entry = self._job(request)
        files = JobFiles(sweep.directory, entry)
        logs = files.logs
        query = _query(request)
        asked = (query.get("log") or [""])[0]
        chosen = asked if asked in logs else next(iter(logs), None)
        row = next(row for row in sweep.table if row.number == entry.number)
        part, file_id = self._log_part(files, chosen, _number(query, "before"), _number(query, "at"))
        return self._page(
            request,
            "job",
            sweep=sweep,
            entry=entry,
            row=row,
            logs=logs,
            chosen=chosen,
            part=part,
            file_id=file_id,
            follows=part is not None and "before" not in query and "at" not in query,
            elsewhere=files.log_is_elsewhere,
            configs=files.configs(),
            path=(),
            files=(files.listed(()) or []) if files.directory is not None else [],
        )

    def log_more(self, request: Request) -> Response:
        """What a log has more than the browser shows."""
        sweep, entry = self._job(request)
        query = _query(request)
        files = JobFiles(sweep.directory, entry)
        name = (query.get("log") or [""])[0]
        if name not in files.logs:
            raise HTTPException(404, "log not found")
        after, notes = _number(query, "after") or 0, []
        with _opened(files, (name,)) as descriptor:
            status = os.fstat(descriptor)
            if str(status.st_ino) != (query.get("file") or [""])[0] or status.st_size < after:
                after, notes = 0, ["the log begins again: another attempt was started"]
            if status.st_size - after > CATCH_UP_BYTES:
                part = read_part(descriptor)
                notes.append(f"{show_memory(part.start - after)} of the log are not shown here")
            else:
                part = read_part(descriptor, after)
        is_over = entry.state not in (State.WAITING, State.RUNNING) and part.end >= part.size
        if part.end == _number(query, "seen") and not notes and not is_over:
            return Response(status_code=204)
        return self._render(
            "_log_more",
            sweep=sweep,
            entry=entry,
            chosen=name,
            part=part,
            file_id=str(status.st_ino),
            note="; ".join(notes),
            follows=not is_over,
        )

    def log_search(self, request: Request) -> Response:
        sweep, entry = self._job(request)
        query = _query(request)
        files = JobFiles(sweep.directory, entry)
        name, text = ((query.get(key) or [""])[0] for key in ("log", "text"))
        if name not in files.logs:
            raise HTTPException(404, "log not found")
        found = []
        if text := text[:MAX_QUERY]:
            with _opened(files, (name,)) as descriptor:
                found = search(descriptor, text)
        return self._render("_log_found", sweep=sweep, entry=entry, chosen=name, text=text, found=found)

    def job_files(self, request: Request) -> Response:
        sweep, entry = self._job(request)
        files = JobFiles(sweep.directory, entry)
        parts = tuple(part for part in request.path_params["path"].split("/") if part)
        if not parts:
            return RedirectResponse(f"/sweeps/{sweep.id}/jobs/{entry.number}", 303)
        if (listed := files.listed(parts)) is not None:
            return self._page(request, "files", sweep=sweep, entry=entry, path=parts, files=listed)
        with _opened(files, parts) as descriptor:
            size = os.fstat(descriptor).st_size
        # As text or a download, never as a page: the file may have been written to be one.
        headers = {**_download(parts[-1]), "content-length": str(size), "content-security-policy": "sandbox"}
        return StreamingResponse(_copied(files, parts, size), media_type="application/octet-stream", headers=headers)

    # Actions

    async def action(self, request: Request) -> Response:
        """Steer a sweep, and say what was done."""
        name = request.path_params["action"]
        if name not in ACTIONS:
            raise HTTPException(404, "action not found")
        if self._new is None:
            raise HTTPException(403, "this server is read-only: it was started with --read-only")
        form = await _form(request)
        try:
            sweep = await run_in_threadpool(self._catalogue.sweep, request.path_params["id"])
        except KeyError:
            raise HTTPException(404, "sweep not found") from None
        said = await run_in_threadpool(act, sweep.directory, name, form)
        return self._render("_said", said=said)

    # New sweeps

    def new(self, request: Request) -> Response:
        new = self._starting()
        return self._render("new", here="new", starts=new.programs.starts(), labels=LABELS, devices=new.devices)

    async def new_run(self, request: Request) -> Response:
        """Check the sweep of a form, or start it if its command line is the one that was checked and shown."""
        what = request.path_params["what"]
        if what not in ("check", "start"):
            raise HTTPException(404, "page not found")
        return await run_in_threadpool(self._run, await _form(request), is_check=what == "check")

    def new_program(self, request: Request) -> Response:
        """What a program that was started has written so far."""
        try:
            program = self._starting().programs.read(request.path_params["program"])
        except KeyError:
            raise HTTPException(404, "the server does not know this program any more") from None
        return self._unless_seen(request, self._text("_program", program=program), "text/html")

    def _run(self, form: Mapping[str, list[str]], *, is_check: bool) -> Response:
        new, asked = self._starting(), SweepForm.read(form)
        if problems := find_problems(asked, self._catalogue.roots):
            return self._render("_problems", problems=problems)
        try:
            plan = make_plan(asked, self._catalogue.roots, new.launcher, new.pool_dir)
        except OptionError as error:
            return self._render("_problems", problems=[str(error)])
        try:
            id = new.programs.check(plan) if is_check else _start(new.programs, form, plan)
        except KeyError:
            return self._render("_problems", problems=["the form has changed since it was checked: check it again"])
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            return self._render("_problems", problems=[f"it cannot be run: {what}"])
        return self._render("_program", program=new.programs.read(id))

    def _sweep_of(self, program: ProgramReading) -> str | None:
        """The id of the sweep that a program has started. None if the catalogue does not have it."""
        if program.sweep is None:
            return None
        id = id_of(program.sweep)
        with suppress(KeyError):
            return self._catalogue.sweep(id).id
        return None

    def _starting(self) -> NewSweeps:
        if self._new is None:
            raise HTTPException(404, "page not found")
        return self._new

    # How

    def _page(self, request: Request, name: str, **context: Any) -> Response:
        """Fill a template: all of it, or the part that changes if that is what the browser asks for."""
        where = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        if "hx-request" not in request.headers:
            return self._render(name, here=name, where=where, **context)
        return self._unless_seen(request, self._text(f"_{name}", here=name, where=where, **context), "text/html")

    def _unless_seen(self, request: Request, text: str, kind: str) -> Response:
        version = hashlib.sha256(text.encode()).hexdigest()[:16]
        if request.headers.get(SEEN) == version:
            return Response(status_code=204)
        return Response(text, media_type=kind, headers={SEEN: version})

    def _render(self, name: str, status: int = 200, **context: Any) -> Response:
        return Response(self._text(name, **context), status, media_type="text/html")

    def _text(self, name: str, **context: Any) -> str:
        return _encodable(self._templates.get_template(f"{name}.html").render(context))

    def problem(self, request: Request, error: Exception) -> Response:
        """The page of a request that has no answer."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = error.detail if isinstance(error, HTTPException) else "something is wrong here: the terminal says more"
        if "hx-request" in request.headers:
            return Response(one_line(said), status, media_type="text/plain")
        return self._render("problem", status, here="", said=said, code=status)

    def _sweep(self, request: Request) -> SweepReading:
        try:
            return self._catalogue.sweep(request.path_params["id"]).read()
        except KeyError:
            raise HTTPException(404, "sweep not found") from None
        except ManifestError as error:
            raise HTTPException(404, str(error)) from None

    def _job(self, request: Request) -> tuple[SweepReading, Entry]:
        sweep = self._sweep(request)
        number = read_digits(request.path_params["number"], MAX_NUMBER)
        if number is None:
            raise HTTPException(404, "job not found")
        while number not in sweep.manifest.entries and sweep.unread:
            sweep = self._sweep(request)
        if number not in sweep.manifest.entries:
            raise HTTPException(404, f"the sweep has no job {number}")
        return sweep, replace(sweep.manifest.entries[number])  # another request may read on, which changes the entry

    @staticmethod
    def _log_part(files: JobFiles, name: str | None, before: int | None, at: int | None) -> tuple[LogPart | None, str]:
        if name is not None:
            with suppress(OSError, HTTPException), _opened(files, (name,)) as descriptor:
                part = read_part(descriptor, at) if at is not None else read_part(descriptor, end=before)
                return part, str(os.fstat(descriptor).st_ino)
        return None, ""


def _start(programs: Programs, form: Mapping[str, list[str]], plan: Plan) -> str:
    """Start the sweep of a form, once for each check of it. Raises KeyError if it is not the one that was checked."""
    checked = (form.get("check") or [""])[0]
    if programs.read(checked).line != plan.line:
        raise KeyError(checked)
    return programs.start(checked)


class _opened:
    """A file of a job, open in a block. HTTPException if it cannot be opened."""

    def __init__(self, files: JobFiles, path: tuple[str, ...]) -> None:
        try:
            self._descriptor = files.open(path)
        except OSError:
            raise HTTPException(404, "file not found in the job's directory, or it is a link") from None

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)


def _copied(files: JobFiles, path: tuple[str, ...], size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, piece by piece. It is opened only if the answer is sent."""
    with open(files.open(path), "rb") as file:
        while size > 0 and (data := file.read(min(COPY_BYTES, size))):
            size -= len(data)
            yield data


async def _form(request: Request) -> Mapping[str, list[str]]:
    try:
        return parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=20)
    except ValueError:
        raise HTTPException(400, "the form has too many fields") from None


def _query(request: Request) -> Mapping[str, list[str]]:
    try:
        return parse_qs(request.url.query, max_num_fields=200)
    except ValueError:
        return {}


def _number(query: Mapping[str, list[str]], name: str) -> int | None:
    return read_digits((query.get(name) or [""])[0], MAX_POSITION)


def _encodable(text: str) -> str:
    """Escape lone surrogates. Names and messages in a manifest may have some, because JSON may."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _download(name: str) -> dict[str, str]:
    return {"content-disposition": f"attachment; filename*=utf-8''{quote(name, safe='', errors='replace')}"}
