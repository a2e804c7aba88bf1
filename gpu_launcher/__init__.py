"""Run many experiments on the GPUs of a machine.

Everything public is in `__all__`, and in `gpu_launcher.lightning`. All other modules are private: they may change in
any release.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_launcher.allocation.lease import Lease
    from gpu_launcher.errors import (
        ApplyError,
        DeviceError,
        GpuLauncherError,
        JobError,
        JobTimeoutError,
        LeaseTimeout,
        ManifestError,
        NodeDiedError,
        NodeStartError,
        OptionError,
        PoolDirectoryError,
        RecordError,
        RequestError,
        SetupError,
        SteeringError,
        StorageError,
        UnpicklableError,
        UnreadableError,
        UnsupportedVersionError,
        WorkerDiedError,
    )
    from gpu_launcher.executors.executor_thread import BrokenPoolExecutor
    from gpu_launcher.executors.parallel_map import ParallelMap, parallel_map
    from gpu_launcher.executors.pool_executor import PoolExecutor
    from gpu_launcher.jobs.result_table import load_results
    from gpu_launcher.jobs.steering import Sweep
    from gpu_launcher.pool import Pool
    from gpu_launcher.studies.optimize import optimize
    from gpu_launcher.studies.reporting import report
    from gpu_launcher.studies.storage import storage
    from gpu_launcher.studies.trial import current_trial

    __version__: str
else:
    # Names are imported when first used, so a program that only runs jobs does not import Optuna.
    _HOMES = {
        "ApplyError": "gpu_launcher.errors",
        "BrokenPoolExecutor": "gpu_launcher.executors.executor_thread",
        "DeviceError": "gpu_launcher.errors",
        "GpuLauncherError": "gpu_launcher.errors",
        "JobError": "gpu_launcher.errors",
        "JobTimeoutError": "gpu_launcher.errors",
        "Lease": "gpu_launcher.allocation.lease",
        "LeaseTimeout": "gpu_launcher.errors",
        "ManifestError": "gpu_launcher.errors",
        "NodeDiedError": "gpu_launcher.errors",
        "NodeStartError": "gpu_launcher.errors",
        "OptionError": "gpu_launcher.errors",
        "ParallelMap": "gpu_launcher.executors.parallel_map",
        "Pool": "gpu_launcher.pool",
        "PoolDirectoryError": "gpu_launcher.errors",
        "PoolExecutor": "gpu_launcher.executors.pool_executor",
        "RecordError": "gpu_launcher.errors",
        "RequestError": "gpu_launcher.errors",
        "SetupError": "gpu_launcher.errors",
        "SteeringError": "gpu_launcher.errors",
        "StorageError": "gpu_launcher.errors",
        "Sweep": "gpu_launcher.jobs.steering",
        "UnpicklableError": "gpu_launcher.errors",
        "UnreadableError": "gpu_launcher.errors",
        "UnsupportedVersionError": "gpu_launcher.errors",
        "WorkerDiedError": "gpu_launcher.errors",
        "current_trial": "gpu_launcher.studies.trial",
        "load_results": "gpu_launcher.jobs.result_table",
        "optimize": "gpu_launcher.studies.optimize",
        "parallel_map": "gpu_launcher.executors.parallel_map",
        "report": "gpu_launcher.studies.reporting",
        "storage": "gpu_launcher.studies.storage",
    }

    def __dir__() -> list[str]:
        names = {name for name in globals() if name not in ("TYPE_CHECKING", "annotations", "import_module", "_HOMES")}
        return sorted({*names, *_HOMES, "__version__"})

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return import_module("gpu_launcher.version").find_version()
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # Outside of trials, `report` works without Optuna.
        if _HOMES[name].startswith("gpu_launcher.studies") and name != "report":
            from gpu_launcher.requirements import check_version

            check_version("optuna")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


__all__ = [
    "ApplyError",
    "BrokenPoolExecutor",
    "DeviceError",
    "GpuLauncherError",
    "JobError",
    "JobTimeoutError",
    "Lease",
    "LeaseTimeout",
    "ManifestError",
    "NodeDiedError",
    "NodeStartError",
    "OptionError",
    "ParallelMap",
    "Pool",
    "PoolDirectoryError",
    "PoolExecutor",
    "RecordError",
    "RequestError",
    "SetupError",
    "SteeringError",
    "StorageError",
    "Sweep",
    "UnpicklableError",
    "UnreadableError",
    "UnsupportedVersionError",
    "WorkerDiedError",
    "current_trial",
    "load_results",
    "optimize",
    "parallel_map",
    "report",
    "storage",
]
