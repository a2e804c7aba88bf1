"""Options of one job, which may differ from those of its sweep."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.grants import Telling


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job's own config says, apart from its request."""

    telling: Telling
    failures: FailurePolicy
    """How often, and after what, the job is retried. How many failures end the sweep is not up to a job."""
    ignored: tuple[str, ...] = ()
    """Options that only a sweep can have, as the job's config sets them: `hydra.launcher.devices=cpu:2`."""
