"""CPython's own tests of executors pass with PoolExecutor; each exception is explained in cpython_suite.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("cpython_suite.py")

CLASSES = {"ExecutorTest": 9, "ProcessPoolTest": 11, "WaitTest": 8, "AsCompletedTest": 5, "ShutdownTest": 8}
CLASSES["DeadlockTest"] = 13
"""How many tests run at least; newer versions of Python have more."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("method", "gpus"),
    [("fork", 1), pytest.param("spawn", 0, marks=pytest.mark.slow), pytest.param("nodes", 1, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", CLASSES)
def test_the_standard_librarys_tests_pass(tmp_path: Path, name: str, method: str, gpus: int) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (str(SUITE.parent), *sys.path) if path)
    done = subprocess.run(
        [sys.executable, SUITE, method, str(gpus), tmp_path / "pool", name],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this Python comes without its own tests (the package `test`)")
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.search(r"^Ran (\d+) tests?", done.stderr, re.MULTILINE)
    assert ran is not None, done.stderr
    assert int(ran.group(1)) >= CLASSES[name]
