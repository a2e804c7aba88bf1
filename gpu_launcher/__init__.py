"""Run many experiments on the GPUs one has. The public names, nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gpu_launcher.studies.reporting import report

if TYPE_CHECKING:
    from gpu_launcher.executors.parallel_map import ParallelMap, parallel_map
    from gpu_launcher.executors.record_errors import RecordError, WorkerDiedError
    from gpu_launcher.studies.storage import storage
    from gpu_launcher.studies.trial import current_trial
else:
    # Imported when first used: a program that only runs jobs does not pay for Optuna.
    _HOMES = {
        "ParallelMap": "gpu_launcher.executors.parallel_map",
        "parallel_map": "gpu_launcher.executors.parallel_map",
        "RecordError": "gpu_launcher.executors.record_errors",
        "WorkerDiedError": "gpu_launcher.executors.record_errors",
        "storage": "gpu_launcher.studies.storage",
        "current_trial": "gpu_launcher.studies.trial",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


__all__ = ["ParallelMap", "RecordError", "WorkerDiedError", "current_trial", "parallel_map", "report", "storage"]
