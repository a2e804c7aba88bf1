"""What is kept about a job for tables: what it returned, and its peak memory."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from gpu_launcher.devices import Condition, GpuProcess, memory_of
from hydra_plugins.gpu_pool_launcher._results import table_values

MIB = 2**20


class Hostile(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("returned", "values"),
    [
        (None, {}),
        ("text", {}),
        (0.5, {"value": 0.5}),
        (3, {"value": 3}),
        (True, {"value": True}),
        (10**400, {}),
        (10**20, {"value": 1e20}),
        (np.float32(0.5), {"value": 0.5}),
        (np.array([2.0]).reshape(()), {"value": 2.0}),
        (math.inf, {"value": math.inf}),
        ((1, 2.5), {"values_0": 1, "values_1": 2.5}),
        ([0.5, "x"], {"values_0": 0.5}),
        ([0.5] * 17, {}),
        ({"loss": np.float64(0.5), "name": "a", "list": [1], 3: 4}, {"loss": 0.5, "name": "a"}),
        ({"text": "x" * 201, "n": 1}, {"n": 1}),
        (Hostile(a=1), {}),
        (object(), {}),
    ],
)
def test_numbers_and_named_values_get_into_tables(returned: object, values: dict[str, Any]) -> None:
    assert table_values(returned) == values


def test_at_most_64_values_get_into_tables() -> None:
    assert len(table_values({str(number): number for number in range(99)})) == 64


def test_memory_on_a_device_is_that_of_all_processes_of_the_job() -> None:
    processes = (
        GpuProcess(7, 3 * MIB, ancestors=(1,)),
        GpuProcess(8, 5 * MIB, ancestors=(7, 1)),
        GpuProcess(9, 11 * MIB, ancestors=(1,)),
        GpuProcess(10, None, ancestors=(7, 1)),
        GpuProcess(11, 2 * MIB),
    )
    assert memory_of(7, Condition("GPU-1", processes=processes)) == 8 * MIB
    assert memory_of(12, Condition("GPU-1", processes=processes)) is None
    assert memory_of(7, Condition("GPU-1")) is None


SUPERVISION = """
import os
from gpu_launcher.processes.tree import ProcessTree

child = os.fork()
if child == 0:
    data = b"x" * (300 * 2**20)  # 300 MiB that are really written
    os._exit(0 if data else 1)
tree = ProcessTree(child, None)  # it does not wait for signals
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
assert tree.is_gone()
print(tree.status, tree.peak_memory)
"""


def test_peak_memory_is_that_of_the_processes_that_ended() -> None:
    # In a process of its own, because a tree reaps all children of its process.
    command = [sys.executable, "-c", SUPERVISION]
    status, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert status == 0
    assert 300 * MIB < peak < 2**40
