"""How long a sweep of jobs takes that do nothing: whole processes, from start to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

from overhead.launchers import Launcher
from overhead.programs import Run, Usage, program, scratch


def measure(
    launchers: list[Launcher],
    *,
    jobs: int,
    at_once: int,
    rounds: int,
    heavy: str,
    elsewhere: Callable[[], float] = lambda: 0.0,
) -> dict[str, Any]:
    """Run the sweep with each launcher, and that several times over.

    The first launcher runs before and after each other one, which is compared with the mean of the two: other programs
    on the machine come and go. `elsewhere` is that of `Run`.
    """
    first, *others = launchers
    runs: dict[str, list[dict[str, float]]] = {launcher.name: [] for launcher in launchers}
    factors: dict[str, list[float]] = {launcher.name: [] for launcher in launchers}

    def run(launcher: Launcher) -> float:
        usage = _once(launcher, jobs, at_once, heavy, elsewhere)
        runs[launcher.name].append(asdict(usage))
        return usage.wall

    for _ in range(rounds):
        before = run(first)
        for launcher in others:
            wall = run(launcher)
            after = run(first)
            factors[launcher.name].append(2 * wall / (before + after))
            before = after
    results: dict[str, Any] = {}
    for name, usages in runs.items():
        walls = [usage["wall"] for usage in usages]
        results[name] = {
            "wall": median(walls),
            "wall_range": [min(walls), max(walls)],
            "cpu": median(usage["cpu"] for usage in usages),
            "others_cores": median(usage["others"] for usage in usages),
            "factor": median(factors[name]) if factors[name] else None,
            "factors": factors[name],
            "runs": usages,
        }
    return {"jobs": jobs, "at_once": at_once, "rounds": rounds, "launchers": results}


def _once(launcher: Launcher, jobs: int, at_once: int, heavy: str, elsewhere: Callable[[], float]) -> Usage:
    with scratch() as directory:
        command = program("empty.py", "-m", f"+job=range({jobs})", "hydra.sweep.dir=sweep", *launcher.options(at_once))
        with Run(command, directory, {"BENCH_IMPORT": heavy}, elsewhere) as run:
            return run.wait()
