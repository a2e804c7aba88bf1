"""What a huge sweep costs: time per job, and memory, descriptors and threads of the launching program.

Jobs do nothing, on eight simulated devices, with `hydra/sweeper=grid_async`. The launching program is looked at while
they run; what Hydra itself keeps of each job (its `JobReturn`) is in its memory.

    python benchmarks/scale.py                    # 100 and 1000 jobs: two minutes on two idle cores
    python benchmarks/scale.py 100 10000 20000    # as many as you like
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import psutil
from overhead.machine import Others, describe
from overhead.programs import scratch
from rich.console import Console
from rich.table import Table

EMPTY = Path(__file__).parent / "programs" / "empty.py"
EVERY = 0.05
"""Seconds between two looks at the launching program."""


@dataclass
class Found:
    jobs: int
    wall: float
    """Seconds."""
    first: float
    """Seconds until the first job ran."""
    memory: int
    """Most bytes of the launching program that no other process shares."""
    descriptors: int
    """Most it had open."""
    threads: int
    others: float
    """Cores that everybody else used meanwhile."""


def measure(jobs: int) -> Found:
    """Run one sweep. Raises RuntimeError if it fails."""
    with scratch() as directory:
        sweep = directory / "sweep"
        options = ["hydra/launcher=gpu_pool", "hydra/sweeper=grid_async", "hydra.launcher.devices=simulated:8"]
        command = [sys.executable, str(EMPTY), "-m", f"+job=range({jobs})", f"hydra.sweep.dir={sweep}", *options]
        environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), "BENCH_IMPORT": "json"}
        output = directory / "output.txt"
        found = Found(jobs, 0.0, 0.0, 0, 0, 0, 0.0)
        others = Others()
        before = os.times()
        began = time.monotonic()
        with output.open("wb") as file:
            program = psutil.Popen(command, cwd=directory, env=environment, stdout=file, stderr=file)
        manifest = sweep / ".gpu_launcher" / "manifest.jsonl"
        while program.poll() is None:
            look(program, found)
            if not found.first and manifest.exists() and b'"started"' in manifest.read_bytes():
                found.first = time.monotonic() - began
            time.sleep(EVERY)
        found.wall = time.monotonic() - began
        after = os.times()
        found.others = others.cores(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
        said = output.read_text(errors="replace")
        if program.returncode != 0 or not re.search(rf"{jobs} jobs: {jobs} completed", said):
            raise RuntimeError(said[-2000:])
        return found


def look(program: psutil.Popen, found: Found) -> None:
    """Remember the most that the launching program has had."""
    try:
        found.memory = max(found.memory, program.memory_full_info().uss)
        found.descriptors = max(found.descriptors, program.num_fds())
        found.threads = max(found.threads, program.num_threads())
    except psutil.Error:  # it has just ended
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description="What huge sweeps cost.")
    parser.add_argument("jobs", nargs="*", type=int, default=[100, 1000], help="sizes of sweeps; default: 100 1000")
    sizes = parser.parse_args().jobs
    console = Console()
    console.print(describe())
    table = Table(title="sweeps of jobs that do nothing, 8 at a time")
    for column in (
        "jobs",
        "seconds",
        "ms per job",
        "first job, s",
        "MB",
        "kB per job",
        "descriptors",
        "threads",
        "others",
    ):
        table.add_column(column, justify="right")
    base: Found | None = None
    for jobs in sizes:
        found = measure(jobs)
        base = base or found
        more = found.jobs - base.jobs
        growth = f"{(found.memory - base.memory) / more / 1000:.1f}" if more > 0 else ""
        table.add_row(
            str(jobs),
            f"{found.wall:.1f}",
            f"{(found.wall - found.first) / jobs * 1000:.1f}",
            f"{found.first:.2f}",
            f"{found.memory / 1e6:.0f}",
            growth,
            str(found.descriptors),
            str(found.threads),
            f"{found.others:.2f}",
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
