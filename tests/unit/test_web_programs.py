"""Tests of the programs that the pages start."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gpu_launcher.jobs.leaving import detached_directory, detached_text
from gpu_launcher.web.new_sweep import Plan
from gpu_launcher.web.programs import Programs
from tests.waiting import until


@pytest.fixture
def programs() -> Iterator[Programs]:
    programs = Programs()
    yield programs
    programs.close()


def plan(directory: Path, script: str) -> Plan:
    words = ("sh", "-c", script)
    return Plan(directory, (), words, words, {})


@dataclass(frozen=True)
class SlowPlan(Plan):
    """A plan whose directory is opened only when `go` is set, as on a file system that hangs."""

    reached: threading.Event = threading.Event()  # noqa: RUF009
    go: threading.Event = threading.Event()  # noqa: RUF009

    def open_in(self) -> int:
        self.reached.set()
        assert self.go.wait(200)
        return super().open_in()


def slow_plan(directory: Path, script: str) -> SlowPlan:
    words = ("sh", "-c", script)
    return SlowPlan(directory, (), words, words, {}, threading.Event(), threading.Event())


def test_a_file_system_that_hangs_stops_no_other_program(programs: Programs, tmp_path: Path) -> None:
    slow = slow_plan(tmp_path, "exit 3")
    with ThreadPoolExecutor() as pool:
        try:
            hanging = pool.submit(programs.check, slow)
            assert slow.reached.wait(200)
            check = programs.check(plan(tmp_path, "echo works"))
            started = programs.start(check)
            until(lambda: programs.read(started).code == 0)
            assert programs.read(started).output == "works\n"
            assert [program.id for program in programs.starts()] == [started]
            assert not hanging.done()
        finally:
            slow.go.set()
        until(lambda: programs.read(hanging.result()).code is not None)


def test_a_check_that_is_replaced_while_it_starts_is_ended(programs: Programs, tmp_path: Path) -> None:
    slow = slow_plan(tmp_path, "exec sleep 1000")
    with ThreadPoolExecutor() as pool:
        try:
            hanging = pool.submit(programs.check, slow)
            assert slow.reached.wait(200)
            programs.check(plan(tmp_path, "exit 0"))
        finally:
            slow.go.set()
        until(lambda: programs.read(hanging.result()).code is not None)
    assert programs.read(hanging.result()).code != 0


def test_a_start_is_repeated_only_if_it_failed(programs: Programs, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    check = programs.check(plan(gone, "exit 0"))
    gone.rmdir()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            programs.start(check)
    assert programs.starts() == []
    gone.mkdir()
    first = programs.start(check)
    assert programs.start(check) == first
    with pytest.raises(KeyError):
        programs.start(first)
    until(lambda: programs.read(first).code == 0)
    until(lambda: programs.read(check).code == 0)


def test_a_check_finds_its_program_as_a_shell_does(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "program"
    program.write_text("#!/bin/sh\necho $0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    usual = plan(tmp_path, "")
    for words in (("program",), ("bin/program",), ("./bin/program",), (str(program),)):
        check = programs.check(replace(usual, check=words))
        until(lambda id=check: programs.read(id).code == 0)
        expected = words[0] if "/" in words[0] else str(program)
        assert programs.read(check).output == f"{expected}\n"
    for words in (("nonsense",), ("./nonsense",), ("bin/nonsense",)):
        with pytest.raises(FileNotFoundError):
            programs.check(replace(usual, check=words))


@pytest.mark.parametrize("name", ["runs", "a b/it's", "x; to stop it: y"])
def test_the_directory_of_a_detached_sweep_is_read_from_its_output(tmp_path: Path, name: str) -> None:
    for directory in (tmp_path / name, Path("/elsewhere") / name):
        output = f"3 jobs\n{detached_text('gpu_pool', directory, 17)}"
        assert detached_directory(output, tmp_path) == directory


@pytest.mark.parametrize("said", ["", "x\n", "[a] to show it: gpu-launcher attach --dir 'x; to stop it: y\n"])
def test_other_output_names_no_directory(tmp_path: Path, said: str) -> None:
    assert detached_directory(said, tmp_path) is None
