"""What to do about failed jobs: try again, with more memory if that is what was missing, or end the sweep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.running import Running
from gpu_launcher.model import MILLIONTHS, Device, Request, Share

_ASIDE = ".attempt-"


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What the user wants done. The default: nothing, and the other jobs go on."""

    retries: int = 0
    """How many times a job is run again."""
    retry_on: frozenset[Cause] = frozenset(Cause) - {Cause.EXCEPTION}
    most: int | None = None
    """How many jobs may have failed when the sweep is ended; None for any number."""


class Attempts:
    """Which attempt of each job is the next or latest one, and what it takes to make it a better one."""

    def __init__(self, policy: FailurePolicy, numbers: Iterable[int], before: Mapping[int, int]) -> None:
        """`before`: how many attempts jobs have made in earlier launches, by number."""
        self._policy = policy
        self._policies: dict[int, FailurePolicy] = {}
        """Of jobs that have their own."""
        self._before = dict(before)
        self._attempts = {number: before.get(number, 0) + 1 for number in numbers}
        self._roomier: dict[int, Share] = {}
        self._failed: dict[int, JobResult] = {}

    def add(self, job: Job) -> None:
        """There is one more job."""
        self._attempts[job.number] = job.attempts_before + 1
        if job.attempts_before:
            self._before[job.number] = job.attempts_before

    def follow(self, number: int, policy: FailurePolicy) -> None:
        """Retry this job as its own `policy` says."""
        self._policies[number] = policy

    def forget(self, number: int) -> None:
        """It will not run again, and nobody asks about it."""
        for known in (self._attempts, self._before, self._roomier, self._failed, self._policies):
            known.pop(number, None)

    def __getitem__(self, number: int) -> int:
        """Counted from 1."""
        return self._attempts[number]

    def request(self, number: int, request: Request) -> Request:
        """What the job is to have, which is more than its `request` if that was not enough before."""
        share = self._roomier.get(number)
        return request if share is None else replace(request, share=share)

    def next(self, result: JobResult, ran: Running, refusal: Callable[[Request], str | None]) -> Attempt | None:
        """The next attempt of a job that failed, if it is to be run again.

        `refusal` says why the devices that are in order could never grant a request.
        """
        number, request = result.number, ran.request
        policy = self._policies.get(number, self._policy)
        made = result.attempts - self._before.get(number, 0)
        if result.cause not in policy.retry_on or made > policy.retries or ran.final:
            return None
        if ran.started is None and result.cause is Cause.EXCEPTION:
            return None  # its config does not compose, and will not
        patient = False
        if request is not None and ran.devices:
            if result.cause is Cause.OOM and result.payload is not None:
                share = roomier(request.share, ran.devices, ran.shares)
                if share is None:
                    return None
                request = replace(request, share=share)
                patient = True
            if refusal(request) is not None:
                return None
            if patient:
                self._roomier[number] = request.share
        self._attempts[number] += 1
        self._failed[number] = result
        return Attempt(self._attempts[number], self._before.get(number, 0) + policy.retries + 1, patient)

    def latest_failure(self, number: int) -> JobResult | None:
        """How the attempt before this one ended."""
        return self._failed.get(number)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One of a job's attempts."""

    number: int
    """Counted from 1."""
    most: int
    """How many there may be."""
    patient: bool
    """Whether it wants what may be long in coming."""


def roomier(share: Share, devices: Sequence[Device], shares: Mapping[str, Share]) -> Share | None:
    """What to ask for after the memory of `devices`, of which the job had `shares`, was not enough.

    The whole device, where others may have used it, too; else one with more memory. None where devices do not say how
    much they have.
    """
    if not all(shares[device.uuid].whole for device in devices):
        return Share(MILLIONTHS, share.memory)
    if any(device.memory is None for device in devices):
        return None
    return Share(MILLIONTHS, max(device.memory or 0 for device in devices) + 1)


def set_aside(log: str, attempt: int) -> str:
    """Give the log of an attempt a name of its own, such as `job.attempt-1.log`; returns where it is then.

    It stays where it is if the file system will not have it otherwise: nothing else fails for that.
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
