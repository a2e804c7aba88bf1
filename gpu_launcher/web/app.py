"""The ASGI application: which view answers which URL."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from importlib.resources import files

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.web.catalogue import Catalogue
from gpu_launcher.web.dashboard import Dashboard
from gpu_launcher.web.gate import Asgi, Credentials, Gate
from gpu_launcher.web.pool_watch import SAMPLE_SECONDS, PoolWatch
from gpu_launcher.web.study_curves import StudyCurves
from gpu_launcher.web.views import NewSweeps, Views

KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".LICENSE": "text/plain"}
"""Media types of the files in `static/`, by the ends of their names."""


def create_app(
    pool: PoolWatch,
    catalogue: Catalogue,
    credentials: Credentials,
    *,
    new: NewSweeps | None,
    log: Callable[[str], None],
    at_end: Callable[[], None] = lambda: None,
) -> Asgi:
    """Make the application. `new` is None if it is read-only. `at_end` is called when the server ends."""
    views = Views(pool, catalogue, new)
    starting = (
        []
        if new is None
        else [
            Route("/new", views.new),
            Route("/new/programs/{program}", views.new_program),
            Route("/new/{what}", views.new_run, methods=["POST"]),
        ]
    )
    static, dashboard = _Static(), Dashboard(catalogue)
    job = "/sweeps/{id}/jobs/{number}"
    app = Starlette(
        routes=[
            Route("/", views.start),
            Route("/pool", views.pool),
            Route("/sweeps", views.sweeps),
            Route("/sweeps/{id}", views.sweep),
            Route("/sweeps/{id}/charts", views.sweep_charts),
            Route("/sweeps/{id}/reports", views.sweep_reports),
            Route("/sweeps/{id}/results.csv", views.sweep_csv),
            Route("/sweeps/{id}/{action}", views.action, methods=["POST"]),
            Route(job, views.job),
            Route(f"{job}/log", views.log_more),
            Route(f"{job}/log/search", views.log_search),
            Route(f"{job}/files/{{path:path}}", views.job_files),
            *dashboard.routes(),
            Route("/static/{name}", static.file),
            *starting,
        ],
        exception_handlers={HTTPException: views.problem, Exception: views.problem},
        lifespan=_lifespan(pool, (dashboard, views.curves), at_end),
    )
    return Gate(app, credentials, log)


def _lifespan(
    pool: PoolWatch, readers: Sequence[Dashboard | StudyCurves], at_end: Callable[[], None]
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sampling = asyncio.create_task(_sample(pool))
        try:
            yield
        finally:
            sampling.cancel()
            with suppress(asyncio.CancelledError):
                await sampling
            for reader in readers:
                await reader.close()
            pool.close()
            at_end()

    return lifespan


async def _sample(pool: PoolWatch) -> None:
    while True:
        with suppress(PoolDirectoryError):  # the page says so
            await run_in_threadpool(pool.sample)
        await asyncio.sleep(SAMPLE_SECONDS)


class _Static:
    """The scripts and styles of the pages, from the package."""

    def __init__(self) -> None:
        found = files("gpu_launcher.web").joinpath("static")
        self._files = {file.name: file.read_bytes() for file in found.iterdir() if file.is_file()}
        self._versions = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, data in self._files.items()}

    def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise HTTPException(404, "file not found")
        version = self._versions[name]
        headers = {"cache-control": "private, no-cache", "etag": version}
        if request.headers.get("if-none-match") == version:
            return Response(status_code=304, headers=headers)
        kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), "application/octet-stream")
        return Response(self._files[name], media_type=kind, headers=headers)
