"""What surrounds a search: threads, progress bars, leases of the program's own, and the words of its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


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
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500, env=dict(os.environ)
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


HELD = """
class Said(logging.Handler):
    def emit(self, record):
        if "waiting for devices" in record.getMessage():
            said.set()

def release_when_said():
    said.wait(60)
    lease.release()

said = threading.Event()
logging.basicConfig()
logging.getLogger().addHandler(Said())
with pool.lease(gpus=1) as lease:
    try:
        pool.lease(timeout=0)
    except gpu_launcher.LeaseTimeout as error:
        print(error)
    {call}
"""
OWN = "simulated GPU 0 held by this program: release the lease first"
CALLS = {
    "optimize": (
        "threading.Thread(target=release_when_said).start()\n"
        "    gpu_launcher.optimize(optuna.create_study(), objective, 1, pool=pool, start_method='fork')"
    ),
    "PoolExecutor": (
        "executor = gpu_launcher.PoolExecutor(pool=pool); future = executor.submit(abs, -1)\n"
        "    release_when_said(); print(future.result()); executor.shutdown()"
    ),
    "parallel_map": (
        "threading.Thread(target=release_when_said).start()\n"
        "    print(list(gpu_launcher.parallel_map([-1], function=abs, pool=pool, start_method='fork')))"
    ),
}


@pytest.mark.parametrize("entry", CALLS)
def test_who_waits_for_what_the_program_itself_has_is_told_so(tmp_path: Path, entry: str) -> None:
    done = run(tmp_path, HELD.format(call=CALLS[entry]))
    assert f"1 GPU not available now: {OWN}\n" in done.stdout
    assert f"waiting for devices: {OWN}\n" in done.stderr


WORDS = """
for gpus in (2, 0.5):
    try:
        gpu_launcher.optimize(optuna.create_study(), objective, 1, gpus=gpus, memory="1TiB", pool=pool)
    except gpu_launcher.OptionError as error:
        print(error)
print("over")
"""


def test_errors_about_gpus_speak_of_no_sweep(tmp_path: Path) -> None:
    done = run(tmp_path, WORDS)
    assert len(done.stdout.splitlines()) == 3
    assert "simulated GPU 0" in done.stdout
    assert "sweep" not in done.stdout
    assert "`devices`" not in done.stdout  # which is the pool's
