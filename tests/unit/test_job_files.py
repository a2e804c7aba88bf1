"""Tests of the files of a job on the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_launcher.jobs.manifest import Entry
from gpu_launcher.web import job_files
from gpu_launcher.web.job_files import JobFiles


def files_of(sweep: Path, log: str) -> JobFiles:
    return JobFiles(sweep, Entry(0, "", [], "a", log=str(sweep / "0" / log)))


def test_a_log_is_found_among_more_files_than_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_files, "MAX_LISTED", 1)
    (tmp_path / "0").mkdir()
    for number in range(100):
        (tmp_path / "0" / f"{number}.ckpt").touch()
    (tmp_path / "0" / "train.log").write_text("begun")
    assert files_of(tmp_path, "train.log").logs == ["train.log"]
    assert files_of(tmp_path, "another.log").logs == []


def test_a_map_has_two_logs_and_those_of_earlier_attempts(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    names = ("stderr.txt", "stdout.txt", "stderr.attempt-1.txt", "stdout.attempt-1.txt", "other.txt")
    for name in names:
        (tmp_path / "0" / name).touch()
    logs = files_of(tmp_path, "stderr.txt").logs
    assert logs[:2] == ["stderr.txt", "stdout.txt"]
    assert sorted(logs) == sorted(set(names) - {"other.txt"})


def test_an_empty_directory_is_listed_and_a_missing_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "0" / "empty").mkdir(parents=True)
    files = files_of(tmp_path, "train.log")
    assert files.listed(("empty",)) == []
    assert files.listed(("missing",)) is None


def test_a_name_that_no_file_can_have_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert files_of(tmp_path, "\ud800.log").logs == []
    with pytest.raises(OSError, match="not a path"):
        files_of(tmp_path, "train.log").open(("\ud800",))
