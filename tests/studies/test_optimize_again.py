"""What surrounds a search: threads, progress bars, leases of the program's own, and the words of its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own, in which nothing has threads; `optimize` is quiet in it, and has a `pool`."""
    (tmp_path / "script.py").write_text(
        "import logging, os, sys, threading, time\n"
        "import optuna\n"
        "import gpu_launcher\n"
        "optuna.logging.set_verbosity(optuna.logging.ERROR)\n"
        "pool = gpu_launcher.Pool('simulated:1', 'pool')\n"
        "def objective(trial):\n"
        "    return trial.suggest_float('x', 0, 1)\n" + body
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done


THREADS = """
import asyncio
from concurrent.futures import ThreadPoolExecutor

async def main():
    study = optuna.create_study()
    await asyncio.to_thread(gpu_launcher.optimize, study, objective, 2, pool=pool)
    print(len(study.trials))

def with_threads(trial):
    with ThreadPoolExecutor(1) as mine:
        return mine.submit(objective, trial).result()

asyncio.run(main())
with ThreadPoolExecutor(1) as executor:
    study = optuna.create_study()
    executor.submit(gpu_launcher.optimize, study, with_threads, 2, pool=pool).result()
    print(len(study.trials))
"""


def test_in_a_thread_of_an_executor_jobs_end_quietly(tmp_path: Path) -> None:
    done = run(tmp_path, THREADS)
    assert done.stdout.split() == ["2", "2"]
    assert "Traceback" not in done.stderr


BARS = """
from tqdm.auto import tqdm

def forked(trial):
    return os.environ.get("before") == "known" and seen == "by a fork"

seen = "by a fork"
os.environ["before"] = "known"
outer = tqdm(total=2, file=sys.stderr)
for _ in range(2):
    study = optuna.create_study()
    gpu_launcher.optimize(study, forked, 2, pool=pool, show_progress_bar=True)
    outer.update()
    print([trial.value for trial in study.trials], [one.name for one in threading.enumerate()])
outer.close()
"""


def test_progress_bars_do_not_keep_a_program_from_being_forked(tmp_path: Path) -> None:
    done = run(tmp_path, BARS)
    assert "spawn" not in done.stderr
    assert done.stdout.splitlines() == ["[1.0, 1.0] ['MainThread', 'tqdm_monitor']"] * 2
