from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def pool_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a pool of its own, its subprocesses included, and sees no mask of the machine's."""
    directory = tmp_path / "pool"
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(directory))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return directory
