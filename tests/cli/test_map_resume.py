"""Tests how `gpu-launcher map` resumes: what it keeps, refuses and says. Also tests the directories that it creates."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.small_disk import fill, mounted_tmpfs

CLI = (sys.executable, "-m", "gpu_launcher.cli")
REPOSITORY = Path(__file__).parents[2]
SIMULATED = ("--devices", "simulated:2", "--max-parallel", "1")
ONE_TO_THREE = "".join(f'{{"n": {n}}}\n' for n in (1, 2, 3))
FAIL_AT_2 = ("sh", "-c", "echo {n} >> ran; test {n} != 2 || test -e mended")

Done = subprocess.CompletedProcess[str]


class Map:
    """Runs `gpu-launcher map` in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "GPU_LAUNCHER_"))}
        self.environ = {**kept, "PYTHONPATH": str(REPOSITORY), "GPU_LAUNCHER_POOL_DIR": str(path / "pool")}

    def __call__(self, *words: str, input: str = "", program: tuple[str, ...] = (*CLI, "map")) -> Done:
        return subprocess.run(
            [*program, *words],
            cwd=self.path,
            env=self.environ,
            input=input,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    def results(self, directory: str = "out") -> dict[int, str]:
        """The outcome of each run, by index. Each run must have at most one."""
        text = (self.path / directory / "results.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert len({line["index"] for line in lines}) == len(lines)
        return {line["index"]: line["outcome"] for line in sorted(lines, key=lambda line: line["index"])}

    def ran(self) -> list[str]:
        return (self.path / "ran").read_text().split()

    def everything(self, directory: str = "out") -> dict[str, bytes]:
        """The contents of all files except the lock."""
        files = [path for path in (self.path / directory).rglob("*") if path.is_file() and path.name != "lock"]
        return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def run_map(tmp_path: Path) -> Map:
    return Map(tmp_path)


@pytest.fixture
def failed_once(run_map: Map) -> Map:
    """A map of a file with three records, whose second run failed."""
    (run_map.path / "p.jsonl").write_text(ONE_TO_THREE)
    assert run_map("--from", "p.jsonl", *SIMULATED, "--dir", "out", "--", *FAIL_AT_2).returncode == 1
    assert run_map.results() == {0: "completed", 1: "failed", 2: "completed"}
    return run_map


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "size=64k"):
        yield tmp_path / "disk"


def test_a_lost_table_of_results_is_made_of_what_the_runs_left(failed_once: Map) -> None:
    table = failed_once.path / "out" / "results.jsonl"
    before = {line["index"]: line for line in map(json.loads, table.read_text().splitlines())}
    table.unlink()
    assert failed_once("--resume", "out").returncode == 1
    after = {line["index"]: line for line in map(json.loads, table.read_text().splitlines())}
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1]["attempts"] == 2


# Inputs that have changed


def test_a_file_that_got_shorter_is_refused_and_nothing_is_changed(failed_once: Map) -> None:
    before = failed_once.everything()
    (failed_once.path / "p.jsonl").write_text(ONE_TO_THREE.splitlines()[0])
    refused = failed_once("--resume", "out")
    assert refused.returncode == 2
    assert "--from: " in refused.stderr
    assert "p.jsonl has 1 run, and this map had 3 before: put back what is missing" in refused.stderr
    assert failed_once.everything() == before


def test_lines_that_cannot_be_used_count_so_that_a_spoilt_file_is_not_a_shorter_one(failed_once: Map) -> None:
    lines = ONE_TO_THREE.splitlines(keepends=True)
    (failed_once.path / "p.jsonl").write_text(f"{lines[0]}{lines[1]}spoilt\n")
    (failed_once.path / "mended").touch()
    resumed = failed_once("--resume", "out", "--keep-going")
    assert resumed.returncode == 1, "the spoilt line"
    assert failed_once.results() == dict.fromkeys(range(3), "completed")


@pytest.mark.parametrize("stream", ["", '{"n": 1}\n'])
def test_what_a_stream_does_not_bring_again_has_not_completed_and_keeps_its_result(run_map: Map, stream: str) -> None:
    words = ("--from", "-", *SIMULATED, "--dir", "out")
    assert run_map(*words, "--", *FAIL_AT_2, input=ONE_TO_THREE).returncode == 1
    resumed = run_map("--resume", "out", input=stream)
    assert resumed.returncode == 1
    assert "1 run that did not complete before, such as 1, did not come in again" in resumed.stderr
    assert run_map.results() == {0: "completed", 1: "failed", 2: "completed"}
    (run_map.path / "mended").touch()
    assert run_map("--resume", "out", input=ONE_TO_THREE).returncode == 0
    assert run_map.results() == dict.fromkeys(range(3), "completed")
    assert run_map.ran() == ["1", "2", "3", "2"]
    assert run_map("--resume", "out").returncode == 0, "all that is known of has completed"


# Refused resumptions


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--gpus", "9"], "--gpus: the request"),
        (["--devices", "x"], "--devices: "),
        (["--timeout", "x"], "--timeout: "),
        (["--pool-dir", "/proc/nowhere"], "pool directory /proc/nowhere"),
        (["--from", "gone.jsonl"], "--from: gone.jsonl cannot be read"),
    ],
)
def test_a_refused_resumption_changes_nothing(failed_once: Map, words: list[str], problem: str) -> None:
    before = failed_once.everything()
    refused = failed_once("--resume", "out", *words)
    assert refused.returncode == 2, refused.stderr
    assert problem in refused.stderr
    assert "Traceback" not in refused.stderr
    assert failed_once.everything() == before


def test_what_failed_keeps_its_result_until_it_has_another(run_map: Map) -> None:
    """Three runs failed. The first of them fails again and stops the resumption."""
    words = ("--param", "n=1,2,3", *SIMULATED, "--dir", "out")
    assert run_map(*words, "--", "sh", "-c", "test {n} = 9; exit 7").returncode == 1
    lines = (run_map.path / "out" / "results.jsonl").read_text().splitlines()
    before = {json.loads(line)["index"]: line for line in lines}
    resumed = run_map("--resume", "out", "--stop-on-failure")
    assert resumed.returncode == 1
    assert sorted(run_map.results()) == [0, 1, 2]
    after = {
        json.loads(line)["index"]: line for line in (run_map.path / "out" / "results.jsonl").read_text().splitlines()
    }
    assert json.loads(after[0])["attempts"] == 2
    assert after[2] == before[2], "it did not run again; the one before it may have begun to"


# Directories that cannot be used


def test_on_a_full_disk_no_map_is_begun_and_when_there_is_room_it_is(run_map: Map, small_disk: Path) -> None:
    words = ("--param", "n=1", *SIMULATED, "--dir", "disk/m")
    filler = fill(small_disk)
    refused = run_map(*words, "--", "echo", "{n}")
    assert refused.returncode == 2
    assert (
        "--dir: disk/m cannot be created, because there is no room (No space left on device): make room"
        in refused.stderr
    )
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    assert run_map(*words, "--", "echo", "{n}").returncode == 0
    assert run_map.results("disk/m") == {0: "completed"}


def test_what_a_kill_left_of_a_map_that_was_being_made_is_in_nobodys_way(run_map: Map) -> None:
    left = run_map.path / "out" / ".gpu_launcher"
    left.mkdir(parents=True)
    (left / "map.json").touch()
    refused = run_map("--resume", "out")
    assert refused.returncode == 2
    assert "out/.gpu_launcher/map.json is damaged" in refused.stderr
    assert run_map("--param", "n=1", *SIMULATED, "--dir", "out", "--", "echo", "{n}").returncode == 0
    assert run_map.results() == {0: "completed"}


def test_a_damaged_map_that_has_runs_is_kept(failed_once: Map) -> None:
    (failed_once.path / "out" / ".gpu_launcher" / "map.json").write_text("{")
    before = failed_once.everything()
    refused = failed_once("--param", "n=1", *SIMULATED, "--dir", "out", "--", "echo", "{n}")
    assert refused.returncode == 2
    assert "out/results.jsonl exists already: name another directory" in refused.stderr
    assert failed_once.everything() == before


@pytest.mark.parametrize("name", ["0/params.json", "7/stdout.txt", "12", "results.csv", "results.jsonl"])
def test_nothing_of_the_users_is_written_over(run_map: Map, name: str) -> None:
    theirs = run_map.path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    refused = run_map("--param", "n=1", *SIMULATED, "--dir", "theirs", "--", "echo", "{n}")
    assert refused.returncode == 2
    assert f"--dir: theirs/{name.partition('/')[0]} exists already" in refused.stderr
    assert run_map.everything("theirs") == {str(theirs): b"mine"}


@pytest.mark.parametrize("option", ["--dir", "--resume"])
def test_an_empty_name_is_no_directory(run_map: Map, option: str) -> None:
    refused = run_map("--param", "n=1", *SIMULATED, option, "", "--", "echo", "{n}")
    assert refused.returncode == 2
    assert f"{option}: the name is empty" in refused.stderr
    assert list(run_map.path.iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("words", [(), ("--dir", "a/b")])
def test_what_was_made_for_a_map_that_is_refused_is_removed_again(
    run_map: Map, words: tuple[str, ...], there: bool
) -> None:
    kept = run_map.path / ("a/b" if words else "map")
    if there:
        kept.mkdir(parents=True)
    refused = run_map("--param", "n=1", "--gpus", "9", *SIMULATED, *words, "--", "echo", "{n}")
    assert refused.returncode == 2
    left = sorted(run_map.path.rglob("*"))
    assert left == ([path for path in (kept.parent, kept) if path != run_map.path] if there else [])


# Advice on how to resume


def test_the_way_to_go_on_can_be_given_to_a_shell(run_map: Map) -> None:
    words = ("--param", "n=1,2", *SIMULATED, "--dir", "my results; touch evil")
    failed = run_map(*words, "--", *FAIL_AT_2)
    (command,) = re.findall(r"to run the rest: gpu-launcher (map .*)", failed.stderr)
    again = run_map(*words, "--", *FAIL_AT_2)
    assert again.returncode == 2
    assert f"to continue it, give {command.removeprefix('map ')}, or name another directory" in again.stderr
    (run_map.path / "mended").touch()
    resumed = run_map(f"{shlex.join(CLI)} {command}", program=("sh", "-c"))
    assert resumed.returncode == 0, resumed.stderr
    assert not (run_map.path / "evil").exists()


def test_a_stream_is_to_be_fed_again(run_map: Map) -> None:
    failed = run_map("--from", "-", *SIMULATED, "--dir", "out", "--", *FAIL_AT_2, input=ONE_TO_THREE)
    assert "to run the rest: <the same stream> | gpu-launcher map --resume out\n" in failed.stderr


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_nobody_waits_for_a_stream_from_the_keyboard(run_map: Map, terminal: Any, more: tuple[str, ...]) -> None:
    directory = run_map.path / "out"
    assert run_map("--from", "-", *SIMULATED, "--dir", "out", "--", *FAIL_AT_2, input=ONE_TO_THREE).returncode == 1
    shown = terminal("map", "--resume", str(directory), *more)
    assert shown.wait() == 2
    assert "came from stdin, which is a terminal now" in shown.text
    assert f"<the same stream> | gpu-launcher map --resume {directory}" in shown.text
    assert run_map.results()[1] == "failed"


# Exit codes and their messages


def test_the_help_and_the_document_name_every_exit_code(run_map: Map) -> None:
    text = run_map("--help").stdout
    table = re.findall(r"^\| ([0-9, ]+) \|", (REPOSITORY / "docs" / "map.md").read_text(), re.MULTILINE)
    documented = {code for codes in table for code in codes.split(", ")}
    assert documented == set(re.findall(r"\b\d+\b", text.partition("Exit codes:")[2].partition("Examples:")[0]))


@pytest.mark.parametrize("resumes", [False, True])
def test_where_the_pool_cannot_be_nothing_is_run_and_that_is_2(
    failed_once: Map, small_disk: Path, resumes: bool
) -> None:
    before = failed_once.everything()
    words = ("--resume", "out") if resumes else ("--param", "n=2", *SIMULATED, "--dir", "new", "--", *FAIL_AT_2)
    fill(small_disk)
    for pool in ("/proc/nowhere", "disk/pool"):
        refused = failed_once("--pool-dir", pool, *words)
        assert refused.returncode == 2, refused.stderr
        assert "pool directory" in refused.stderr
        assert failed_once.ran() == ["1", "2", "3"]
        assert not (failed_once.path / "new").exists()
        assert failed_once.results()[1] == "failed"
    if resumes:
        assert failed_once.everything().keys() == before.keys()


def test_a_resumption_on_a_full_disk_runs_nothing_says_what_to_do_and_keeps_all(run_map: Map, small_disk: Path) -> None:
    words = ("--param", "n=1,2,3", *SIMULATED, "--dir", "disk/m")
    assert run_map(*words, "--", *FAIL_AT_2).returncode == 1
    filler = fill(small_disk)
    before = run_map.everything("disk/m")
    refused = run_map("--resume", "disk/m")
    assert refused.returncode == 2, refused.stderr
    assert "results cannot be written to disk/m (No space left on device), so nothing was run" in refused.stderr
    assert "making room, and run the command again" in refused.stderr
    assert run_map.everything("disk/m").items() >= before.items()
    assert not list((small_disk / "m").glob("*.tmp"))
    filler.unlink()
    (run_map.path / "mended").touch()
    assert run_map("--resume", "disk/m").returncode == 0
    assert run_map.ran() == ["1", "2", "3", "2"]


# Invalid settings

GOOD = {"format": 1, "command": ["echo", "{n}"], "param": [], "from": None, "shell": False, "options": {}, "grid": []}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"format": 1}', "is damaged"),
        (json.dumps({**GOOD, "directory": 3}), "is damaged"),
        (json.dumps({**GOOD, "directory": "/", "grid": [["n", 5]]}), "is damaged"),
        (json.dumps({**GOOD, "directory": "/", "grid": ["n"]}), "is damaged"),
        ("\udcff", "is damaged"),
        ('{"format": 2}', "is of a newer version of gpu-launcher"),
        (None, "is not a map's directory: give what --dir named"),
    ],
)
def test_a_map_whose_settings_make_no_sense_is_told_from_what_is_no_map(
    run_map: Map, content: str | None, problem: str
) -> None:
    home = run_map.path / "out" / ".gpu_launcher"
    home.mkdir(parents=True)
    if content is not None:
        (home / "map.json").write_bytes(os.fsencode(content))
    refused = run_map("--resume", "out")
    assert refused.returncode == 2
    assert refused.stderr.startswith("gpu-launcher: --resume: out")
    assert problem in refused.stderr
    assert "Traceback" not in refused.stderr


# Root without the capabilities that override file modes.
CONFINED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", *CLI, "map")


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, and setpriv(1)")
@pytest.mark.parametrize(
    ("name", "mode", "problem"),
    [
        (".gpu_launcher/map.json", 0o600, "--resume: out/.gpu_launcher/map.json cannot be read (Permission denied)"),
        (".gpu_launcher/lock", 0o600, "--resume: out cannot be written to (Permission denied)"),
        ("results.jsonl", 0o600, "--resume: out cannot be read (Permission denied): out/results.jsonl"),
        ("results.jsonl", 0o644, "results cannot be written to out (Permission denied), so nothing was run"),
    ],
)
def test_the_map_of_another_user_is_refused_by_what_was_asked_for(
    run_map: Map, name: str, mode: int, problem: str
) -> None:
    assert run_map("--param", "n=1,2", *SIMULATED, "--dir", "out", "--", *FAIL_AT_2).returncode == 1
    file = run_map.path / "out" / name
    os.chown(file, 65534, 65534)
    file.chmod(mode)
    refused = run_map("--resume", "out", program=CONFINED)
    assert refused.returncode == 2, refused.stderr
    assert problem in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run_map.results()[1] == "failed"
