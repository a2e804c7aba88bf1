"""A pool of two simulated devices for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_launcher.jobs.where import Where


@pytest.fixture
def pool(tmp_path: Path) -> Where:
    return Where("simulated:2", tmp_path / "pool")
