"""Sweeps and maps in directories that somebody else has written to."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_launcher.cli.job_table import lines as table
from gpu_launcher.cli.job_table import to_json
from gpu_launcher.cli.mapping.map_directory import MapDirectory
from gpu_launcher.cli.mapping.results_file import lines
from gpu_launcher.cli.mapping.resume import EarlierRuns
from gpu_launcher.cli.printing import to_text
from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST, launches_in
from gpu_launcher.jobs.manifest import read
from gpu_launcher.jobs.recorder import Recorder, finished_before
from gpu_launcher.processes.messages import Report

REPOSITORY = Path(__file__).parents[2]
MODE = 0o022
STRANGER = 60003

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as several users")
Done = subprocess.CompletedProcess[str]


def cli(*arguments: str, cwd: Path, **options: Any) -> Done:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GPU_LAUNCHER_POOL_DIR": str(cwd / "pool")}
    command = [sys.executable, "-m", "gpu_launcher.cli", *arguments]
    return subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=500, **options)


def sweep_of(directory: Path, *events: Any) -> Path:
    home = directory / DIRECTORY
    home.mkdir(parents=True, exist_ok=True)
    (home / MANIFEST).write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return directory


def planned(number: Any = 0, label: Any = "lr=1", spec: Any = ("lr=1",), attempts: Any = 0) -> dict[str, Any]:
    return {"format": 1, "launch": "abc", "time": 1.0, "planned": [[number, label, spec, attempts]]}


def event(**values: Any) -> dict[str, Any]:
    return {"format": 1, "launch": "abc", "time": 2.0, "log": None, **values}


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [10**400, "\x1b[2J", "../../x", "x" * 10**6, ["GPU"] * 10**4, float("inf"), "completed", "running"]
    ),
)
NAMES = [
    "format",
    "launch",
    "time",
    "planned",
    "started",
    "ended",
    "attempts",
    "devices",
    "log",
    "outcome",
    "message",
    "pid",
    "left_behind",
]


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), max_size=4), VALUES, VALUES, VALUES)
@settings(max_examples=200, deadline=None)
def test_forged_manifest_neither_crashes_nor_reaches_the_screen(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]], number: Any, label: Any, attempts: Any
) -> None:
    directory = tmp_path_factory.mktemp("sweep")
    full = [{**event(), "attempts": 1, "devices": [], "outcome": "failed", "message": None, **one} for one in events]
    sweep_of(directory, planned(), planned(number, label, attempts=attempts), *events, *full)
    try:
        entries = list(read(directory).values())
    except ManifestError:
        assert any(isinstance(one.get("format"), int) for one in events)  # a newer version's
        return
    for width in (None, 80):
        for line in table(directory, entries, entries, width):
            assert "\x1b" not in to_text(line).plain
    json.dumps(to_json(directory, entries))


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"format": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"null\n[]\n1\n"])
def test_lines_that_are_no_events_count_for_nothing(tmp_path: Path, content: bytes) -> None:
    sweep_of(tmp_path, planned())
    with open(tmp_path / DIRECTORY / MANIFEST, "ab") as file:
        file.write(content)
    assert list(read(tmp_path)) == [0]


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_manifest_that_is_no_file_is_one_line_of_error(tmp_path: Path, kind: str) -> None:
    manifest = sweep_of(tmp_path) / DIRECTORY / MANIFEST
    manifest.unlink()
    make = {"fifo": lambda: os.mkfifo(manifest), "link": lambda: manifest.symlink_to("/etc/passwd")}
    make.get(kind, manifest.mkdir)()
    done = cli("jobs", str(tmp_path), cwd=tmp_path)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be read" in done.stderr


def test_jobs_shows_a_forged_report_without_loading_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    report = b"cos\nmkdir\n(S'" + str(mark).encode() + b"'\ntR."
    sweep_of(tmp_path, planned(), event(started=0, attempts=1, devices=["GPU 0"]))
    (tmp_path / DIRECTORY / "0.abc.report").write_bytes(report)
    for arguments in (["jobs"], ["jobs", "--json"]):
        assert cli(*arguments, str(tmp_path), cwd=tmp_path).returncode == 0
    (tmp_path / DIRECTORY / "0.abc.report").write_bytes(Report(True, None, report, values={"value": 0.25}).dump(0))
    (job,) = json.loads(cli("jobs", "--json", str(tmp_path), cwd=tmp_path).stdout)["jobs"]
    assert job["state"] == "completed"
    assert read(tmp_path)[0].figures.values == {"value": 0.25}
    assert not mark.exists()


def completed_sweep(directory: Path) -> Path:
    sweep_of(directory, planned(spec=["lr=1"]), event(ended=0, outcome="completed", message=None))
    report = directory / DIRECTORY / "0.abc.report"
    report.write_bytes(Report(True, None, b"payload").dump(0))
    report.chmod(0o644)
    return report


def test_own_report_is_used_when_a_sweep_is_resumed(tmp_path: Path) -> None:
    completed_sweep(tmp_path)
    found, skipped = finished_before([Job(0, "lr=1", ["lr=1"])], read(tmp_path))
    assert found[0].payload == b"payload"
    assert skipped == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.chmod(0o664),
        lambda report: report.chmod(0o646),
        lambda report: (report.rename(report.with_name("r")), report.symlink_to(report.with_name("r"))),
        lambda report: (report.unlink(), os.mkfifo(report)),
        lambda report: report.write_bytes(b"other"),
        pytest.param(lambda report: os.chown(report, STRANGER, STRANGER), marks=[root, pytest.mark.root]),
    ],
    ids=["group", "others", "link", "fifo", "damaged", "owner"],
)
def test_report_that_cannot_be_trusted_is_named_and_not_used(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    report = completed_sweep(tmp_path)
    spoil(report)
    found, skipped = finished_before([Job(0, "lr=1", ["lr=1"])], read(tmp_path))
    assert found == {}
    assert str(report) in skipped[0]


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_recorder_leaves_nothing_that_others_can_write(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        recorder = Recorder(tmp_path / "sweep", [Job(0, "", [])], "train.py")
    finally:
        os.umask(before)
    home = tmp_path / "sweep" / DIRECTORY
    assert [path.name for path in (home, *home.iterdir()) if stat.S_IMODE(path.stat().st_mode) & MODE] == []
    recorder.close()


@pytest.mark.parametrize("name", [MANIFEST, "launch-x.json", "lock"])
def test_link_in_place_of_a_file_of_ours_is_not_followed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    home = tmp_path / "sweep" / DIRECTORY
    home.mkdir(parents=True)
    (home / name).symlink_to(target)
    refused = pytest.raises(ManifestError) if name == MANIFEST else contextlib.nullcontext()
    with refused:
        Recorder(tmp_path / "sweep", [Job(0, "", [])], "train.py").close()
    assert target.read_text() == "untouched"


@pytest.mark.parametrize(
    "change",
    [
        *({"pid": pid} for pid in (1, 10**400, -1, True)),
        {"start": "now"},
        {"host": ["h"]},
        {"host": "h" * 10**6},
        {"command": 5},
    ],
)
def test_forged_launch_is_nobodys(tmp_path: Path, change: dict[str, Any]) -> None:
    home = tmp_path / DIRECTORY
    home.mkdir()
    content = {**ProcessIdentity.here().to_json(), "command": "\x1b[2Jtrain.py"}
    (home / "launch-a.json").write_text(json.dumps(content))
    (launch,) = launches_in(tmp_path)
    assert (launch.is_alive, launch.command) == (True, "train.py")
    (home / "launch-a.json").write_text(json.dumps({**content, **change}))
    assert not any(launch.is_alive for launch in launches_in(tmp_path))


@root
@pytest.mark.root
def test_launch_file_of_another_user_does_not_name_our_process(tmp_path: Path) -> None:
    home = tmp_path / DIRECTORY
    home.mkdir()
    file = home / "launch-a.json"
    file.write_text(json.dumps({**ProcessIdentity.here().to_json(), "command": "train.py"}))
    os.chown(file, STRANGER, STRANGER)
    (launch,) = launches_in(tmp_path)
    assert launch.is_alive is False


ROW = {
    **dict.fromkeys(("index", "exit_code", "attempts"), 0),
    **dict.fromkeys(("outcome", "directory", "stdout", "stderr"), "completed"),
    "params": {"x": 1},
    "duration": 1.0,
    "devices": [],
    "message": None,
    "output": None,
}


@given(st.dictionaries(st.sampled_from(sorted(ROW)), VALUES), st.binary(max_size=20))
@settings(max_examples=200, deadline=None)
def test_forged_results_of_a_map_are_left_out(
    tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any], outcome: bytes
) -> None:
    place = MapDirectory(tmp_path_factory.mktemp("map"))
    place.results.write_text(f"{json.dumps({**ROW, **change})}\n{json.dumps({**ROW, 'index': 3})}\n")
    (place.path / "1").mkdir()
    (place.path / "1" / "outcome.json").write_bytes(outcome)
    (place.path / ("9" * 200)).mkdir()
    assert 3 in EarlierRuns.of(place)
    assert all(isinstance(line["params"], dict) for line in lines(place.results))


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    """A map with one run that failed."""
    command = [
        "map",
        "--devices",
        "cpu:1",
        "--dir",
        "m",
        "--param",
        "x=1",
        "--",
        "sh",
        "-c",
        "test -e ok; exit $?",
        "{x}",
    ]
    assert cli(*command, cwd=tmp_path).returncode == 1
    (tmp_path / "ok").touch()
    return tmp_path


def settings_of(directory: Path) -> Path:
    return directory / "m" / DIRECTORY / "map.json"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.chmod(0o666),
        pytest.param(lambda file: os.chown(file, STRANGER, STRANGER), marks=[root, pytest.mark.root]),
    ],
    ids=["mode", "owner"],
)
def test_command_of_another_users_map_is_shown_and_asked_for(mapped: Path, spoil: Callable[[Path], object]) -> None:
    spoil(settings_of(mapped))
    refused = cli("map", "--resume", "m", cwd=mapped, stdin=subprocess.DEVNULL)
    assert refused.returncode == 2
    assert "sh -c 'test -e ok; exit $?' '{x}'" in refused.stderr
    assert "answer y on a terminal" in refused.stderr
    for answer, code in ((b"\n", 2), (b"n\n", 2), (b"y\n", 0)):
        terminal, stdin = pty.openpty()
        os.write(terminal, answer)
        done = cli("map", "--resume", "m", cwd=mapped, stdin=stdin)
        os.close(stdin)
        os.close(terminal)
        assert done.returncode == code, done.stderr


def test_command_that_is_given_again_is_not_asked_for(mapped: Path) -> None:
    settings_of(mapped).chmod(0o666)
    done = cli("map", "--resume", "m", "--", "sh", "-c", "test -e ok; exit $?", "{x}", cwd=mapped)
    assert done.returncode == 0, done.stderr


def test_nodes_of_another_users_map_are_shown_and_asked_for(mapped: Path) -> None:
    settings = json.loads(settings_of(mapped).read_text())
    settings["options"]["nodes"] = ["command:touch entered"]
    settings_of(mapped).write_text(json.dumps(settings))
    settings_of(mapped).chmod(0o666)
    command = ("--", "sh", "-c", "test -e ok; exit $?", "{x}")
    refused = cli("map", "--resume", "m", *command, cwd=mapped, stdin=subprocess.DEVNULL)
    assert refused.returncode == 2
    assert "on the nodes ['command:touch entered']" in refused.stderr
    assert "give --nodes and the command itself" in refused.stderr
    done = cli("map", "--resume", "m", "--nodes", "local", *command, cwd=mapped)
    assert done.returncode == 0, done.stderr
    assert not (mapped / "entered").exists()


@pytest.mark.parametrize("name", ["0", "0/stdout.txt", "0/stderr.txt", "results.jsonl"])
def test_map_writes_through_no_link(mapped: Path, name: str) -> None:
    victim = mapped / "victim"
    path = mapped / "m" / name
    if name == "0":
        victim.mkdir()
        path.rename(mapped / "away")
    else:
        victim.write_text("untouched")
        path.unlink()
    path.symlink_to(victim)
    done = cli("map", "--resume", "m", cwd=mapped)
    if name == "0":
        assert list(victim.iterdir()) == []
        assert done.returncode == 1
    else:
        assert victim.read_text() == "untouched"
