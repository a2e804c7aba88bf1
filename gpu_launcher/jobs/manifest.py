"""The manifest: the record of a sweep's jobs in its directory, from which the sweep can be resumed and inspected.

    <sweep directory>/.gpu_launcher/
        lock                  locked by all processes of the launch that runs jobs here (`jobs.directory`)
        manifest.jsonl        one line per event, each appended in one write; an incomplete line is ignored
        launch-<id>.json      names the program that runs jobs here; removed at the end
        <number>.<id>.report  the report of a job of that launch

A job writes its report itself, so a finished job is known to have finished even if the head or the node is killed. The
format is private to gpu-launcher: read it with `gpu-launcher jobs DIR --json`.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from gpu_launcher.errors import ManifestError, ReportError
from gpu_launcher.jobs.events import Event, JobEnded, JobRetried, JobReturned, JobStarted, Outcome, Progress
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.progress.alike import Failures
from gpu_launcher.jobs.reports import ReportFiles, read_header, read_report
from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.processes import rank_decisions
from gpu_launcher.safe_files import make_directories, open_regular, read_lines, write_whole
from gpu_launcher.text import one_line

FORMAT = 1
MAX_LAUNCH_BYTES = 2**20
"""Maximum number of bytes read from a file that names a launch's program."""
DIRECTORY = ".gpu_launcher"
MANIFEST = "manifest.jsonl"
MAX_FAILED = 10
"""Maximum number of failed jobs that are kept, one for each way of failing."""


class State(str, Enum):
    """The state of a job, as the manifest knows it."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PRUNED = "pruned"
    LOST = "lost"
    """The job was running or waiting when its launch died."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One job, as its latest launch left it."""

    number: int
    label: str
    spec: Any
    launch: str
    state: State = State.WAITING
    attempts: int = 0
    """Number of times it was started, over all launches."""
    devices: tuple[str, ...] = ()
    """Labels of the devices that its last attempt had."""
    started: float | None = None
    """When it was started, in wall-clock seconds since the epoch."""
    ended: float | None = None
    message: str | None = None
    """Why it failed."""
    log: str | None = None
    report: Path | None = None
    """File of its report, if there is one."""
    pid: int | None = None
    """Process id of its main process, while it runs."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that has not recorded its end."""

    id: str
    file: Path
    pid: int
    host: str
    command: str
    is_alive: bool | None
    """Whether its program is alive. None if that cannot be known from here."""


class Recorder:
    """Records in the manifest what happens to the jobs of one launch."""

    def __init__(
        self,
        directory: Path,
        jobs: Sequence[Job],
        command: str,
        *,
        launch: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Record that this launch is to run `jobs` of the sweep in `directory`.

        `launch` is the id of the launch, by default a new one. If nothing can be written, `warn` is called once, and
        the jobs run anyway.
        """
        self.directory = directory / DIRECTORY
        self._reports = new_reports(directory) if launch is None else ReportFiles(self.directory, launch)
        self._id = self._reports.launch
        self._warn: Callable[[str], None] | None = warn
        self._wall_clock = wall_clock
        self._attempts = {job.number: job.attempts_before for job in jobs}
        self._jobs = {job.number: job for job in jobs}
        self._failures = Failures()
        self.failed: list[Job] = []
        """Jobs that failed, one for each way of failing."""
        self.incomplete = 0
        """Number of jobs that failed or were cancelled."""
        self._file = self.directory / f"launch-{self._id}.json"
        self._process = os.getpid()
        make_directories(self.directory)
        # Reports of earlier launches. They are removed when the job completes again. Jobs from a source have none:
        # their reports are discarded when they end.
        self._old = {number: entry.report for number, entry in read(directory).items() if entry.report} if jobs else {}
        for earlier in launches_in(directory):
            if earlier.is_alive is False:
                with suppress(OSError):
                    for left in self.directory.glob(f"*.{earlier.id}.trial"):
                        rank_decisions.withdraw(left)
                    earlier.file.unlink()
        identity = json.dumps({**ProcessIdentity.here().to_json(), "command": command})
        try:
            write_whole(self._file, identity.encode())
        except OSError as error:
            self._complain(error)
        self._plan(jobs)

    def add(self, job: Job) -> None:
        """Record another job that is to run."""
        self._attempts[job.number] = job.attempts_before
        self._jobs[job.number] = job
        self._plan([job])

    def _plan(self, jobs: Sequence[Job]) -> None:
        if jobs:
            planned = [[job.number, job.label, job.spec, self._attempts[job.number]] for job in jobs]
            self._append(planned=planned)

    def report_path(self, number: int) -> Path:
        """Return the path of a job's report."""
        return self._reports.path(number)

    def discard_report(self, number: int) -> None:
        """Remove a job's report after the source has received it."""
        with suppress(OSError):
            self.report_path(number).unlink()

    def handle(self, event: Event) -> None:
        """Record an event, unless it is of interest only while the jobs run."""
        if isinstance(event, JobStarted):
            self._attempts[event.number] += 1
            devices = [device.label for device in event.devices]
            attempts = self._attempts[event.number]
            self._append(started=event.number, attempts=attempts, devices=devices, log=event.log, pid=event.pid)
        elif isinstance(event, JobRetried):
            self._attempts[event.number] = event.attempt - 1  # an attempt that never ran counts, too
            self._append(ended=event.number, outcome="failed", message=event.message, log=event.log)
        elif isinstance(event, JobReturned):
            self._append(ended=event.number, outcome=State.WAITING.value)
        elif isinstance(event, JobEnded):
            outcome = event.outcome.value
            self._attempts.pop(event.number, None)
            job = self._jobs.pop(event.number, None)
            self.incomplete += event.outcome in (Outcome.FAILED, Outcome.CANCELLED)
            new = event.outcome is Outcome.FAILED and self._failures.add(event) is None
            if new and job is not None and len(self.failed) < MAX_FAILED:
                self.failed.append(job)
            left = {"left_behind": event.left_behind} if event.left_behind else {}
            self._append(ended=event.number, outcome=outcome, message=event.message, log=event.log, **left)
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
            descriptor = open_regular(self.directory / MANIFEST, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                # Begin a new line: the last one may be incomplete. Empty lines are ignored.
                data = f"\n{line}\n".encode()
                if os.write(descriptor, data) != len(data):
                    raise OSError("no space left")
            finally:
                os.close(descriptor)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if self._warn is not None:
            self._warn(f"cannot write down how the jobs end, so that resuming would run them again: {error}")
            self._warn = None


def new_reports(directory: Path) -> ReportFiles:
    """Return the files for the reports of a new launch of the sweep in `directory`."""
    return ReportFiles(directory / DIRECTORY, uuid.uuid4().hex[:12])


class Recorded:
    """A progress display that records each event before it passes the event on."""

    def __init__(self, recorder: Recorder, display: Progress) -> None:
        self._recorder = recorder
        self._display = display
        self.tick = display.tick
        self.close = display.close

    def handle(self, event: Event) -> None:
        """See `Progress`."""
        self._recorder.handle(event)
        self._display.handle(event)


def read(directory: Path) -> dict[int, Entry]:
    """Read the jobs of the sweep in `directory`, by number. Empty if there is no manifest.

    Raises ManifestError if a newer version wrote the manifest or if it cannot be read, and NotADirectoryError.
    """
    home = directory / DIRECTORY
    launches = {launch.id: launch for launch in launches_in(directory)}
    entries: dict[int, Entry] = {}
    for event in _events(home / MANIFEST):
        with suppress(ValueError):
            _take(event, entries)
    for number, entry in entries.items():
        report = ReportFiles(home, entry.launch).path(number)
        entry = replace(entry, report=report if os.path.lexists(report) else None)
        over = entry.launch not in launches or launches[entry.launch].is_alive is False
        if over and entry.state in (State.WAITING, State.RUNNING):
            entry = replace(entry, state=State.LOST, pid=None)
            if entry.report is not None and (found := read_header(entry.report)) is not None:
                entry = replace(entry, state=State.COMPLETED if found.ok else State.FAILED, message=found.message)
        entries[number] = entry
    return dict(sorted(entries.items()))


def launches_in(directory: Path) -> list[Launch]:
    """Return the launches in `directory` that have not recorded their end."""
    found = []
    for file in sorted((directory / DIRECTORY).glob("launch-*.json")):
        try:
            with open(open_regular(file), "rb") as opened:
                owner = os.fstat(opened.fileno()).st_uid
                content = load_object(opened.read(MAX_LAUNCH_BYTES))
            identity = ProcessIdentity.from_json(content)
            command = one_line(Fields(content).text("command"))
        except (OSError, ValueError):
            continue  # not written by a launch
        id = file.stem.removeprefix("launch-")
        found.append(Launch(id, file, identity.pid, identity.host, command, identity.is_alive(owner)))
    return found


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


def devices_of(directory: Path, numbers: Container[int]) -> dict[int, tuple[str, ...]]:
    """Return the labels of the devices of these jobs' last attempts, by job number. Omits jobs without devices."""
    return {number: entry.devices for number, entry in read(directory).items() if number in numbers and entry.devices}


def refuse_if_running(directory: Path, remedy: str) -> None:
    """Raise ManifestError if another program runs jobs in this directory, or may do so. `remedy` says what to do."""
    for launch in launches_in(directory):
        who = f"process {launch.pid} ({launch.command})"
        if launch.is_alive:
            raise ManifestError(f"{directory} is being run by {who}: {remedy}")
        if launch.is_alive is None:
            raise ManifestError(
                f"{directory} may still be run by {who} of {launch.host}, which cannot be seen from here: "
                f"if it has ended, remove {launch.file}"
            )


def _events(manifest: Path) -> Iterator[dict[str, Any]]:
    try:
        for line in read_lines(manifest):
            try:
                event = load_object(line)
                version = Fields(event).integer("format")
            except ValueError:
                continue  # empty or incomplete
            if version > FORMAT:
                raise ManifestError(f"{manifest} was written by a newer version of gpu-launcher: use that")
            yield event
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise
    except OSError as error:
        raise ManifestError(f"{manifest} cannot be read: {error.strerror}") from error


def _take(event: dict[str, Any], entries: dict[int, Entry]) -> None:
    """Apply an event to `entries`. Raises ValueError for an event that no version writes."""
    fields = Fields(event)
    launch, time = fields.text("launch", limit=64), fields.time("time")
    if not launch.isalnum():  # it becomes part of a file name
        raise ValueError("launch is not an id")
    if "planned" in fields:
        for job in event["planned"] if isinstance(event["planned"], list) else ():
            _plan(job, launch, entries)
        return
    started = "started" in fields
    number = fields.integer("started" if started else "ended")
    entry = entries.get(number)
    if entry is None or entry.launch != launch:
        return  # from a launch that a later one has superseded
    log = fields.text_or_none("log")
    if started:
        entries[number] = replace(
            entry,
            state=State.RUNNING,
            attempts=fields.integer("attempts"),
            devices=fields.texts("devices"),
            started=time,
            ended=None,
            message=None,
            log=log,
            pid=fields.integer("pid") if event.get("pid") is not None else None,
        )
    else:
        state = State(fields.text("outcome"))
        message = fields.text_or_none("message")
        entry = replace(entry, state=state, ended=time, message=message, log=log or entry.log, pid=None)
        if state is State.WAITING:  # its node was lost
            entry = replace(entry, started=None, ended=None, devices=())
        entries[number] = entry


def _plan(job: object, launch: str, entries: dict[int, Entry]) -> None:
    if not isinstance(job, list) or len(job) != 4:
        raise ValueError("a planned job is not a list of four")
    fields = Fields({"number": job[0], "label": job[1], "attempts": job[3]})
    number = fields.integer("number")
    before = entries.get(number)
    entries[number] = Entry(
        number,
        one_line(fields.text("label")),
        job[2],
        launch,
        attempts=fields.integer("attempts"),
        log=before.log if before else None,
    )
