"""How much memory jobs take that run at the same time, their launcher included.

Proportional set size (proc_pid_smaps(5)): pages that several processes share count for each with its part.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from statistics import median
from typing import Any

from overhead.launchers import Launcher
from overhead.programs import ProgramError, Run, program, scratch

SETTLE = 0.5
"""Seconds between the last job's arrival and the look at all."""
PATIENCE = 120.0
"""Seconds for all jobs to arrive."""


def measure(launchers: list[Launcher], *, jobs: int, ahead: int, rounds: int, heavy: str) -> dict[str, Any]:
    """Let `jobs` jobs meet, with each launcher in turn. `ahead` more are waiting in the launcher's queue."""
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for launcher in launchers:
            looks = results.setdefault(launcher.name, {"runs": []})["runs"]
            looks.append(_once(launcher, jobs, ahead, heavy))
    for result in results.values():
        for key in ("pss_mb", "processes"):
            result[key] = median(look[key] for look in result["runs"])
    return {"jobs": jobs, "ahead": ahead, "rounds": rounds, "launchers": results}


def _once(launcher: Launcher, jobs: int, ahead: int, heavy: str) -> dict[str, float]:
    with scratch() as directory:
        command = program(
            "meeting.py", "-m", f"+job=range({jobs + ahead})", "hydra.sweep.dir=sweep", *launcher.options(jobs)
        )
        with Run(command, directory, {"BENCH_IMPORT": heavy, "BENCH_PLACE": str(directory)}) as run:
            deadline = time.monotonic() + PATIENCE
            while len(list(directory.glob("here.*"))) < jobs:
                if run.ended:
                    run.wait()
                    raise ProgramError(f"{launcher.name} did not run {jobs} jobs at the same time")
                if time.monotonic() > deadline:
                    raise ProgramError(f"{launcher.name} did not have {jobs} jobs running after {PATIENCE:.0f} s")
                time.sleep(0.02)
            time.sleep(SETTLE)
            sizes = [size for pid in run.tree() if (size := proportional(pid)) is not None]
            (directory / "go").touch()
            run.wait()
    return {"pss_mb": sum(sizes) / 1e6, "processes": len(sizes)}


def proportional(pid: int) -> int | None:
    """Bytes; None of a process that has just ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None
