"""Records in the manifest what happens to the jobs of a launch, and takes over what earlier launches finished."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_launcher.errors import ReportError
from gpu_launcher.jobs.alone import AloneCommand
from gpu_launcher.jobs.events import Event, JobEnded, JobRetried, JobReturned, JobStarted, Outcome
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST, launches_in, socket_of
from gpu_launcher.jobs.manifest import FORMAT, Entry, State, read
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.processes import rank_decisions
from gpu_launcher.safe_files import make_directories, open_regular, write_whole

MAX_PLANNED = 256
"""Maximum number of jobs in a line of the manifest. Readers ignore lines that are longer than `MAX_LINE`."""


class Recorder:
    """Records in the manifest what happens to the jobs of one launch."""

    def __init__(
        self,
        directory: Path,
        jobs: Sequence[Job],
        command: str,
        *,
        launch: str | None = None,
        how_to_resume: str = "",
        alone: AloneCommand | None = None,
        directions: Sequence[str] = (),
        objectives: Sequence[str] = (),
        anew: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Record that this launch is to run `jobs` of the sweep in `directory`.

        `directions` and `objectives` are as for `Manifest`. With `anew`, this launch begins a sweep: the jobs that the
        manifest has belong to an earlier one, and are left out from now on.

        `launch` is the id of the launch, by default a new one. `how_to_resume` is the command line that runs what this
        launch leaves, from the working directory. Empty if there is none. `alone` is the command line that runs one
        job of this launch alone, without what is the job's own. If nothing can be written, `warn` is called once, and
        the jobs run anyway.
        """
        self.directory = directory / DIRECTORY
        self._reports = new_reports(directory) if launch is None else ReportFiles(self.directory, launch)
        self._id = self._reports.launch
        self._warn: Callable[[str], None] | None = warn
        self._wall_clock = wall_clock
        self._attempts = {job.number: job.attempts_before for job in jobs}
        self._file = self.directory / f"launch-{self._id}.json"
        self._process = os.getpid()
        make_directories(self.directory)
        # Reports of earlier launches. They are removed when the job completes again. Jobs from a source have none:
        # their reports are discarded when they end.
        earlier_jobs = read(directory) if jobs or anew else {}
        self._old = {number: entry.report for number, entry in earlier_jobs.items() if entry.report}
        for earlier in launches_in(directory):
            if earlier.is_alive is False:
                with suppress(OSError):
                    for left in self.directory.glob(f"*.{earlier.id}.trial"):
                        rank_decisions.withdraw(left)
                    socket_of(earlier.file).unlink(missing_ok=True)
                    earlier.file.unlink()
        identity = json.dumps({**ProcessIdentity.here().to_json(), "command": command})
        try:
            write_whole(self._file, identity.encode())
        except OSError as error:
            self._complain(error)
        if anew and earlier_jobs:
            self._append(begins=True)
            for number in self._old.keys() - self._attempts.keys():
                with suppress(OSError):
                    self._old.pop(number).unlink()
        if how_to_resume:
            self._append(resume=how_to_resume, directory=str(Path.cwd()))
        if alone is not None:
            self._append(alone=alone.words, pool=alone.pool, directory=alone.directory)
        if directions:
            self._append(directions=list(directions), objectives=list(objectives))
        self._plan(jobs)

    @property
    def socket(self) -> str:
        """Name of the control socket's file in `directory`."""
        return socket_of(self._file).name

    def add(self, job: Job) -> None:
        """Record another job that is to run."""
        self._attempts[job.number] = job.attempts_before
        self._plan([job])

    def requeue(self, jobs: Sequence[Job], logs: Mapping[int, str | None]) -> None:
        """Record that these jobs, which had ended, are to run again. `logs` are those of their last attempts."""
        for first in range(0, len(jobs), MAX_PLANNED):
            some = jobs[first : first + MAX_PLANNED]
            self._append(again=[[job.number, logs[job.number]] for job in some])
        for job in jobs:
            self._attempts[job.number] = job.attempts_before
            self.discard_report(job.number)

    def describe(self, number: int, label: str, spec: Any) -> None:
        """Record the label and the parameters of a job that has chosen them since it was added."""
        self._append(described=number, label=label, spec=spec)

    def _plan(self, jobs: Sequence[Job]) -> None:
        for first in range(0, len(jobs), MAX_PLANNED):
            some = jobs[first : first + MAX_PLANNED]
            self._append(planned=[[job.number, job.label, job.spec, self._attempts[job.number]] for job in some])

    def report_path(self, number: int) -> Path:
        """Return the path of a job's report."""
        return self._reports.path(number)

    def discard_report(self, number: int) -> None:
        """Remove a job's report, because the source has received it, or because the job runs again."""
        with suppress(OSError):
            self.report_path(number).unlink()

    def handle(self, event: Event) -> None:
        """Record an event, unless it is of interest only while the jobs run."""
        if isinstance(event, JobStarted):
            self._attempts[event.number] += 1
            devices = [device.label for device in event.devices]
            attempts = self._attempts[event.number]
            node = {"node": event.devices[0].node} if event.devices and event.devices[0].node else {}
            self._append(started=event.number, attempts=attempts, devices=devices, log=event.log, pid=event.pid, **node)
        elif isinstance(event, JobRetried):
            self._attempts[event.number] = event.attempt - 1  # an attempt that never ran counts, too
            self._append(ended=event.number, outcome="failed", message=event.message, log=event.log, retried=True)
        elif isinstance(event, JobReturned):
            self._append(ended=event.number, outcome=State.WAITING.value)
        elif isinstance(event, JobEnded):
            outcome = event.outcome.value
            self._attempts.pop(event.number, None)
            known = {"left_behind": event.left_behind, **asdict(event.figures)}
            known = {name: what for name, what in known.items() if what}
            self._append(ended=event.number, outcome=outcome, message=event.message, log=event.log, **known)
            old = self._old.pop(event.number, None)
            if old is not None and event.outcome is Outcome.COMPLETED:
                with suppress(OSError):
                    old.unlink()

    def close(self) -> None:
        """Record that this launch is over."""
        if os.getpid() == self._process:
            with suppress(OSError):
                self._file.unlink()

    def _append(self, **event: Any) -> None:
        line = json.dumps({"format": FORMAT, "launch": self._id, "time": self._wall_clock(), **event})
        try:
            _append_line(self.directory / MANIFEST, line, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if self._warn is not None:
            self._warn(f"cannot write down how the jobs end, so that resuming would run them again: {error}")
            self._warn = None


def record_end(directory: Path, exit_code: int) -> None:
    """Record that the sweep in `directory` ended its program with this exit code.

    Does nothing if no sweep has begun, or if nothing can be written.
    """
    manifest = directory / DIRECTORY / MANIFEST
    line = json.dumps({"format": FORMAT, "time": time.time(), "exit_code": exit_code})
    with suppress(OSError):
        _append_line(manifest, line, os.O_WRONLY | os.O_APPEND)


def _append_line(manifest: Path, line: str, flags: int) -> None:
    """Append a line in one write. Raises OSError."""
    descriptor = open_regular(manifest, flags)
    try:
        # Begin a new line: the last one may be incomplete. Empty lines are ignored.
        data = f"\n{line}\n".encode()
        if os.write(descriptor, data) != len(data):
            raise OSError("no space left")
    finally:
        os.close(descriptor)


def new_reports(directory: Path) -> ReportFiles:
    """Return the files for the reports of a new launch of the sweep in `directory`."""
    return ReportFiles(directory / DIRECTORY, uuid.uuid4().hex[:12])


def finished_before(jobs: Sequence[Job], entries: Mapping[int, Entry]) -> tuple[dict[int, JobResult], dict[int, str]]:
    """Return the results of those `jobs` that completed in an earlier launch with the same overrides.

    The second value says why existing results are not used, by job number.
    """
    found, skipped = {}, {}
    for job in jobs:
        entry = entries.get(job.number)
        if entry is None or entry.spec != job.spec or entry.state is not State.COMPLETED or entry.report is None:
            continue
        try:
            report = read_report(entry.report)
        except FileNotFoundError:
            continue
        except ReportError as error:
            skipped[job.number] = str(error)
            continue
        if not report.ok:
            continue
        ran = entry.ended - entry.started if entry.ended and entry.started else None
        found[job.number] = JobResult(
            job.number, job.label, Outcome.COMPLETED, report.payload, None, (), ran, entry.log, attempts=entry.attempts
        )
    return found, skipped
