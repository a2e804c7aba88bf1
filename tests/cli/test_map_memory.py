"""Tests `gpu-launcher map --memory auto` on a GPU whose driver reports what each run uses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Machine

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        str(Path("/proc/self/ns/pid").readlink()) != "pid:[4026531836]",
        reason="the driver's process ids belong to another namespace",
    ),
]

GIB = 2**30
RUN = """
import os, sys, time
from pathlib import Path
use = Path("use")
mine = use / str(os.getpid())
mine.touch()
until = time.monotonic() + 8
while time.monotonic() < until and not Path("packed").exists():
    if len(list(use.iterdir())) > 1:
        try:
            Path("packed").touch(exist_ok=False)
        except FileExistsError:
            break
        mine.unlink()
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    time.sleep(0.05)
mine.unlink()
"""


def test_runs_share_a_gpu_once_their_memory_is_known_and_one_that_lacks_it_runs_alone(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "use").mkdir()
    (tmp_path / "run.py").write_text(RUN)
    machine.has("count 1", *machine.gpu(0, "GPU-a"))
    words = ["map", "--param", "n=range(40)", "--memory", "auto", "--dir", "out", "--", sys.executable, "run.py", "{n}"]
    with subprocess.Popen(
        [sys.executable, "-m", "gpu_launcher.cli", *words],
        cwd=tmp_path,
        env=machine.environment(GPU_LAUNCHER_POOL_DIR=str(tmp_path / "pool")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            while program.poll() is None:
                running = [path.name for path in (tmp_path / "use").iterdir()]
                uses = " ".join(f"{pid}:{4 * GIB}" for pid in running)
                used = (f"memory_used {4 * GIB * len(running)}", f"compute {uses}") if running else ()
                machine.has("count 1", *machine.gpu(0, "GPU-a", *used))
                time.sleep(0.05)
            _, err = program.communicate(timeout=60)
        finally:
            program.kill()
    assert program.returncode == 0, err
    assert (tmp_path / "packed").exists(), "two runs were on the GPU at once"
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert {line["outcome"] for line in lines} == {"completed"}
    assert "40 jobs: 40 completed" in err
    assert "attempt 2 of 2 follows" in err
    assert "1 attempt repeated" in err, "a run that was packed too tightly is run again, although there are no retries"
