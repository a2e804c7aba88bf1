"""The launchers that are compared, and how each is told to run so many jobs at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from overhead.machine import version


@dataclass(frozen=True)
class Launcher:
    """One way to run the same program's sweep."""

    name: str
    options: Callable[[int], list[str]]
    """Overrides that choose it, for so many jobs at a time."""
    distribution: str | None = None
    """What has to be installed for it."""

    def missing(self) -> str | None:
        """Why it cannot be measured, if so."""
        if self.distribution is None or version(self.distribution):
            return None
        return f"{self.distribution} is not installed"


def _gpu_pool(at_once: int) -> list[str]:
    return ["hydra/launcher=gpu_pool", f"hydra.launcher.devices=simulated:{at_once}"]


LAUNCHERS = (
    Launcher("gpu_pool", lambda at_once: [*_gpu_pool(at_once), "hydra.launcher.start_method=fork"]),
    Launcher(
        "gpu_pool+grid_async",
        lambda at_once: [*_gpu_pool(at_once), "hydra.launcher.start_method=fork", "hydra/sweeper=grid_async"],
    ),
    Launcher("gpu_pool-spawn", lambda at_once: [*_gpu_pool(at_once), "hydra.launcher.start_method=spawn"]),
    Launcher("basic", lambda at_once: ["hydra/launcher=basic"]),
    Launcher(
        "joblib",
        lambda at_once: ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={at_once}"],
        "hydra-joblib-launcher",
    ),
    # It starts all jobs that it gets at once: its `array_parallelism` is for Slurm only. So it gets them in batches.
    Launcher(
        "submitit",
        lambda at_once: [
            "hydra/launcher=submitit_local",
            "hydra.launcher.timeout_min=10",
            f"hydra.sweeper.max_batch_size={at_once}",
        ],
        "hydra-submitit-launcher",
    ),
)
