"""What to do about failed jobs: try again, with more memory if that is what was missing, or end the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.jobs.job import Cause
from gpu_launcher.model import MILLIONTHS, Device, Share


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What the user wants done. The default: nothing, and the other jobs go on."""

    retries: int = 0
    """How many times a job is run again."""
    retry_on: frozenset[Cause] = frozenset(Cause) - {Cause.EXCEPTION}
    most: int | None = None
    """How many jobs may have failed when the sweep is ended; None for any number."""

    def retries_after(self, cause: Cause | None, attempt: int) -> bool:
        """Whether a job is run again whose `attempt`, counted from 1, failed."""
        return cause in self.retry_on and attempt <= self.retries


def roomier(share: Share, devices: Sequence[Device], shares: Mapping[str, Share]) -> Share:
    """What to ask for after the memory of `devices`, of which the job had `shares`, was not enough.

    The whole device, where others may have used it, too; else one with more memory.
    """
    if not all(shares[device.uuid].whole for device in devices):
        return Share(MILLIONTHS, share.memory)
    return Share(MILLIONTHS, max(device.memory or 0 for device in devices) + 1)


def set_aside(log: str, attempt: int) -> str:
    """Give the log of an attempt a name of its own, such as `job.attempt-1.log`; returns that."""
    path = Path(log)
    aside = path.with_name(f"{path.stem}.attempt-{attempt}{path.suffix}")
    with suppress(FileNotFoundError):  # the job may have removed its directory
        path.replace(aside)
    return str(aside)
