"""Tests the digits example as its README shows it: alone, with Hydra's own launcher, and with ours."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "train.py"
SHORT = ("epochs=5", "log_every=5")
SWEEP = ("-m", "lr=1e-2,1e-3", "hidden=16,32", *SHORT)
GPU_POOL = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2")


def train(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the example in `directory`, with its own pool."""
    environment = {
        **os.environ,
        "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"),
        "PYTHONWARNINGS": "error::ResourceWarning",
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def accuracies(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"^accuracy: (\S+)$", text, re.MULTILINE)]


def logs(directory: Path) -> list[str]:
    """The logs of a sweep's four jobs, in the order of their numbers."""
    (sweep,) = (directory / "multirun").glob("*/*")
    return [(sweep / str(number) / "train.log").read_text() for number in range(4)]


def test_it_does_not_import_gpu_launcher() -> None:
    assert "gpu_launcher" not in SCRIPT.read_text()
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported <= {"hydra", "logging", "numpy", "os"}


def test_alone_it_learns_to_read_digits(tmp_path: Path) -> None:
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    (accuracy,) = accuracies(done.stdout)
    assert accuracy > 0.95


def test_it_sweeps_with_hydras_own_launcher(tmp_path: Path) -> None:
    done = train(tmp_path, *SWEEP)
    assert done.returncode == 0, done.stderr
    assert len(accuracies(done.stdout)) == 4
    assert len(logs(tmp_path)) == 4


@pytest.mark.smoke
def test_it_sweeps_over_simulated_devices_with_gpu_pool(tmp_path: Path) -> None:
    done = train(tmp_path, *SWEEP, *GPU_POOL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simulated" in done.stderr, "simulated devices are always announced"
    seen = [re.search(r"CUDA_VISIBLE_DEVICES=(\S*)", log) for log in logs(tmp_path)]
    devices = [match.group(1) for match in seen if match]
    assert len(devices) == 4
    assert set(devices) <= {"0", "1"}, "a job may well be over before the next one is ready for the other device"


def test_with_gpu_pool_each_job_keeps_what_it_printed(tmp_path: Path) -> None:
    done = train(tmp_path, *SWEEP, *GPU_POOL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert accuracies(done.stdout) == [], "what a job prints goes to its log"
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    for number in range(4):
        printed = "".join(log.read_text() for log in (sweep / str(number)).glob("*.log"))
        assert accuracies(printed), f"job {number} printed its accuracy to a log in its directory"


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_optimizer_trains(tmp_path: Path, optimizer: str) -> None:
    done = train(tmp_path, f"optimizer={optimizer}", *SHORT)
    assert done.returncode == 0, done.stderr
    assert accuracies(done.stdout)
