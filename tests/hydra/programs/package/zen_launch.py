"""A program that uses hydra-zen's `launch`, as notebooks do: without a command line, with returns as values."""

from __future__ import annotations

import json
from pathlib import Path

from hydra_zen import builds, launch, zen

from .work import Schedule


def task(lr: float, schedule: Schedule) -> float:
    return lr * schedule.lr


if __name__ == "__main__":
    (jobs,) = launch(
        builds(task, lr=2, schedule=builds(Schedule, lr=10)),
        zen(task),
        overrides=["hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4", "hydra.sweep.dir=sweep", "lr=1,2"],
        multirun=True,
        version_base=None,
    )
    Path("returned.json").write_text(json.dumps([job.return_value for job in jobs]))
