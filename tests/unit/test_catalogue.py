"""Tests of the list of sweeps on the pages."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from gpu_launcher.jobs.manifest import Entry
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.jobs.result_table import tabulate
from gpu_launcher.jobs.sweep_overview import DescribedSweep, describe
from gpu_launcher.web import catalogue
from gpu_launcher.web.catalogue import LIST_SECONDS, Catalogue


def write(directory: Path, written: float, parameter: object = 1) -> Path:
    Recorder(directory, [Job(number, "", {"x": parameter}) for number in range(2)], "train.py").close()
    os.utime(directory / DIRECTORY / MANIFEST, (written, written))
    return directory


def names(found: Iterable[catalogue.SweepSummary]) -> list[str]:
    return [summary.directory.name for summary in found]


def test_a_sweep_that_takes_long_each_time_does_not_keep_out_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("oldest", "older", "suspended")):
        write(tmp_path / name, 1000.0 + number)
    now = 0.0

    def slow_describe(directory: Path, entries: Iterable[Entry]) -> DescribedSweep | None:
        nonlocal now
        if directory.name == "suspended":  # its head does not answer
            now += 2 * LIST_SECONDS
        return describe(directory, entries)

    monkeypatch.setattr(catalogue, "describe", slow_describe)
    monkeypatch.setattr(catalogue, "_stamp", lambda directory: None)  # as if it ran
    sweeps = Catalogue([tmp_path], lambda: now)
    found, problems, unread = sweeps.summaries(9)
    assert (names(found), problems, unread) == (["suspended"], [], 2)
    for _ in range(3):
        now += 2.0
        found, problems, unread = sweeps.summaries(9)
        assert (names(found), problems, unread) == (["suspended", "older", "oldest"], [], 0)


def test_a_sweep_that_was_removed_is_listed_no_more(tmp_path: Path) -> None:
    now = 0.0
    sweeps = Catalogue([tmp_path], lambda: now)
    removed = write(tmp_path / "removed", 1000.0)
    write(tmp_path / "kept", 2000.0)
    assert names(sweeps.summaries(9)[0]) == ["kept", "removed"]
    (removed / DIRECTORY / MANIFEST).unlink()
    now += 60.0
    assert names(sweeps.summaries(9)[0]) == ["kept"]


def test_a_sweep_that_cannot_be_compared_is_a_problem_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "deep", 1000.0)
    write(tmp_path / "other", 2000.0)

    def deep(directory: Path, *arguments: object) -> object:
        if directory.name == "deep":
            raise RecursionError("maximum recursion depth exceeded in comparison")
        return tabulate(directory, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(catalogue, "tabulate", deep)
    found, problems, _ = Catalogue([tmp_path]).summaries(9)
    assert names(found) == ["other"]
    assert [problem.endswith("nested too deeply") for problem in problems] == [True]
