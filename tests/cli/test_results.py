"""Tests `gpu-launcher results`. The tables themselves are tested in tests/unit/test_result_table.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_launcher.jobs.events import JobEnded, JobStarted, Outcome
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.model import Device, DeviceKind

GPU = Device("GPU-1", 1, "a GPU", DeviceKind.GPU)


def results(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpu_launcher.cli", "results", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with the sweep `multirun/sweep`: two jobs, of which one completed."""
    jobs = [Job(0, "n=1", ["n=1"]), Job(1, "n=2", ["n=2"])]
    recorder = Recorder(tmp_path / "multirun" / "sweep", jobs, "train.py", directions=["minimize"])
    recorder.handle(JobStarted(0.0, 0, "n=1", (GPU,), None))
    figures = Figures({"loss": 0.5})
    recorder.handle(JobEnded(0.0, 0, "n=1", (GPU,), Outcome.COMPLETED, 1.0, None, None, figures=figures))
    return tmp_path


@pytest.mark.smoke
def test_newest_sweep_below_the_current_directory_is_shown(here: Path) -> None:
    done = results(here)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:4] for line in done.stdout.splitlines()] == [
        ["number", "n", "loss", "outcome"],
        ["0", "1", "0.5", "completed"],
        ["1", "2", "-", "waiting"],
    ]
    assert json.loads(results(here, "--json", "--top", "1").stdout)["jobs"][0]["values"] == {"loss": 0.5}
    assert results(here, "--pivot", "n,outcome", "--csv").stdout == "n,completed\n1,0.5\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--plot", "x.html", "--csv"], "--plot: cannot be combined with --pivot, --csv, --json or --jsonl"),
        (["--plot", "x.html", "--pivot", "n,n"], "--plot: cannot be combined with --pivot, --csv, --json or --jsonl"),
        (
            ["--html", "x.html", "--top", "1"],
            "--html: cannot be combined with --top, --pivot, --plot, --csv, --json or --",
        ),
        (
            ["--html", "x.html", "--csv"],
            "--html: cannot be combined with --top, --pivot, --plot, --csv, --json or --jsonl",
        ),
        (["--value", "loss"], "--value: is for --html, --pivot and --plot only"),
        (["--sort", "-speed"], "--sort: there is no column 'speed'"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(here: Path, arguments: list[str], problem: str) -> None:
    done = results(here, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gpu-launcher: {problem}")
    assert len(done.stderr.splitlines()) == 1
    assert not (here / "x.html").exists()


def test_plot_says_where_it_is(here: Path) -> None:
    pytest.importorskip("plotly")
    assert results(here, "--plot", "x.html").stdout == "x.html\n"
    assert (here / "x.html").exists()
