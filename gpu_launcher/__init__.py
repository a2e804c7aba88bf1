"""Run many experiments on the GPUs one has. The public names, nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gpu_launcher.studies.reporting import report

if TYPE_CHECKING:
    from gpu_launcher.errors import (
        ApplyError,
        GpuLauncherError,
        JobError,
        JobTimeoutError,
        LeaseTimeout,
        OptionError,
        PoolDirectoryError,
        RequestError,
        UnpicklableError,
    )
    from gpu_launcher.executors.courier import BrokenPoolExecutor
    from gpu_launcher.executors.pool_executor import PoolExecutor
    from gpu_launcher.lending.lease import Lease
    from gpu_launcher.pool import Pool
    from gpu_launcher.studies.optimize import optimize
    from gpu_launcher.studies.storage import storage
    from gpu_launcher.studies.trial import current_trial
else:
    # Imported when first used: a program that only runs jobs does not pay for Optuna.
    _HOMES = {
        "ApplyError": "gpu_launcher.errors",
        "BrokenPoolExecutor": "gpu_launcher.executors.courier",
        "GpuLauncherError": "gpu_launcher.errors",
        "JobError": "gpu_launcher.errors",
        "JobTimeoutError": "gpu_launcher.errors",
        "Lease": "gpu_launcher.lending.lease",
        "LeaseTimeout": "gpu_launcher.errors",
        "OptionError": "gpu_launcher.errors",
        "Pool": "gpu_launcher.pool",
        "PoolDirectoryError": "gpu_launcher.errors",
        "PoolExecutor": "gpu_launcher.executors.pool_executor",
        "RequestError": "gpu_launcher.errors",
        "UnpicklableError": "gpu_launcher.errors",
        "current_trial": "gpu_launcher.studies.trial",
        "optimize": "gpu_launcher.studies.optimize",
        "storage": "gpu_launcher.studies.storage",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


__all__ = [
    "ApplyError",
    "BrokenPoolExecutor",
    "GpuLauncherError",
    "JobError",
    "JobTimeoutError",
    "Lease",
    "LeaseTimeout",
    "OptionError",
    "Pool",
    "PoolDirectoryError",
    "PoolExecutor",
    "RequestError",
    "UnpicklableError",
    "current_trial",
    "optimize",
    "report",
    "storage",
]
