"""How a sweep ended, as its directory tells."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.directory import DirectoryLock
from gpu_launcher.jobs.ending import Ending, ending_of, recorded_end
from gpu_launcher.jobs.events import JobEnded, Outcome
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.recorder import Recorder, record_end


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    launch(tmp_path / "sweep", Outcome.COMPLETED)
    return tmp_path / "sweep"


def launch(directory: Path, *outcomes: Outcome) -> None:
    """Let a launch run jobs that end so."""
    recorder = Recorder(directory, [Job(number, "", []) for number in range(len(outcomes))], "train.py")
    for number, outcome in enumerate(outcomes):
        recorder.handle(JobEnded(0.0, number, "", (), outcome, 1.0, None, None))
    recorder.close()


def ended(directory: Path) -> Ending:
    ending = ending_of(directory)
    assert ending is not None
    return ending


def exits(directory: Path, error: BaseException) -> int:
    with suppress(BaseException), recorded_end(directory):
        launch(directory, Outcome.COMPLETED)
        raise error
    return ended(directory).exit_code


def test_recorded_exit_code_is_that_of_the_exception_that_ends_the_sweep(sweep: Path) -> None:
    with recorded_end(sweep) as end:
        pass
    assert ended(sweep).text == "sweep has ended with exit code 0. 1 job (1 completed)"
    with recorded_end(sweep) as end:
        end.value = 3
    assert ended(sweep).exit_code == 3
    assert exits(sweep, ValueError()) == 1
    assert exits(sweep, KeyboardInterrupt()) == 130
    assert exits(sweep, SystemExit(143)) == 143
    assert exits(sweep, SystemExit(-1)) == 255
    assert exits(sweep, SystemExit()) == 0
    assert exits(sweep, SystemExit("text")) == 1


def test_refused_launch_changes_nothing(sweep: Path) -> None:
    record_end(sweep, 7)
    before = (sweep / DIRECTORY / "manifest.jsonl").read_bytes()
    with pytest.raises(ValueError, match="an option"), recorded_end(sweep):
        raise ValueError("an option")
    assert (sweep / DIRECTORY / "manifest.jsonl").read_bytes() == before


def test_exit_code_of_an_earlier_launch_does_not_count(sweep: Path) -> None:
    record_end(sweep, 7)
    assert ended(sweep).exit_code == 7
    launch(sweep, Outcome.COMPLETED)
    assert ended(sweep).exit_code == 0
    launch(sweep, Outcome.COMPLETED, Outcome.FAILED)
    assert ended(sweep).exit_code == 1


def test_sweep_that_never_had_jobs_did_not_succeed(tmp_path: Path) -> None:
    DirectoryLock.take(tmp_path, "train.py", "").close()
    record_end(tmp_path, 0)  # there is no manifest
    assert ended(tmp_path).exit_code == 1
    assert "it ended before it had jobs" in ended(tmp_path).text


def test_sweep_runs_until_its_program_releases_the_directory(sweep: Path) -> None:
    lock = DirectoryLock.take(sweep, "train.py", "")
    record_end(sweep, 0)
    assert ending_of(sweep) is None
    lock.close()
    assert ended(sweep).exit_code == 0


@pytest.mark.parametrize("name", ["lock", "launch-abc.json"])
def test_killed_program_is_noticed_although_an_exit_code_was_recorded(sweep: Path, name: str) -> None:
    record_end(sweep, 0)
    dead = replace(ProcessIdentity.here(), start=1)
    (sweep / DIRECTORY / name).write_text(json.dumps({**dead.to_json(), "command": "train.py"}))
    assert ended(sweep) == Ending(
        1, True, f"sweep has ended: process {dead.pid} (train.py) was killed, or crashed. 1 job (1 completed)"
    )


def test_sweep_of_another_machine_is_unknown(sweep: Path) -> None:
    other = replace(ProcessIdentity.here(), boot="another", host="gpu7")
    (sweep / DIRECTORY / "lock").write_text(json.dumps({**other.to_json(), "command": "train.py"}))
    with pytest.raises(SteeringError, match=r"sweep is run by process \d+ \(train.py\) on gpu7, which cannot be"):
        ending_of(sweep)


def test_garbage_in_the_manifest_is_no_exit_code(sweep: Path) -> None:
    with (sweep / DIRECTORY / "manifest.jsonl").open("a") as manifest:
        for code in (-1, 256, "0", None, True):
            manifest.write(json.dumps({"format": 1, "exit_code": code}) + "\n")
    assert ended(sweep).exit_code == 0
