"""Tests that jobs can use files that are open when a sweep begins."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def swept(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory and stderr of a sweep whose jobs raise if they read wrong data."""
    directory = tmp_path_factory.mktemp("swept")
    retries = ("hydra.launcher.retries=1", "hydra.launcher.retry_on=[exception]")
    done = run(directory, "open_files.py", "-m", "+i=0,1,2,3", "+reads=400", *retries)
    assert done.returncode == 0, done.stderr
    return directory, done.stderr


def test_jobs_and_retries_read_what_is_in_files_opened_at_import(swept: tuple[Path, str]) -> None:
    assert "4 completed" in swept[1]


def test_lines_that_jobs_write_to_a_file_opened_at_import_are_kept(swept: tuple[Path, str]) -> None:
    first, *lines = (swept[0] / "log.txt").read_text().splitlines()
    assert first == "begun"
    attempts = [(0, 1), (1, 1), (2, 1), (2, 2), (3, 1)]
    assert sorted(lines) == [f"job {job}, attempt {attempt}" for job, attempt in attempts]


def test_one_notice_names_the_database_and_the_files_for_writing(swept: tuple[Path, str]) -> None:
    (notice,) = [line for line in swept[1].splitlines() if "files that are open" in line]
    assert f"jobs must not use the program's connection to {swept[0] / 'runs.db'} (SQLite)" in notice
    assert f"jobs that write to {swept[0] / 'cache.bin'} may overwrite each other's data" in notice
    assert str(swept[0] / "log.txt") not in notice
    assert "/data." not in notice
