"""docs/steering.md is run: its commands steer the map that it shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.manifest import read
from gpu_launcher.jobs.steering import Sweep
from tests.docs.test_walkthroughs import DOCS, blocks, pattern
from tests.waiting import until


def running(directory: Path) -> int:
    try:
        return int(Sweep(directory).status()["running"])
    except SteeringError:
        return 0


def states(directory: Path) -> list[str]:
    return [entry.state.value for entry in read(directory).values()]


def test_the_page_goes_as_it_says(tmp_path: Path) -> None:
    text = (DOCS / "steering.md").read_text()
    (map_,) = re.findall(r"^gpu-launcher map .*$", text, flags=re.MULTILINE)
    (console,) = blocks(text, "console")
    steps = [part.partition("\n") for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "HYDRA_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["GPU_LAUNCHER_POOL_DIR"] = str(tmp_path / "pool")
    process = subprocess.Popen(
        shlex.split(map_), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: running(tmp_path / "sweep") == 2, "the map does not run")
        until(lambda: "this" in "".join(file.read_text() for file in tmp_path.glob("sweep/0/stdout.txt")))
        for command, _, expected in steps:
            done = subprocess.run(
                f"exec 2>&1; {command}", shell=True, cwd=tmp_path, env=environment, capture_output=True, timeout=100
            )
            output = done.stdout.decode()
            assert re.fullmatch(pattern(expected), output), f"$ {command}\n{output}"
            if command.startswith("gpu-launcher cancel"):  # job 2 gets its device, and then the next ones are asked for
                until(lambda: states(tmp_path / "sweep")[:4] == ["cancelled", "running", "running", "cancelled"])
            if command.startswith("gpu-launcher log 1"):
                process.wait(100)
        assert process.wait(100) == 130
    finally:
        process.kill()
        process.communicate()
