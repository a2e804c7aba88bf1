"""The options of a sweep, and the limits that follow from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.machine import Limits
from gpu_launcher.model import MILLIONTHS, Request

MAX_PREPARED_JOBS = 8
"""Maximum number of prepared jobs that wait for devices. More would cost memory and save no time."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options for running the jobs of a sweep. The caller has validated them."""

    devices: object
    """The devices, as `gpu_launcher.devices.select_devices` takes them."""
    request: Request | None
    """Request of every job. None if each job states its own."""
    max_parallel: int | None
    """Cap on running jobs. None for as many as the devices allow."""
    grace: float
    """Seconds between SIGINT and SIGKILL."""
    pool_dir: str | None
    """The pool directory. None: the machine's."""
    busy_memory: int | None
    """Limit on memory in use, as `gpu_launcher.devices.why_busy` takes it."""
    device_environment: DeviceEnvironment
    failures: FailurePolicy = FailurePolicy()  # noqa: RUF009  (frozen)
    directions: tuple[str, ...] = ()
    """For each value that jobs return, whether `minimize` or `maximize` finds the best. Empty if that is not known."""
    objectives: tuple[str, ...] = ()
    """The names of the values that `directions` are about. Empty if jobs may call their one value as they like."""
    resume: bool = False
    """Whether to leave out the jobs that completed in an earlier launch."""
    spell: Callable[[str], str] = str
    """Maps an option's name to the user's spelling, such as `devices` to `--devices`."""
    cap: str | None = None
    """The name of `max_parallel` in a notice that it leaves devices idle. None: no notice."""
    environ: Mapping[str, str] | None = None
    """Environment whose mask makes GPUs visible. None: the head's own when the run begins."""


def portable(options: Options) -> Options:
    """Fix the environment in the options before they are sent to a node."""
    return replace(options, environ=dict(os.environ if options.environ is None else options.environ))


def limits(options: Options, devices: int, cpus: int) -> Limits:
    """Compute the limits on simultaneous work for this number of devices and CPUs."""
    at_once = _at_once(options.request, devices, options.max_parallel or cpus)
    return Limits(
        parallel=options.max_parallel,
        without_devices=options.max_parallel or cpus,
        ahead=max(1, min(at_once, options.max_parallel or at_once, MAX_PREPARED_JOBS)),
        preparing=cpus,
        grace=options.grace,
        at_once=max(1, min(at_once, options.max_parallel or at_once)),
    )


def _at_once(request: Request | None, devices: int, without_devices: int) -> int:
    """Estimate how many jobs can run at the same time."""
    if request is None:
        return devices
    if request.gpus == 0:
        return without_devices
    share = request.share.millionths
    return devices // request.gpus * (MILLIONTHS // share) if share else devices * MAX_PREPARED_JOBS
