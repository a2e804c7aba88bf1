"""One launch, from options to results: puts the fork server, the pool, the display and the loop together."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals

from gpu_launcher.devices import ConditionMonitor, Links, NvmlProbe, combinable, select_devices, usable_cpus
from gpu_launcher.errors import OptionError, RequestError
from gpu_launcher.jobs.events import Notice, SweepEnded, SweepStarted
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.grants import Telling
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.loop import JobLoop
from gpu_launcher.jobs.machine import Limits
from gpu_launcher.jobs.progress import open_progress
from gpu_launcher.jobs.watch import DeviceWatch
from gpu_launcher.leases import FileLedger, refusal, resolve_pool_directory
from gpu_launcher.model import MILLIONTHS, Device, DeviceKind, Owner, Request
from gpu_launcher.processes.starter import ForkServer
from gpu_launcher.users import user_name

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
    telling: Telling
    failures: FailurePolicy = FailurePolicy()  # noqa: RUF009  (frozen)


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What came of a sweep."""

    results: list[JobResult]
    """In the order of the jobs."""
    stopped_by: Signals | None
    """The signal with which the user stopped the sweep, if so."""


def run_jobs(jobs: Sequence[Job], server: ForkServer, options: Options, directory: Path, command: str) -> SweepResult:
    """Run `jobs` on the machine's pool and show how it goes on stderr.

    `directory` keeps files while the jobs run, `command` names this program to others who wait for devices.
    Raises OptionError and PoolDirectoryError before any job is started.
    """
    selection = select_devices(options.devices, os.environ)
    devices = selection.devices
    if options.request is not None:
        _check(options.request, devices)
    user = user_name(os.getuid())
    with contextlib.ExitStack() as cleanup:
        progress = open_progress()
        cleanup.callback(progress.close)
        ledger = cleanup.enter_context(
            FileLedger(
                resolve_pool_directory(options.pool_dir),
                warn=lambda text: progress.handle(Notice(time.monotonic(), text)),
            )
        )
        results_directory = Path(cleanup.enter_context(_scratch(directory)))
        now = time.monotonic()
        progress.handle(SweepStarted(now, len(jobs), devices, options.max_parallel))
        for text in _notices(selection.notices, server):
            progress.handle(Notice(now, text))
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
            jobs,
            devices=devices,
            limits=limits(options, len(devices), usable_cpus()),
            server=server,
            ledger=ledger,
            progress=progress,
            clock=time.monotonic,
            results_directory=results_directory,
            owner=lambda job: Owner(os.getpid(), user, f"{command} #{job.number} {job.label}".rstrip()),
            watch=watch,
            telling=replace(options.telling, by_uuid=options.telling.by_uuid or selection.by_uuid),
            failures=options.failures,
        )
        results = loop.run()
        progress.handle(SweepEnded(time.monotonic()))
        return SweepResult(results, loop.signals.last if loop.stopped else None)


def limits(options: Options, devices: int, cpus: int) -> Limits:
    """How much may happen at once with so many devices and CPUs."""
    at_once = _at_once(options.request, devices, cpus)
    return Limits(
        parallel=options.max_parallel,
        without_devices=options.max_parallel or cpus,
        ahead=max(1, min(at_once, options.max_parallel or at_once, MOST_AHEAD)),
        preparing=cpus,
        grace=options.grace,
    )


def _at_once(request: Request | None, devices: int, cpus: int) -> int:
    """How many jobs could get devices at the same time; a guess where that depends on the job or on the memory."""
    if request is None:
        return devices
    if request.gpus == 0:
        return cpus
    share = request.share.millionths
    return devices // request.gpus * (MILLIONTHS // share) if share else devices * MOST_AHEAD


def _check(request: Request, devices: tuple[Device, ...]) -> None:
    """Refuse at once what no job could ever get."""
    try:
        problem = refusal(request, combinable(devices, request.gpus))
    except RequestError as error:
        raise OptionError("hydra.launcher.gpus", str(error)) from error
    if problem is not None:
        labels = ", ".join(device.label for device in devices)
        raise OptionError("hydra.launcher.gpus", f"every job's request is {problem}. This sweep has: {labels}")


def _links(request: Request | None, devices: tuple[Device, ...]) -> Links | None:
    """How GPUs are connected, where a job may get several."""
    real = tuple(device for device in devices if device.kind is DeviceKind.GPU)
    if len(real) < 2 or (request is not None and request.gpus < 2):
        return None
    return NvmlProbe().links(real)


def _notices(from_selection: Sequence[str], server: ForkServer) -> list[str]:
    notices = list(from_selection)
    if server.method == "spawn":
        notices.append(f"jobs start in fresh interpreters (spawn): {server.reason}")
    return notices


def _scratch(directory: Path) -> tempfile.TemporaryDirectory[str]:
    """A directory of this launch alone: another launch in the same sweep directory may still be running."""
    return tempfile.TemporaryDirectory(prefix=".gpu_launcher-", dir=directory, ignore_cleanup_errors=True)
