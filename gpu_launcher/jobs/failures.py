"""Decisions about failed jobs: whether to retry them, with more memory if that ran out, or to end the sweep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.jobs.job import Cause, JobResult
from gpu_launcher.model import MILLIONTHS, Device, Request, Share
from gpu_launcher.wording import count

if TYPE_CHECKING:
    from gpu_launcher.jobs.job_record import JobRun

_ASIDE = ".attempt-"


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """The user's options for failed jobs. Default: no retries, and the other jobs continue."""

    retries: int = 0
    """Maximum number of retries of a job."""
    retry_on: frozenset[Cause] = frozenset(Cause) - {Cause.EXCEPTION}
    """Causes of failure after which a job is retried."""
    most: int | None = None
    """Number of failed jobs at which the sweep is stopped. None: it is never stopped for that reason."""


class FailureCount:
    """How many jobs of a run have failed, and whether the run is stopped because of that."""

    def __init__(self, limit: int | None) -> None:
        """`limit` is `FailurePolicy.most`."""
        self._limit = limit
        self._failed = 0

    def forgive(self) -> None:
        """Do not count one of the failures any longer, because its job runs again."""
        self._failed -= 1

    def add(self) -> str | None:
        """Count a failure. Return all of them as text, such as "3 failures", if the run is to be stopped now."""
        self._failed += 1
        return count(self._failed, "failure") if self._failed == self._limit else None


class RetryState:
    """The attempts of one job: which one is the latest, whether another follows, and what that one needs."""

    def __init__(self, policy: FailurePolicy, before: int, failed: int = 0) -> None:
        """Begin with the first attempt on this node. `before`: number of earlier attempts.

        `failed`: how many of these failed in this launch.
        """
        self.policy = policy
        """The sweep's policy, unless the job has its own."""
        self._before = before - failed
        """Number of earlier attempts that do not count as failed."""
        self.attempt = before + 1
        """The attempt that runs, or is the next to run, counted from 1."""
        self._share: Share | None = None
        """The share to request instead of the job's own, if that was too small."""
        self.latest_failure: JobResult | None = None
        """Result of the attempt before this one."""

    def request(self, request: Request) -> Request:
        """Return the request for the next attempt: the job's own, or more if that was not enough before."""
        return request if self._share is None else replace(request, share=self._share, auto_memory=False)

    def next(self, result: JobResult, run: JobRun, refusal: Callable[[Request], str | None]) -> NextAttempt | None:
        """Return the next attempt of a job that failed. None if the job is not retried.

        `refusal` says why the working devices could never grant a request. It returns None if they could.
        """
        made = result.attempts - self._before
        if run.final:
            return None
        if self._share is None and packed_too_tightly(result, run):
            self._before += 1  # our guess was too low, so this attempt does not count
        elif result.cause not in self.policy.retry_on or made > self.policy.retries:
            return None
        if run.started is None and result.cause is Cause.EXCEPTION:
            return None  # its config cannot be composed, and another attempt would not change that
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
        failed = self.attempt - 1 - self._before
        return NextAttempt(self.attempt, self._before + self.policy.retries + 1, failed, more_memory)


@dataclass(frozen=True, slots=True)
class NextAttempt:
    """The attempt of a job that follows a failed one."""

    number: int
    """The attempt's number, counted from 1."""
    limit: int
    """Maximum number of attempts."""
    failed: int
    """How many attempts in this launch count as failed."""
    last: bool
    """Whether it runs after the sweep's other jobs, because it may wait long for the memory that it needs."""


def packed_too_tightly(result: JobResult, run: JobRun) -> bool:
    """Whether a job ran out of GPU memory that `memory=auto` had chosen for it."""
    guessed = run.request is not None and run.request.auto_memory and not run.request.share.whole
    return guessed and bool(run.devices) and result.cause is Cause.OOM and result.payload is not None


def larger_share(share: Share, devices: Sequence[Device], shares: Mapping[str, Share]) -> Share | None:
    """Return the share to request after memory ran out on `devices`, of which the job had `shares`.

    If the job had less than a whole device, it is a whole device; otherwise a device with more memory. None if the
    memory of a device is not known.
    """
    if not all(shares[device.uuid].whole for device in devices):
        return Share(MILLIONTHS, share.memory)
    if any(device.memory is None for device in devices):
        return None
    return Share(MILLIONTHS, max(device.memory or 0 for device in devices) + 1)


def set_aside(log: str, attempt: int) -> str:
    """Rename the log of an attempt to a name of its own, such as `job.attempt-1.log`, and return the new path.

    If it cannot be renamed, it keeps its name, and its old path is returned.
    """
    path = Path(log)
    if _ASIDE in path.stem:
        return log  # it was set aside before
    for copy in itertools.count(1):
        name = f"{path.stem}{_ASIDE}{attempt}" + (f"-{copy}" if copy > 1 else "")
        aside = path.with_name(f"{name}{path.suffix}")
        try:
            if aside.exists():
                continue  # from an earlier sweep in the same directory
            path.rename(aside)
        except OSError:
            return log
        return str(aside)
    raise AssertionError("there are more names than files")
