"""What Optuna promises of a storage, by its own tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.testing.pytest_storages import StorageTestCase

import gpu_launcher


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with tables, because creating them takes most of the time of these tests."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    storage = gpu_launcher.storage(path)
    assert isinstance(storage, RDBStorage)
    storage.engine.dispose()
    return path


class TestSQLiteAsStudiesSeeIt(StorageTestCase):
    @pytest.fixture
    def storage(self, empty: Path, tmp_path: Path) -> BaseStorage:
        return get_storage(gpu_launcher.storage(shutil.copy(empty, tmp_path / "study.db")))
