"""Tests each way in which a job can end: only that job is lost, and its JobReturn says what happened."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class Death:
    kind: str
    type: str = "JobError"
    """The type of the JobReturn's exception."""
    says: tuple[str, ...] = ()
    """Texts in its traceback and message. The last one is also in the summary."""
    log: tuple[str, ...] = ()
    """Texts in the job's log."""


PROGRAM = Path(__file__).parent / "programs" / "deaths.py"
FAILED = "JobFailedError"  # for deaths without a traceback

DEATHS = [
    Death(
        "exception",
        "ValueError",
        ("KeyError: 'the cause'", "direct cause", "in with_cause", "ValueError: the effect"),
        ("KeyError: 'the cause'", "ValueError: the effect"),
    ),
    Death("plain_main_exception", "PlainMainError", ("in fail", "PlainMainError: plain"), ("PlainMainError: plain",)),
    Death("main_exception", "MainError", ("in fail", "MainError: code 7"), ("MainError: code 7",)),
    Death(
        "unpicklable_exception", "UnpicklableError", ("in fail", "UnpicklableError: holds a lock"), ("holds a lock",)
    ),
    Death("unloadable_exception", "UnloadableError", ("in fail", "UnloadableError: one"), ("UnloadableError: one",)),
    Death("wordless_exception", "WordlessError", ("in fail", "WordlessError"), ("WordlessError",)),
    Death("base_exception", "JobError", ("in fail", "raised OddError: odd"), ("OddError: odd",)),
    Death("interrupt", "JobError", ("in fail", "was interrupted"), ("KeyboardInterrupt",)),
    Death("memory", "MemoryError", ("in fail", "MemoryError"), ("MemoryError",)),
    Death("recursion", "RecursionError", ("in recurse", "RecursionError: maximum"), ("RecursionError",)),
    Death("exit3", "JobError", ("in fail", "called sys.exit(3)"), ("SystemExit: 3",)),
    Death("exit0", "JobError", ("in fail", "called sys.exit(0)"), ("SystemExit: 0",)),
    Death("os_exit5", FAILED, ("ended with exit code 5 after",)),
    Death("os_exit0", FAILED, ("ended with exit code 0 after",)),
    Death("segfault", FAILED, ("was killed by SIGSEGV after",)),
    Death("sigkill", FAILED, ("was killed by SIGKILL after",)),
    Death("abort", FAILED, ("was killed by SIGABRT after",)),
    Death("lock", FAILED, ("returned a value of type lock that cannot be pickled",)),
    Death("unloadable", FAILED, ("returned a value of type UnloadableValue that cannot be pickled",)),
    Death("bytes", "RuntimeError", ("in fail", "RuntimeError: after bytes"), ("after bytes",)),
]
FINE = {
    "fine": "fine",
    "child": "child",
    "daemon": "daemon",
    "pool": "3",
    "fork_exit": "fork_exit",
    "fork_return": "fork_return",
    "buffers": "buffers",
    "cfg": "cfg",
    "gpu_array": "[1, 2]",
    "last": "last",
}
KINDS = ["fine", *(death.kind for death in DEATHS), *(kind for kind in FINE if kind != "fine")]


@dataclass
class Sweep:
    directory: Path
    ran: subprocess.CompletedProcess[str]
    returns: list[dict[str, Any]]
    pids: set[int]

    def of(self, kind: str) -> dict[str, Any]:
        return self.returns[KINDS.index(kind)]

    def log(self, kind: str) -> Path:
        return self.directory / "sweep" / str(KINDS.index(kind)) / "job.log"


# `make test` runs this sweep with fork only. There, test_retries.py shows four deaths of spawned jobs.
@pytest.fixture(scope="module", params=[pytest.param("fork", marks=pytest.mark.smoke), "spawn"])
def sweep(request: pytest.FixtureRequest, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    directory = tmp_path_factory.mktemp(request.param)
    ran = run(
        directory,
        "deaths.py",
        "-m",
        f"hydra.launcher.start_method={request.param}",
        "hydra.sweep.dir=sweep",
        f"kind={','.join(KINDS)}",
    )
    assert (directory / "returns.json").exists(), ran.stderr
    pids = {int(file.read_text()) for file in (directory / "sweep").glob("*/*.pid")}
    return Sweep(directory, ran, json.loads((directory / "returns.json").read_text()), pids)


def test_every_job_has_its_result_in_the_order_of_the_overrides(sweep: Sweep) -> None:
    assert [job["overrides"] for job in sweep.returns] == [[f"kind={kind}"] for kind in KINDS]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.kind)
def test_a_death_becomes_a_failed_result_with_cause_traceback_and_log(sweep: Sweep, death: Death) -> None:
    job = sweep.of(death.kind)
    assert job["status"] == "FAILED"
    assert job["type"] == death.type
    for words in death.says:
        assert words in job["text"]
    log = sweep.log(death.kind)
    if death.type in ("JobError", FAILED) or sys.version_info >= (3, 11):  # where exceptions have notes
        assert str(log) in job["text"]
    printed = log.read_text(errors="replace")
    for words in death.log:
        assert words in printed
    if death.type != FAILED:
        where = f'File "{PROGRAM}", line '
        assert where in job["text"]
        assert where in printed


@pytest.mark.parametrize("kind", list(FINE))
def test_every_other_job_completes_and_returns_its_value(sweep: Sweep, kind: str) -> None:
    job = sweep.of(kind)
    assert job["status"] == "COMPLETED", job
    assert job["value"] in (FINE[kind], repr(FINE[kind]))


def test_hydra_ends_with_exit_code_1_and_the_first_failures_traceback(
    sweep: Sweep, frame_of: Callable[..., str]
) -> None:
    assert sweep.ran.returncode == 1
    end = sweep.ran.stderr[sweep.ran.stderr.index("Error executing job with overrides: ['kind=exception']") :]
    assert "in with_cause" in end
    assert "ValueError: the effect" in end
    assert frame_of(PROGRAM, "with_cause", 'raise ValueError("the effect") from error') in end
    assert set(re.findall(r'File "(.*?)"', end)) == {str(PROGRAM)}, "the user's frames and nothing else"


def test_the_closing_summary_names_every_failed_job_with_cause_and_log(sweep: Sweep) -> None:
    summary = sweep.ran.stderr[sweep.ran.stderr.index(f"[gpu_pool] {len(KINDS)} jobs: ") :]
    assert f"{len(FINE)} completed, {len(KINDS) - len(FINE)} failed" in summary
    for death in DEATHS:
        (line,) = (line for line in summary.splitlines() if f"(kind={death.kind}) FAILED" in line)
        assert str(sweep.log(death.kind)) in line
        assert death.says[-1].removesuffix(" after") in line


def test_nothing_is_printed_on_stdout(sweep: Sweep) -> None:
    assert sweep.ran.stdout == ""


def test_nothing_that_a_job_left_behind_is_alive(sweep: Sweep) -> None:
    assert len(sweep.pids) == 3
    for pid in sweep.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_that_a_job_left_behind_and_that_were_ended_are_named(sweep: Sweep) -> None:
    said = [line for line in sweep.ran.stderr.splitlines() if "left processes behind, which were ended: " in line]
    for kind in ("child", "daemon"):
        pid = sweep.log(kind).with_name(f"{kind}.pid").read_text()
        (line,) = (line for line in said if f"(kind={kind}) " in line)
        assert f"sleep 300 (pid {pid})" in line
    assert not any("(kind=fine)" in line for line in said)


def test_a_jobs_failure_reaches_its_callbacks_and_its_death_does_not(sweep: Sweep) -> None:
    ends = {kind: sweep.log(kind).with_name("job_end") for kind in KINDS}
    for kind, status in {"fine": "COMPLETED", "exception": "FAILED", "lock": "COMPLETED", "last": "COMPLETED"}.items():
        assert ends[kind].read_text().split()[0] == status
    for kind in ("sigkill", "os_exit0"):
        assert not ends[kind].exists()
    ran = [end for end in ends.values() if end.exists()]
    assert len({end.read_text().split()[1] for end in ran}) == len(ran), "each in its job's process"


def test_a_log_that_is_no_text_is_kept_as_it_is(sweep: Sweep) -> None:
    assert b"not UTF-8: \xff\xfe\x00\n" in sweep.log("bytes").read_bytes()


@pytest.mark.parametrize("kind", ["fork_exit", "fork_return"])
def test_a_child_that_the_task_forked_ends_in_silence(sweep: Sweep, kind: str) -> None:
    assert sweep.log(kind).read_text() == ""


def test_what_is_in_buffers_at_a_jobs_end_is_written(sweep: Sweep) -> None:
    directory = sweep.log("buffers").parent
    assert (directory / "left_open.txt").read_text() == "kept"
    assert (directory / "left_open.bin").read_bytes() == b"kept"
    assert sweep.log("buffers").read_text() == "from C\n"


def test_a_job_that_does_not_compose_fails_alone(run: Run, tmp_path: Path) -> None:
    sizes = ["small", "large", "small", "no_such_size", "large", "small", "large", "small", "large", "small"]
    ran = run(tmp_path, "deaths.py", "-m", "hydra.sweep.dir=sweep", f"size={','.join(sizes)}")
    returns = json.loads((tmp_path / "returns.json").read_text())
    assert [job["status"] for job in returns] == ["FAILED" if size == "no_such_size" else "COMPLETED" for size in sizes]
    assert [job["overrides"] for job in returns] == [[f"size={size}"] for size in sizes]
    assert returns[3]["type"] == "MissingConfigException"
    assert ran.returncode == 1
    assert "job 3 (size=no_such_size) FAILED: raised MissingConfigException: In 'deaths': Could not find" in ran.stderr
    end = ran.stderr[ran.stderr.index("Error executing job with overrides: ['size=no_such_size']") :]
    assert "Could not find 'size/no_such_size'" in end
    assert "Available options in 'size':\n\tlarge\n\tsmall" in end
    assert "Traceback" not in end


EARLY = """
import os
import signal
import hydra
from omegaconf import OmegaConf

main_process = os.getpid()

def boom():
    if os.getpid() != main_process:
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1

OmegaConf.register_new_resolver("boom", boom)

@hydra.main(version_base=None, config_path=None)
def main(cfg):
    pass

if __name__ == "__main__":
    main()
"""


def test_what_a_job_printed_before_it_had_a_log_is_shown(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(EARLY)
    launcher = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:1")
    ran = subprocess.run(
        [sys.executable, "early.py", "-m", *launcher, "hydra.sweep.subdir=${boom:}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 1
    assert "was killed by SIGSEGV while it prepared itself" in ran.stderr
    assert "It had printed: about to die\n" in ran.stderr, "in the summary"
    assert "It had printed:\nabout to die\n" in ran.stderr, "in the message that Hydra shows"
