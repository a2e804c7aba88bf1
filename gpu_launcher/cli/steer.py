"""The commands that steer a running sweep: `cancel`, `retry`, `stop`, `pause`, `continue`, `limit`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from gpu_launcher.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_launcher.jobs.control import Ranges
    from gpu_launcher.jobs.steering import Sweep


@click.command()
@options.job_numbers
@options.sweep_option
def cancel(jobs: tuple[str, ...], dir: str | None) -> None:
    """Cancel jobs of a running sweep.

    A job that runs gets SIGTERM, and SIGKILL after the sweep's grace; a job that waits is not started. Cancelled jobs
    are not retried. The other jobs continue.

    Exit code 1 if none of the jobs was cancelled, or if one of them does not exist.

    Examples:

    \b
      gpu-launcher cancel 7
      gpu-launcher cancel 7 9-12 --dir multirun/2026-11-21/09-00-00
    """
    numbers = read_jobs(jobs)
    _done(chosen(dir).cancel_ranges(numbers))


@click.command()
@click.argument("jobs", metavar="[JOB]...", nargs=-1)
@click.option("--failed", is_flag=True, help="Retry all jobs that have failed so far.")
@options.sweep_option
def retry(jobs: tuple[str, ...], failed: bool, dir: str | None) -> None:
    """Run failed or cancelled jobs of a running sweep again.

    They run again in the same sweep, before jobs that wait, and each ends in one result: that of its last attempt. A
    sweep that has ended is resumed instead.

    Exit code 1 if none of the jobs runs again, or if one of them does not exist.

    Examples:

    \b
      gpu-launcher retry 7 9-12
      gpu-launcher retry --failed --dir multirun/2026-11-21/09-00-00
    """
    from gpu_launcher.errors import UsageError

    if failed == bool(jobs):
        raise UsageError("give the numbers of jobs, or --failed")
    numbers = None if failed else read_jobs(jobs)
    _done(chosen(dir).retry_ranges(numbers))


@click.command()
@options.sweep_option
@click.option("--now", is_flag=True, help="Kill running jobs at once.")
def stop(dir: str | None, now: bool) -> None:
    """Stop a running sweep as Ctrl-C does.

    Running jobs are interrupted, and killed after the sweep's grace. Jobs that wait are not started. The sweep says how
    to run the rest.

    Examples:

    \b
      gpu-launcher stop
      gpu-launcher stop --dir multirun/2026-11-21/09-00-00
      gpu-launcher stop --now
    """
    _done(chosen(dir).stop(now=now))


@click.command()
@options.sweep_option
def pause(dir: str | None) -> None:
    """Start no more jobs of a running sweep until it is continued.

    Running jobs continue, and their devices go to other sweeps when they end.

    Examples:

    \b
      gpu-launcher pause
      gpu-launcher pause --dir multirun/2026-11-21/09-00-00
    """
    _done(chosen(dir).pause())


@click.command("continue")
@options.sweep_option
def continue_(dir: str | None) -> None:
    """Start jobs of a paused sweep again.

    Examples:

    \b
      gpu-launcher continue
      gpu-launcher continue --dir multirun/2026-11-21/09-00-00
    """
    _done(chosen(dir).resume())


@click.command()
@click.argument("devices", metavar="NUMBER")
@options.sweep_option
def limit(devices: str, dir: str | None) -> None:
    """Limit the devices that a running sweep uses.

    NUMBER is the number of devices that may be in use from now on, over all machines, or `none` for no limit. Running
    jobs continue. While more devices are in use, no job that needs one is started.

    Examples:

    \b
      gpu-launcher limit 4
      gpu-launcher limit none --dir multirun/2026-11-21/09-00-00
    """
    from gpu_launcher.errors import UsageError

    if devices != "none" and not re.fullmatch("0{0,9}[1-9][0-9]{0,8}", devices):
        hint = "; `gpu-launcher pause` starts no more jobs" if devices == "0" else ""
        raise UsageError(f"{devices!r} is not a number of devices: give a number such as 4, or none{hint}")
    _done(chosen(dir).limit(None if devices == "none" else int(devices)))


def chosen(directory: str | None) -> Sweep:
    """The sweep in this directory, or the one that `Sweep` chooses. Raises OptionError or SteeringError."""
    from gpu_launcher.jobs.steering import Sweep

    check_directory("--dir", directory)
    return Sweep(directory)


def read_jobs(texts: Sequence[str]) -> Ranges:
    """Read job numbers. Raises UsageError."""
    from gpu_launcher.errors import UsageError
    from gpu_launcher.jobs.control import read_ranges

    try:
        return read_ranges(texts)
    except ValueError as error:
        raise UsageError(str(error)) from None


def read_job(text: str) -> int:
    """Read the number of a single job. Raises UsageError."""
    from gpu_launcher.errors import UsageError
    from gpu_launcher.jobs.control import is_one

    jobs = read_jobs([text])
    if not is_one(jobs):
        raise UsageError(f"{text!r} names several jobs: give one")
    return jobs[0][0]


def check_directory(option: str, directory: str | None) -> None:
    """Raise OptionError if an option names no directory."""
    from gpu_launcher.errors import OptionError

    if directory == "":
        raise OptionError(option, "the name is empty: if it comes from a variable, is that set?")


def _done(line: str) -> None:
    from gpu_launcher.text import one_line

    print(one_line(line))  # the name of the directory may be another user's
