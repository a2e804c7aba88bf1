"""The example for PoolExecutor runs as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

if not (ROOT / "examples").is_dir():
    pytest.skip("needs the source tree; only the tests are here", allow_module_level=True)


@pytest.mark.parametrize("devices", ["cpu:2", "simulated:4"])
def test_the_example_cross_validates(tmp_path: Path, devices: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    environment |= {"GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PYTHONWARNINGS": "error::ResourceWarning"}
    script = ROOT / "examples" / "functions" / "folds.py"
    done = subprocess.run(
        [sys.executable, str(script), "--devices", devices],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "ridge 0.1: accuracy 0.934 over 5 folds",
        "ridge 10: accuracy 0.934 over 5 folds",
        "ridge 1000: accuracy 0.875 over 5 folds",
        "ridge -1 failed: ridge must not be negative, and is -1",
    ]
