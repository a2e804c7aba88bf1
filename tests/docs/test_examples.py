"""Every example has a page, and what its console shows is what its commands print."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("needs the source tree; only the tests are here", allow_module_level=True)
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__")


def test_the_list_of_examples_is_complete() -> None:
    listed = re.findall(
        r"^\| \[(\w+)\]\((\w+)/README.md\) \|", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(listed) == [(name, name) for name in NAMES]
    for name in NAMES:
        assert (EXAMPLES / name / "README.md").is_file(), name


@pytest.mark.parametrize("name", ["commands", "functions", "benchmark_models", "leases"])
def test_the_console_of_its_page_is_true(name: str, tmp_path: Path) -> None:
    if (
        name == "functions" and importlib.util.find_spec("sklearn") is None
    ):  # not imported: that changes the environment
        pytest.skip("needs sklearn")
    page = (EXAMPLES / name / "README.md").read_text()
    ((command, expected),) = re.findall(r"^```console\n\$ (.*)\n((?:.*\n)*?)^```", page, flags=re.MULTILINE)
    home = tmp_path / "example"
    shutil.copytree(EXAMPLES / name, home, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["GPU_LAUNCHER_POOL_DIR"] = str(tmp_path / "pool")
    environment["PYTHONUNBUFFERED"] = "1"  # lines appear in the order of the page, as on a terminal
    done = subprocess.run(
        ["bash", "-c", command], cwd=home, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    pattern = "(?:.*\n)*".join(re.escape(part) for part in re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE))
    assert re.fullmatch(pattern, done.stdout), f"{done.stdout}\n{done.stderr}"


def test_commands_that_share_two_devices_share_them(tmp_path: Path) -> None:
    home = tmp_path / "example"
    shutil.copytree(EXAMPLES / "commands", home, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    environment |= {"GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "DEVICES": "simulated:2"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["./night.sh"], cwd=home, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    *models, last = done.stdout.splitlines()
    assert last == "1 of 3 failed"
    assert sorted(re.sub(r"loss [\d.]+", "loss", line) for line in models) == [
        "constant: loss with 1 GPUs",
        "cubic: loss with 2 GPUs",
        "line: loss with 1 GPUs",
    ]
    assert "constant does not fit\n" in done.stderr
