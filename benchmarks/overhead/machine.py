"""What a figure depends on: the machine, the versions, and what else was going on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HEAVY = ("torch", "sklearn", "optuna")
"""What the measured programs import, the first of these that is there."""

IDLE = 0.15
"""Cores that may be in use on a machine that counts as idle."""

DISTRIBUTIONS = (
    "gpu-launcher",
    "hydra-core",
    "omegaconf",
    "hydra-joblib-launcher",
    "joblib",
    "hydra-submitit-launcher",
)
DISTRIBUTIONS = (*DISTRIBUTIONS, "submitit", "torch")


def version(distribution: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def heavy_import() -> str:
    """Name of the heaviest module there is to import; `json` if there is none."""
    return next((name for name in HEAVY if find_spec(name)), "json")


def describe() -> dict[str, Any]:
    """Say when and on what this runs."""
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def wait_until_idle(patience: float) -> None:
    """Wait until nobody else has used much CPU for two seconds, but no longer than `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        others = Others()
        time.sleep(2)
        if others.cores(0.0) < IDLE:
            return


class Others:
    """How much CPU everybody else uses while something is measured, in cores.

    All figures of a busy machine are too large, and not evenly so: this says how busy it was.
    """

    def __init__(self) -> None:
        self._since = time.monotonic(), _busy()

    def cores(self, own: float) -> float:
        """Since this object was made, of which `own` seconds of CPU were the measured program's."""
        wall, busy = time.monotonic() - self._since[0], _busy() - self._since[1]
        return max(0.0, busy - own) / wall


def _busy() -> float:
    """Seconds that the machine's CPUs have been at work; see proc_stat(5)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
