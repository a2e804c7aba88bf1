"""Hooks: what they are told, and that nothing that they do harms the sweep or its program."""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.cli.mapping.launch import MapArguments
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.notifications import HOOK_SECONDS, MAX_PENDING, Hooks, Notifier, read_hook
from tests.descriptors import open_descriptors
from tests.waiting import alive, until


class Clock:
    """A clock that the test sets. With `step`, it also goes on by that at each look, up to `last`."""

    def __init__(self) -> None:
        self.now = self.step = self.last = 0.0

    def __call__(self) -> float:
        if self.step:
            self.now = min(self.now + self.step, self.last)
        return self.now


def shell(script: str) -> tuple[str, ...]:
    return "sh", "-c", script


class Sweep:
    """What a head does with a notifier. Its lines are in `lines`, and those after its end in `told`."""

    def __init__(self, directory: Path, *, on_end: str | None = None, on_job_failure: Any = None) -> None:
        self.clock = Clock()
        self.lines: list[str] = []
        self.told: list[str] = []
        failure = shell(on_job_failure) if isinstance(on_job_failure, str) else on_job_failure
        self.notifier = Notifier(
            Hooks(None if on_end is None else shell(on_end), failure),
            directory,
            "python train.py --password=hidden",
            spell=lambda option: f"hydra.launcher.{option}",
            tell=self.told.append,
            clock=self.clock,
        )
        self.events = self.notifier.begin()

    def fail(self, number: int, **more: Any) -> None:
        job = Job(number, f"n={number}", [f"+n={number}", "+x=nan", "+api_key=hidden"])
        message = "raised ValueError"
        result = JobResult(
            number, job.label, Outcome.FAILED, None, message, (), 1.0, f"/sweep/{number}/job.log", Cause.EXCEPTION
        )
        self.notifier.job_failed(job, result)

    def tick(self) -> list[str]:
        self.lines += self.notifier.tick()
        return self.lines


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


def test_failures_are_passed_on_one_after_another_in_order(tmp_path: Path) -> None:
    alone = "mkdir running && cat >> told && echo >> told && rmdir running"
    sweep = Sweep(tmp_path, on_job_failure=alone)
    with sweep.notifier:
        for number in range(4):
            sweep.fail(number)
        until(lambda: sweep.tick() or (tmp_path / "told").exists())
        sweep.notifier.conclude("completed", None, {}, stopped=False)
    assert sweep.lines == sweep.told == []  # mkdir fails if another one runs
    documents = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [document.pop("number") for document in documents] == [0, 1, 2, 3]
    assert documents[0] == {
        "schema": 1,
        "event": "job_failure",
        "sweep": str(tmp_path),
        "params": {"n": 0, "x": "nan", "api_key": "***"},
        "outcome": "failed",
        "cause": "exception",
        "message": "raised ValueError",
        "log": "/sweep/0/job.log",
        "directory": "/sweep/0",
        "node": None,
        "devices": [],
        "attempts": 1,
        "duration": 1.0,
    }


def test_the_end_is_told_after_all_failures(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, on_end="cp told failures; cat > end", on_job_failure="cat >> told")
    with sweep.notifier:
        sweep.fail(0)
        sweep.fail(1)
        sweep.clock.now = 5.0
        sweep.notifier.conclude("stopped", "3 failures", {Outcome.FAILED: 2}, stopped=False)
    assert sweep.told == []
    assert (tmp_path / "failures").read_text().count("schema") == 2
    assert json.loads((tmp_path / "end").read_text()) == {
        "schema": 1,
        "event": "end",
        "directory": str(tmp_path),
        "command": "python train.py --password=***",
        "reason": "stopped",
        "message": "3 failures",
        "jobs": {"completed": 0, "failed": 2, "cancelled": 0, "pruned": 0},
        "best": None,
        "duration": 5.0,
    }


def test_the_end_names_the_error_that_ended_the_sweep(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, on_end="cat > end")
    with pytest.raises(ValueError, match="no database"), sweep.notifier:
        raise ValueError("no database")
    document = json.loads((tmp_path / "end").read_text())
    assert (document["reason"], document["message"]) == ("error", "ValueError: no database")


def test_no_hook_runs_for_a_sweep_that_never_began(tmp_path: Path) -> None:
    with Notifier(Hooks(shell("cat > end")), tmp_path, "program", spell=str, tell=print):
        pass
    assert not (tmp_path / "end").exists()


def test_a_hook_that_hangs_is_killed_with_its_group(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, on_job_failure="sleep 1000 & echo $! $$ > new; mv new pids; wait")
    with sweep.notifier:
        sweep.fail(0)
        until(lambda: sweep.tick() or (tmp_path / "pids").exists())
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        sweep.clock.now = HOOK_SECONDS - 0.1
        assert sweep.tick() == []
        assert all(map(alive, pids))
        sweep.clock.now = HOOK_SECONDS
        until(sweep.tick)
        until(lambda: not any(map(alive, pids)), "SIGKILL takes effect when a process next runs")
        sweep.notifier.conclude("completed", None, {}, stopped=False)
    assert sweep.lines == ["the command of hydra.launcher.on_job_failure took longer than 30.0 s and was killed"]


def test_what_a_hook_leaves_in_its_group_is_killed(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, on_end="sleep 1000 & echo $! > pid")
    with sweep.notifier:
        sweep.notifier.conclude("completed", None, {}, stopped=False)
    until(lambda: not alive(int((tmp_path / "pid").read_text())))
    assert sweep.told == []


def test_a_signal_ends_the_wait_for_a_hook(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, on_end=f"kill -INT {os.getpid()}; sleep 1000")
    with sweep.notifier:
        sweep.notifier.conclude("completed", None, {}, stopped=False)
    assert sweep.told == ["the command of hydra.launcher.on_end was killed because of SIGINT"]
    assert sweep.notifier.interrupted is signal.SIGINT


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (("no-such-program",), "cannot be run: no-such-program: No such file or directory"),
        (("./not-executable",), "cannot be run: ./not-executable: No such file or directory"),
        (("./broken",), "ended with exit code 1: ./broken: Exec format error"),
        (shell("echo some; echo problem >&2; exit 3"), "ended with exit code 3: problem"),
        (shell("kill -SEGV $$"), "was killed by signal 11"),
        (shell("head -c 5000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo end >&2; false"), "code 1: end"),
    ],
)
def test_one_line_says_that_a_hook_fails(tmp_path: Path, command: tuple[str, ...], problem: str) -> None:
    (tmp_path / "not-executable").touch()
    (tmp_path / "broken").touch(mode=0o755)
    sweep = Sweep(tmp_path, on_job_failure=command)
    with sweep.notifier:
        for number in range(3):
            sweep.fail(number)
        sweep.notifier.conclude("completed", None, {}, stopped=False)
    (line,) = sweep.told
    assert line.startswith("the command of hydra.launcher.on_job_failure ")
    assert line.endswith(problem)


def test_a_flood_of_failures_is_bounded(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, on_job_failure="echo >> started; exec sleep 1000")
    with sweep.notifier:
        sweep.fail(0)
        until(lambda: sweep.tick() or (tmp_path / "started").exists())
        for number in range(1, MAX_PENDING + 3):
            sweep.fail(number)
        (line,) = sweep.tick()
        assert line.endswith(f"is too slow: some failures are not passed on ({MAX_PENDING} wait)")
        sweep.notifier.conclude("completed", None, {}, stopped=False)
        sweep.clock.step, sweep.clock.last = 10.0, HOOK_SECONDS + 25.0
    assert (tmp_path / "started").read_text().count("\n") <= 2  # the second, when the first has used up its time
    assert sweep.told == []


def test_failures_that_wait_at_the_end_have_a_time_limit_together(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, on_end="cat > end", on_job_failure="echo >> started; exec sleep 1000")
    with sweep.notifier:
        sweep.fail(0)
        until(lambda: sweep.tick() or (tmp_path / "started").exists())
        sweep.clock.now = HOOK_SECONDS
        until(sweep.tick)  # its own limit; the next one starts now
        for number in range(1, 4):
            sweep.fail(number)
        sweep.tick()
        sweep.notifier.conclude("completed", None, {}, stopped=False)
        sweep.clock.step, sweep.clock.last = 10.0, 2 * HOOK_SECONDS + 25.0
    assert len(sweep.lines) == 1
    assert sweep.told == []
    assert (tmp_path / "end").exists()


def test_a_hook_has_only_its_standard_streams(tmp_path: Path) -> None:
    with open(tmp_path / "lease", "w") as lease:
        os.set_inheritable(lease.fileno(), True)
        sweep = Sweep(tmp_path, on_end="exec ls -l /proc/self/fd > descriptors")
        with sweep.notifier:
            sweep.notifier.conclude("completed", None, {}, stopped=False)
    listed = (tmp_path / "descriptors").read_text()
    assert "lease" not in listed
    assert len(listed.splitlines()) == 5  # the total, three streams, and the directory that is listed


def test_the_descriptor_wakes_the_head_when_a_hook_ends(tmp_path: Path) -> None:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        pytest.skip("this kernel has no descriptors of processes")
    sweep = Sweep(tmp_path, on_job_failure="mkfifo go; read line < go")
    with sweep.notifier, selectors.DefaultSelector() as selector:
        selector.register(sweep.events, selectors.EVENT_READ)
        sweep.fail(0)
        until(lambda: sweep.tick() or (tmp_path / "go").exists())
        assert selector.select(0) == []
        (tmp_path / "go").write_text("\n")
        assert selector.select(200)
        sweep.notifier.conclude("completed", None, {}, stopped=False)


def test_a_map_neither_stores_hooks_nor_takes_them_from_its_directory() -> None:
    hooks = {"on_end": "mine", "on_job_failure": "mine"}
    settings = MapArguments(["true"], ["n=1"], options={**hooks, "gpus": "1"}).settings()
    assert settings["options"] == {"gpus": "1"}
    settings["options"] |= {"on_end": "another user's", "on_job_failure": "another user's"}
    assert MapArguments.of_settings(settings).options == {"gpus": "1"}


def test_hooks_are_lists_of_words_or_split_as_a_shell_does() -> None:
    assert read_hook("on_end", None) is None
    assert read_hook("on_end", "notify 'the sweep' $HOME") == ("notify", "the sweep", "$HOME")
    assert read_hook("on_end", ["notify", 3, "a b"]) == ("notify", "3", "a b")
    assert not Hooks()
    assert Hooks(on_end=("true",))


@pytest.mark.parametrize("value", ["", "  ", "''", [], [""], "it's", ["a", None], {"a": 1}, 3, True, "a\0b"])
def test_a_value_that_is_not_a_command_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match=r"on_end: .*give a command, such as"):
        read_hook("on_end", value)


def test_a_hook_dies_with_the_program(tmp_path: Path) -> None:
    program = (
        "import sys, time; from gpu_launcher.processes.hook_process import HookProcess\n"
        "HookProcess(['sh', '-c', 'echo $$ > new; mv new pid; exec sleep 1000'], b'', 0.0, 1e9); time.sleep(1000)"
    )
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", program])
    hook = until(lambda: (tmp_path / "pid").exists() and int((tmp_path / "pid").read_text()))
    assert alive(hook)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until(lambda: not alive(hook))
