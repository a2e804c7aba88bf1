"""A pool of two simulated devices for each test, and no word of Optuna's beside those that are tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from gpu_launcher.jobs.where import Where


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


@pytest.fixture
def pool(tmp_path: Path) -> Where:
    return Where("simulated:2", tmp_path / "pool")
