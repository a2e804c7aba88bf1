"""What to do about failed jobs: retry them, with more memory if that ran out, or end the sweep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.jobs.job import Cause, JobResult
from gpu_launcher.model import MILLIONTHS, Device, Request, Share

if TYPE_CHECKING:
    from gpu_launcher.jobs.job_record import JobRun

_ASIDE = ".attempt-"


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What the user wants done about failed jobs. The default: no retries, and the other jobs continue."""

    retries: int = 0
    """How many times a job is retried."""
    retry_on: frozenset[Cause] = frozenset(Cause) - {Cause.EXCEPTION}
    most: int | None = None
    """How many jobs may have failed when the sweep is ended; None for any number."""


class RetryState:
    """The attempts of one job: which one is the latest, whether there is another, and what that needs."""

    def __init__(self, policy: FailurePolicy, before: int) -> None:
        """`before`: how many attempts the job made in earlier launches."""
        self.policy = policy
        """The sweep's, unless the job has its own."""
        self._before = before
        self.attempt = before + 1
        """The attempt that runs or is the next to run, counted from 1."""
        self._share: Share | None = None
        """What to ask for instead of the job's own share, which was not enough."""
        self.latest_failure: JobResult | None = None
        """How the attempt before this one ended."""

    def request(self, request: Request) -> Request:
        """What the job is to have: its own `request`, or more if that was not enough before."""
        return request if self._share is None else replace(request, share=self._share)

    def next(self, result: JobResult, run: JobRun, refusal: Callable[[Request], str | None]) -> NextAttempt | None:
        """The next attempt of a job that failed; None if it is not retried.

        `refusal` says why the devices that work could never grant a request.
        """
        made = result.attempts - self._before
        if result.cause not in self.policy.retry_on or made > self.policy.retries or run.final:
            return None
        if run.started is None and result.cause is Cause.EXCEPTION:
            return None  # its config does not compose, and will not
        request, more_memory = run.request, False
        if request is not None and run.devices:
            if result.cause is Cause.OOM and result.payload is not None:
                share = larger_share(request.share, run.devices, run.shares)
                if share is None:
                    return None
                request = replace(request, share=share)
                more_memory = True
            if refusal(request) is not None:
                return None
            if more_memory:
                self._share = request.share
        self.attempt += 1
        self.latest_failure = result
        return NextAttempt(self.attempt, self._before + self.policy.retries + 1, more_memory)


@dataclass(frozen=True, slots=True)
class NextAttempt:
    """The attempt of a job that follows one that failed."""

    number: int
    """Counted from 1."""
    limit: int
    """How many there may be."""
    last: bool
    """Whether it runs after the sweep's other jobs, because it may wait long for the memory that it needs."""


def larger_share(share: Share, devices: Sequence[Device], shares: Mapping[str, Share]) -> Share | None:
    """What to ask for after the memory of `devices`, of which the job had `shares`, ran out.

    The whole device if other jobs could use it, too; otherwise a device with more memory. None if a device does not
    say how much memory it has.
    """
    if not all(shares[device.uuid].whole for device in devices):
        return Share(MILLIONTHS, share.memory)
    if any(device.memory is None for device in devices):
        return None
    return Share(MILLIONTHS, max(device.memory or 0 for device in devices) + 1)


def set_aside(log: str, attempt: int) -> str:
    """Rename the log of an attempt to a name of its own, such as `job.attempt-1.log`; return its new path.

    If the file system refuses, the log stays where it is, and nothing else fails.
    """
    path = Path(log)
    if _ASIDE in path.stem:
        return log  # it was set aside before
    for copy in itertools.count(1):
        name = f"{path.stem}{_ASIDE}{attempt}" + (f"-{copy}" if copy > 1 else "")
        aside = path.with_name(f"{name}{path.suffix}")
        try:
            if aside.exists():
                continue  # of an earlier sweep in the same directory
            path.rename(aside)
        except OSError:
            return log
        return str(aside)
    raise AssertionError("there are more names than files")
