"""One launch, from options to results: puts the fork server, the pool, the display and the loop together."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from gpu_launcher.allocation.device_watch import DeviceWatch, links_among
from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.allocation.feasibility import refuse
from gpu_launcher.devices import ConditionMonitor, Links, select_devices, usable_cpus
from gpu_launcher.jobs.directory import LogFiles, as_proposed
from gpu_launcher.jobs.events import Notice, Progress, SweepEnded, SweepStarted
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.loop import JobLoop
from gpu_launcher.jobs.machine import Limits
from gpu_launcher.jobs.manifest import Entry, Planned, Recorded, Recorder, finished_before, read
from gpu_launcher.jobs.progress import open_progress
from gpu_launcher.jobs.source import JobSource
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from gpu_launcher.model import MILLIONTHS, Device, Request
from gpu_launcher.processes.fork_server_client import ForkServer
from gpu_launcher.text import one_line
from gpu_launcher.users import this_process
from gpu_launcher.wording import count

MAX_SKIPPED = 5
"""Results of earlier launches that are not used, of which the reason is told."""
MOST_AHEAD = 8
"""Jobs that wait, prepared, for devices. More would cost memory and save nothing."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to run the jobs of a sweep. Validated by whoever makes them."""

    devices: object
    """As `gpu_launcher.devices.select_devices` takes it."""
    request: Request | None
    """What every job needs; None if each says so for itself."""
    max_parallel: int | None
    """Cap on running jobs; None for as many as get devices."""
    grace: float
    """Seconds between SIGINT and SIGKILL."""
    pool_dir: str | None
    """Another pool directory than the machine's."""
    busy_memory: int | None
    """As `gpu_launcher.devices.why_busy` takes it."""
    device_environment: DeviceEnvironment
    failures: FailurePolicy = FailurePolicy()  # noqa: RUF009  (frozen)
    resume: bool = False
    """Leave out the jobs that completed in an earlier launch."""
    spell: Callable[[str], str] = str
    """What the user writes for an option of that name, such as `--devices` for `devices`."""
    cap: str | None = None
    """The name of `max_parallel` in a notice that it leaves devices idle; None: no notice."""
    environ: Mapping[str, str] | None = None
    """By whose mask GPUs are visible; None: by that of this process when the jobs are run."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What came of a sweep."""

    results: list[JobResult]
    """In the order of the jobs."""
    stopped_by: Signals | None
    """The signal with which the user stopped the sweep, if so."""
    stopped: bool = False
    """Whether it was stopped, by that or by failures."""


def run_jobs(
    jobs: Sequence[Job],
    server: ForkServer,
    options: Options,
    directory: Path,
    command: str,
    *,
    source: JobSource | None = None,
    total: int | None = None,
    display: Progress | None = None,
    recorded: bool = True,
    program: int | None = None,
    logs: LogFiles | None = None,
    notices: Sequence[str] = (),
    closing: Callable[[Sequence[Job], int], Sequence[str]] = lambda failed, incomplete: (),
) -> SweepResult:
    """Run `jobs` on the machine's pool and show how it goes, on stderr if there is no `display`, which is closed.

    `directory` is the sweep's, and keeps what is known of its jobs; `command` names this program to others who wait for
    devices. With a `source` its jobs are run, too, `total` in all if that is known, and it alone gets what became of
    them; `program` is the process for which they are run if that is not this one; `logs` has a say in where jobs
    log, `notices` are told first, and what is `closing` last, which is given a job for each way in which jobs failed
    and the number of those that did not complete. If they are not to be `recorded`, there is nothing to resume, and
    `directory` gets no more than their reports. Raises OptionError, PoolDirectoryError and ManifestError before any job
    is started.
    """
    selection = select_devices(options.devices, _environ(options), option=options.spell("devices"))
    devices = selection.devices
    if options.request is not None:
        refuse(options.request, devices, options.spell)
    before: dict[int, Entry] = {}
    finished: dict[int, JobResult] = {}
    skipped: dict[int, str] = {}
    if options.resume:
        before = read(directory)
        finished, skipped = finished_before(jobs, before)
    left = [job for job in jobs if job.number not in finished]
    attempts = {job.number: entry.attempts for job in left if (entry := before.get(job.number)) and entry.attempts}
    with contextlib.ExitStack() as cleanup:
        progress = display or open_progress()
        cleanup.callback(progress.close)

        def notice(text: str) -> None:
            progress.handle(Notice(time.monotonic(), text))

        ledger = cleanup.enter_context(FileLedger(resolve_pool_directory(options.pool_dir), warn=notice))
        report_path, shown, watched = _report_in(directory), progress, source
        if recorded:
            recorder = Recorder(directory, left, command, attempts=attempts, warn=notice)
            cleanup.callback(recorder.close)
            report_path, shown = recorder.report_path, Recorded(recorder, progress)
            watched = source if source is None else Planned(source, recorder)
        expected = len(left) if source is None else total
        progress.handle(SweepStarted(time.monotonic(), expected, devices, options.max_parallel))
        if before:
            notice(f"resumed: {len(finished)} of {count(len(jobs), 'job')} completed before, and not run again")
        for number, why in list(skipped.items())[:MAX_SKIPPED]:
            notice(f"job {number} is run again, because its earlier result is not used: {why}")
        if len(skipped) > MAX_SKIPPED:
            notice(f"{count(len(skipped) - MAX_SKIPPED, 'more job')} are run again for such reasons")
        needs_none = options.request is not None and options.request.gpus == 0
        for text in [*notices, *(() if needs_none else selection.notices), *server.notices]:
            notice(text)
        watch = DeviceWatch(
            devices,
            ledger.snapshot,
            launcher=os.getpid(),
            monitor=ConditionMonitor(devices),
            busy_memory=options.busy_memory,
            links=_links(options.request, devices),
        )
        cleanup.callback(watch.close)
        loop = JobLoop(
            left,
            devices=devices,
            limits=limits(options, len(devices), usable_cpus()),
            server=server,
            ledger=ledger,
            progress=shown,
            clock=time.monotonic,
            report_path=report_path,
            log_file=as_proposed if logs is None else logs.claim,
            owner=lambda job: this_process(f"{command} #{job.number} {job.label}".rstrip()),
            title=lambda job: one_line(f"#{job.number} {command} {job.label}".rstrip()),
            watch=watch,
            device_environment=options.device_environment,
            by_uuid=selection.by_uuid,
            failures=options.failures,
            attempts=attempts,
            source=watched,
            program=program,
            cap=options.cap,
        )
        results = {**finished, **{result.number: result for result in loop.run()}}
        last = closing(recorder.failed, recorder.incomplete) if recorded else ()
        progress.handle(SweepEnded(time.monotonic(), tuple(last)))
        in_order = [results[number] for number in _order(jobs, results)]
        return SweepResult(in_order, loop.signals.last if loop.stopped else None, loop.stopped)


def _environ(options: Options) -> Mapping[str, str]:
    return os.environ if options.environ is None else options.environ


def _report_in(directory: Path) -> Callable[[int], Path]:
    return lambda number: directory / f"{number}.report"


def _order(jobs: Sequence[Job], results: Mapping[int, JobResult]) -> list[int]:
    """As given, and then as they arrived."""
    given = dict.fromkeys(job.number for job in jobs)
    return list({**given, **dict.fromkeys(results)})


def limits(options: Options, devices: int, cpus: int) -> Limits:
    """How much may happen at once with so many devices and CPUs."""
    at_once = _at_once(options.request, devices, options.max_parallel or cpus)
    return Limits(
        parallel=options.max_parallel,
        without_devices=options.max_parallel or cpus,
        ahead=max(1, min(at_once, options.max_parallel or at_once, MOST_AHEAD)),
        preparing=cpus,
        grace=options.grace,
        at_once=max(1, min(at_once, options.max_parallel or at_once)),
    )


def _at_once(request: Request | None, devices: int, without_devices: int) -> int:
    """How many jobs could run at the same time; a guess where that depends on the job or on the memory."""
    if request is None:
        return devices
    if request.gpus == 0:
        return without_devices
    share = request.share.millionths
    return devices // request.gpus * (MILLIONTHS // share) if share else devices * MOST_AHEAD


def _links(request: Request | None, devices: tuple[Device, ...]) -> Links | None:
    """How GPUs are connected, where a job may get several."""
    return None if request is not None and request.gpus < 2 else links_among(devices)
