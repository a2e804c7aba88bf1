"""The search for sweeps, and the sweep that a command is about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from gpu_launcher.jobs.manifest import read_chosen_sweep
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.jobs.sweep_finder import chosen_sweep, newest_sweep, running_sweep, sweeps_below


def test_the_newest_sweep_is_the_one_that_wrote_last(tmp_path: Path) -> None:
    assert newest_sweep(tmp_path / "nothing", tmp_path) is None
    times = {"multirun/2026-01-01/10-00-00": 30, "multirun/2026-01-02/09-00-00": 20, "grid": 10, "a/b/c/d/too-deep": 99}
    for name, at in {**times, "grid/0/inner": 99}.items():
        manifest = tmp_path / name / ".gpu_launcher" / "manifest.jsonl"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (at, at))
    assert newest_sweep(tmp_path) == tmp_path / "multirun/2026-01-01/10-00-00"
    assert newest_sweep(tmp_path / "grid") == tmp_path / "grid"
    assert newest_sweep(tmp_path / "multirun", tmp_path / "a") == tmp_path / "a/b/c/d/too-deep"


def test_sweeps_of_a_lightning_template_are_found_and_hidden_directories_are_skipped(tmp_path: Path) -> None:
    for name in ("logs/train/multiruns/2026-01-01_10-00-00", ".cache/old"):
        manifest = tmp_path / name / ".gpu_launcher" / "manifest.jsonl"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
    assert sweeps_below(tmp_path) == [tmp_path / "logs/train/multiruns/2026-01-01_10-00-00"]
    assert sweeps_below(tmp_path / ".cache") == [tmp_path / ".cache/old"]


def test_sweeps_are_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    for name, at in {"a": 1, "b": 3, "c": 2}.items():
        manifest = tmp_path / name / ".gpu_launcher" / "manifest.jsonl"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (at, at))
    assert sweeps_below(tmp_path, tmp_path / "a") == [tmp_path / "b", tmp_path / "c", tmp_path / "a"]


def test_newest_sweep_below_the_current_directory_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError, match="no sweep below the current directory"):
        chosen_sweep(None)
    Recorder(tmp_path / "multirun/2026-01-01/10-00-00", [Job(3, "lr=1", ["lr=1"])], "train.py").close()
    directory, manifest = read_chosen_sweep(None)
    assert (directory, list(manifest.entries)) == (Path("multirun/2026-01-01/10-00-00"), [3])
    assert chosen_sweep(Path("elsewhere")) == Path("elsewhere")


def test_running_sweep_that_was_started_last_is_found(tmp_path: Path) -> None:
    sweeps = [tmp_path / name for name in ("first", "second", "third")]
    recorders = [Recorder(directory, [Job(0, "", [])], "train.py") for directory in sweeps]
    for at, (directory, recorder) in enumerate(zip(sweeps, recorders, strict=True)):
        (launch,) = recorder.directory.glob("launch-*.json")
        os.utime(launch, (at, at))
        os.utime(directory / DIRECTORY / MANIFEST, (9 - at, 9 - at))  # the first one has written last
    recorders[2].close()
    assert running_sweep(tmp_path) == sweeps[1]
    (launch,) = recorders[1].directory.glob("launch-*.json")
    launch.write_text(launch.read_text().replace(f'"pid": {os.getpid()}', '"pid": 1'))
    assert running_sweep(tmp_path) == sweeps[0], "the second one was killed"
    recorders[0].close()
    assert running_sweep(tmp_path) is None


def test_sweep_without_jobs_is_said_to_have_none(tmp_path: Path) -> None:
    Recorder(tmp_path, [], "train.py").close()
    with pytest.raises(ManifestError, match="has no jobs"):
        read_chosen_sweep(tmp_path)
