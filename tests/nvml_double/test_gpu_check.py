"""`tools/gpu_check.py`: without a GPU, and, for its logic, on the double's with as much of a torch as that takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Machine  # type: ignore[import-not-found]

CHECK = Path(__file__).parents[2] / "tools" / "gpu_check.py"
TORCH = """
import os, re, types

class OutOfMemoryError(RuntimeError):
    pass

uint8 = None
TOTAL = 24 * 2**30

class Block:
    def __init__(self, size):
        limits = re.findall("per_process_memory_fraction:([0-9.]+)", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
        if size > TOTAL * float(([1] + limits)[-1]):
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate too much")
    def __getitem__(self, _):
        return self
    def fill_(self, _):
        pass
    def sum(self):
        return 1024

def empty(size, dtype, device):
    return Block(size)

class cuda:
    device_count = staticmethod(lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    get_device_name = staticmethod(lambda index: "NVIDIA Double")
    get_device_properties = staticmethod(lambda index: types.SimpleNamespace(total_memory=TOTAL))
    synchronize = staticmethod(lambda: None)
    is_initialized = staticmethod(lambda: False)
"""
needs_tools = pytest.mark.skipif(not CHECK.exists(), reason="tools/ is not here")


def check(machine: Machine, *arguments: str, **environ: str) -> tuple[int, dict[str, str]]:
    """Its exit status, and what it says by check: the outcome, and the rest of the line."""
    done = subprocess.run(
        [sys.executable, str(CHECK), *arguments],
        env=machine.environment(**environ),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.stderr == ""
    lines = {line[6:24].strip(): f"{line[:4].strip()} {line[35:]}" for line in done.stdout.splitlines()}
    return done.returncode, lines or {"": done.stdout}


@needs_tools
@pytest.mark.smoke
def test_without_a_gpu_it_says_so_and_exits_with_77(machine_without_driver: Machine) -> None:
    command = [sys.executable, str(CHECK)]
    environ = machine_without_driver.environment()
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stderr) == (77, "")
    assert done.stdout == "skip  no usable NVIDIA GPU on this machine: nothing was checked\n"


@needs_tools
def test_each_check_prints_one_line_and_failures_do_not_stop_it(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    machine.has("count 1", *machine.gpu(0, "GPU-a", "memory_used 0", "utilization 0"))
    paths = f"{tmp_path}:{Path(__file__).parents[2]}"
    status, lines = check(machine, PYTHONPATH=paths)
    assert status == 1
    for name in ("probe", "conditions", "masks", "uuids", "fork with torch", "out of memory", "enforce memory"):
        assert lines[name].startswith("ok "), lines[name]
    for name in ("sharing", "idle gap"):
        assert lines[name].startswith("ok "), lines[name]
    # The double has no CUDA that a program could have initialised, and no memory that one could use.
    for name in ("spawn after cuda", "results on the cpu", "foreign process"):
        assert lines[name].startswith("FAIL "), lines[name]
    assert len(lines) == 12, lines
