"""A job as it goes into the loop, and as it comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.model import Device


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the user's program."""

    number: int
    label: str
    """For people, such as `lr=0.1 hidden=32`; may be empty."""
    spec: Any
    """For the program: what it is called with. Picklable."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended. Every job ends in exactly one."""

    number: int
    label: str
    outcome: Outcome
    payload: bytes | None
    """What the program reported; None if its process ended without a report, or it never ran."""
    message: str | None
    """The cause in one sentence without a subject, such as `was killed by SIGKILL after 12.0 s on GPU 2`;
    None for a completed job."""
    devices: tuple[Device, ...]
    """Those it ran on; empty if it never ran."""
    duration: float | None
    """Seconds from its grant until its process tree was gone; None if it never ran."""
    log: str | None
    """Path of its stdout and stderr; None if it never got that far."""
