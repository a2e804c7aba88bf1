"""Tests `gpu-launcher demo`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpu_launcher.jobs.manifest import State, read
from tests.cli.conftest import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Cli, Terminal  # type: ignore[import-not-found]

SLOW_DEMO = """
from gpu_launcher.cli import demo, main
demo.SWEEPS = [(title, (*words, "epoch_seconds=600"), code) for title, words, code in demo.SWEEPS]
main.main()
"""
SLOW_PYTHON = """
import sys, time
if "train.py" in sys.orig_argv:
    print("Python starts", flush=True)
    time.sleep(600)
"""


@pytest.mark.thorough
def test_demo_shows_a_failed_job_pruned_trials_and_what_to_type(cli: Cli, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_launcher.cli", "demo", "--dir", str(tmp_path / "a demo")]
    done = subprocess.run(command, env=cli.environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "[gpu_pool] 8 jobs: 7 completed, 1 failed in " in done.stderr
    assert re.search(r"\[gpu_pool\] 16 jobs: \d+ completed, [1-9]\d* pruned in ", done.stderr)
    *_, last = done.stdout.split("Hydra project of yours")
    assert "python train.py -m hydra/launcher=gpu_pool lr=1e-3,1e-4\n" in last
    assert len(list((tmp_path / "a demo" / "multirun").glob("*/*/*/job.log"))) == 24


def test_demo_says_that_its_directory_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli("demo", "--dir", str(tmp_path / "file" / "demo"))
    assert done.returncode == 2
    assert done.stderr == f"gpu-launcher: --dir: cannot write to {tmp_path}/file/demo: Not a directory\n"


@pytest.mark.thorough
def test_ctrl_c_ends_the_jobs_and_the_demo(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    shown = terminal("demo", "--dir", str(directory), within=(sys.executable, "-c", SLOW_DEMO))
    shown.read_until(lambda: len(list(directory.glob("multirun/*/*/*/job.log"))) == 4, 120)
    shown.press("\x03")
    assert shown.wait(120) == 130, shown.text
    assert "to run the rest:" in shown.text
    assert "A search" not in shown.text
    [sweep] = directory.glob("multirun/*/*")
    assert {entry.state for entry in read(sweep).values()} == {State.CANCELLED}


@pytest.mark.thorough
def test_ctrl_c_while_python_starts_ends_the_demo(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_PYTHON)
    shown = terminal("demo", "--dir", str(tmp_path / "demo"), PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    shown.read_until(lambda: "Python starts" in shown.text, 120)
    shown.press("\x03")
    assert shown.wait(120) == 130, shown.text
    assert "A search" not in shown.text
