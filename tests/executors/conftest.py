"""A pool of two simulated devices for each test, whose remarks are new to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_launcher.jobs import remarks
from gpu_launcher.jobs.where import Where


@pytest.fixture
def pool(tmp_path: Path) -> Where:
    return Where("simulated:2", tmp_path / "pool")


@pytest.fixture(autouse=True)
def remarks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remarks, "_said", set())
