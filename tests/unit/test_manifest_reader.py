"""Tests that a manifest can be read as it grows, with the same result as reading it whole."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from gpu_launcher.jobs.manifest import ManifestReader, State, read_manifest
from gpu_launcher.jobs.recorder import Recorder


def recorder_of(directory: Path, jobs: int) -> Recorder:
    made = [Job(number, f"lr={number}", [f"lr={number}"]) for number in range(jobs)]
    return Recorder(directory, made, "train.py", how_to_resume="python train.py -m")


def append(directory: Path, text: str) -> None:
    with (directory / DIRECTORY / MANIFEST).open("a") as file:
        file.write(text)


def event(directory: Path, **fields: object) -> str:
    (launch,) = {entry.launch for entry in read_manifest(directory).entries.values()}
    return json.dumps({"format": 1, "launch": launch, "time": 1.0, **fields}) + "\n"


def started(directory: Path, number: int) -> str:
    return event(directory, started=number, attempts=1, devices=["GPU 0"], log="/x/job.log")


def test_what_was_added_is_read(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, 3)
    reader = ManifestReader(tmp_path)
    assert not reader.read()
    assert [entry.state for entry in reader.manifest().entries.values()] == [State.WAITING] * 3
    append(tmp_path, started(tmp_path, 1))
    position = reader.position
    assert not reader.read()
    assert reader.position > position
    assert reader.manifest().entries[1].state is State.RUNNING
    assert reader.manifest() == read_manifest(tmp_path)
    recorder.close()


def test_a_line_that_is_being_written_is_read_when_it_is_complete(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, 1)
    line = started(tmp_path, 0)
    reader = ManifestReader(tmp_path)
    append(tmp_path, line[:20])
    reader.read()
    assert reader.manifest().entries[0].state is State.WAITING
    append(tmp_path, line[20:])
    reader.read()
    assert reader.manifest().entries[0].state is State.RUNNING
    recorder.close()


def test_a_manifest_is_read_in_parts(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, 600)
    reader, parts = ManifestReader(tmp_path), 1
    while reader.read(1000):
        parts += 1
    assert parts >= 3
    assert reader.manifest() == read_manifest(tmp_path)
    assert reader.resume(Path.cwd()) == "python train.py -m"
    assert reader.resume(None) == f"cd {shlex.quote(str(Path.cwd()))} && python train.py -m"
    recorder.close()


def test_jobs_are_lost_only_when_all_of_the_manifest_has_been_read(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, 300)
    append(tmp_path, started(tmp_path, 0))
    append(tmp_path, event(tmp_path, ended=0, outcome="completed", message=None, log=None))
    recorder.close()
    reader = ManifestReader(tmp_path)
    assert reader.read(1)
    states = {entry.state for entry in reader.manifest().entries.values()}
    assert State.LOST not in states
    while reader.read(1000):
        pass
    entries = reader.manifest().entries
    assert entries[0].state is State.COMPLETED
    assert entries[1].state is State.LOST
    reader.read()
    assert reader.manifest() == read_manifest(tmp_path)


@pytest.mark.parametrize("how", ["another", "shorter", "none", "longer"])
def test_a_manifest_that_was_replaced_is_read_from_its_beginning(tmp_path: Path, how: str) -> None:
    recorder_of(tmp_path, 5).close()
    reader = ManifestReader(tmp_path)
    reader.read()
    manifest = tmp_path / DIRECTORY / MANIFEST
    if how == "shorter":
        manifest.write_bytes(b"")
    elif how == "longer":  # has the same inode, as often after `rm -r`
        recorder_of(tmp_path / "longer", 9).close()
        manifest.write_bytes((tmp_path / "longer" / DIRECTORY / MANIFEST).read_bytes())
    else:
        manifest.unlink()
    if how == "another":
        recorder_of(tmp_path, 2).close()
    reader.read()
    assert len(reader.manifest().entries) == {"another": 2, "longer": 9}.get(how, 0)


def test_a_manifest_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    recorder_of(tmp_path, 1).close()
    reader = ManifestReader(tmp_path)
    reader.read()
    append(tmp_path, '{"format": 2}\n')
    for _ in range(2):
        with pytest.raises(ManifestError, match="newer version"):
            reader.read()
