"""How to run the jobs of a sweep: its options, and what follows from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.machine import Limits
from gpu_launcher.model import MILLIONTHS, Request

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


def portable(options: Options) -> Options:
    """The same for a node, which may have another environment."""
    return replace(options, environ=dict(os.environ if options.environ is None else options.environ))


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
