"""What the jobs of a search report, read by a process of its own: see `study_process.py`."""

from __future__ import annotations

import json
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from gpu_launcher.errors import StorageError
from gpu_launcher.studies.report_curves import Curve, study_file
from gpu_launcher.web.study_process import StudyProcess, UnavailableError

READING_SECONDS = 10.0
"""Seconds after which a reading is given up. The work that a reading causes is limited to about a second."""
MAX_PENDING = 32
"""Maximum number of pages that wait for a reading."""


class StudyCurves:
    """Reads curves for all pages."""

    def __init__(self) -> None:
        module = "gpu_launcher.web.curves_process"
        self._process = StudyProcess("the study's reader", module, seconds=READING_SECONDS, pending=MAX_PENDING)

    async def read(self, directory: Path) -> tuple[list[Curve], bool]:
        """Return what `read_curves` does. Raises StorageError."""
        file = await run_in_threadpool(study_file, directory)
        if file is None:
            return [], False
        try:
            head, body = await self._process.ask({"directory": str(directory.absolute())})
        except UnavailableError as error:
            raise StorageError(str(file), str(error)) from None
        if head["problem"] is not None:
            raise StorageError(str(file), head["problem"])
        curves, has_more = json.loads(body)
        return [Curve(number, tuple((step, value) for step, value in points)) for number, points in curves], has_more

    async def close(self) -> None:
        await self._process.close()
