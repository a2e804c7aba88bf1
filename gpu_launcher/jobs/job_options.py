"""The options of a single job, which may differ from those of its sweep."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.jobs.failures import FailurePolicy


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Options from a job's own config, apart from its request."""

    device_environment: DeviceEnvironment
    failures: FailurePolicy
    """Whether the job is retried. The number of failures that stops a sweep is an option of the sweep."""
    ignored: tuple[str, ...] = ()
    """Options that only a sweep can have, as the job's config sets them: `hydra.launcher.devices=cpu:2`."""
