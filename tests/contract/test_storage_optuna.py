"""What Optuna promises of a storage, by its own tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.storages import BaseStorage, get_storage
from optuna.testing.pytest_storages import StorageTestCase

import gpu_launcher


class TestSQLiteAsStudiesSeeIt(StorageTestCase):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> BaseStorage:
        return get_storage(gpu_launcher.storage(tmp_path / "study.db"))
