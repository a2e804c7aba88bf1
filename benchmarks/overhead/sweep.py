"""How long a sweep of jobs takes that do nothing: whole processes, from start to end."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from overhead.launchers import Launcher
from overhead.programs import Run, program, scratch


def measure(launchers: list[Launcher], *, jobs: int, at_once: int, rounds: int, heavy: str) -> dict[str, Any]:
    """Run the sweep with each launcher in turn, and that several times over, so that all meet the same weather."""
    runs: dict[str, list[dict[str, float]]] = {launcher.name: [] for launcher in launchers}
    for number in range(rounds):
        # Every other round backwards: who comes first in a round is not always the same.
        for launcher in launchers if number % 2 == 0 else reversed(launchers):
            runs[launcher.name].append(asdict(_once(launcher, jobs, at_once, heavy)))
    results: dict[str, Any] = {}
    for name, usages in runs.items():
        walls = [usage["wall"] for usage in usages]
        results[name] = {
            "wall": median(walls),
            "wall_range": [min(walls), max(walls)],
            "cpu": median(usage["cpu"] for usage in usages),
            "others_cores": median(usage["others"] for usage in usages),
            # Of each round, and then the median: within a round the machine was about equally busy.
            "times_gpu_pool": median(
                usage["wall"] / ours["wall"] for usage, ours in zip(usages, runs.get("gpu_pool", usages), strict=True)
            ),
            "runs": usages,
        }
    return {"jobs": jobs, "at_once": at_once, "rounds": rounds, "launchers": results}


def _once(launcher: Launcher, jobs: int, at_once: int, heavy: str) -> Any:
    with scratch() as directory:
        command = program("empty.py", "-m", f"+job=range({jobs})", "hydra.sweep.dir=sweep", *launcher.options(at_once))
        with Run(command, directory, {"BENCH_IMPORT": heavy}) as run:
            return run.wait()
