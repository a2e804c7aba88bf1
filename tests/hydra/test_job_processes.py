"""Tests that users can find a job's process: by name in `ps`, and by id in the JSON of `jobs` and `status`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.allocation.observation import look, processes_of
from gpu_launcher.cli.job_table import to_json
from gpu_launcher.cli.survey_json import to_json as survey_to_json
from gpu_launcher.jobs.manifest import read
from tests.warm import TextProgram

Start = Callable[..., TextProgram]
DEADLINE = 60.0


@dataclass
class Seen:
    """The view from outside while two jobs ran and after they ended."""

    pids: list[int]
    named: list[tuple[str, str]]
    """The name and command line of each job, as `ps` shows them."""
    children: list[str]
    """Command lines of processes that the jobs started."""
    running: dict[str, Any]
    leases: list[dict[str, Any]]
    ended: dict[str, Any]
    argv: list[list[str]]


@pytest.fixture(scope="module", params=["fork", "spawn"])
def seen(start: Start, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Seen:
    directory = tmp_path_factory.mktemp("processes")
    options = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "hydra.sweep.dir=sweep")
    method = f"hydra.launcher.start_method={request.param}"
    with start(directory, "options.py", "-m", "+x=1,2", "+until=go", *options, method) as sweep:
        try:
            files = [directory / "sweep" / number / "seen.json" for number in ("0", "1")]
            deadline = time.monotonic() + DEADLINE
            while not all(file.exists() and file.read_text().endswith("}") for file in files):
                assert time.monotonic() < deadline
                assert sweep.poll() is None, sweep.communicate()
                time.sleep(0.05)
            said = [json.loads(file.read_text()) for file in files]
            pids = [one["pid"] for one in said]
            ps = [_ps(pid) for pid in pids]
            children = [_ps(child.pid)[1] for pid in pids for child in psutil.Process(pid).children()]
            running = to_json(directory, list(read(directory / "sweep").values()))
            survey = look("simulated:2", "null", str(directory / "pool"))
            leases = survey_to_json(survey, processes_of(survey.view.leases), ())["leases"]
        finally:
            (directory / "go").touch()
        _, err = sweep.communicate(timeout=DEADLINE)
    assert sweep.returncode == 0, err
    ended = to_json(directory, list(read(directory / "sweep").values()))
    return Seen(pids, ps, children, running, leases, ended, [one["argv"] for one in said])


def _ps(pid: int) -> tuple[str, str]:
    process = Path("/proc", str(pid))
    return (process / "comm").read_text().strip(), (process / "cmdline").read_bytes().decode().rstrip("\0")


def test_ps_calls_a_job_by_its_number_and_overrides(seen: Seen) -> None:
    assert seen.named == [
        ("#0 options.py +", "#0 options.py +x=1"),
        ("#1 options.py +", "#1 options.py +x=2"),
    ]


def test_what_a_job_executes_has_its_own_name(seen: Seen) -> None:
    assert seen.children == ["sleep\x00100", "sleep\x00100"]


def test_argv_of_a_job_stays_as_it_is(seen: Seen) -> None:
    assert all("options.py" in argv[0] and "+until=go" in argv for argv in seen.argv)


def test_json_of_jobs_has_the_process_id_while_a_job_runs(seen: Seen) -> None:
    assert [job["pid"] for job in seen.running["jobs"]] == seen.pids
    assert [job["pid"] for job in seen.ended["jobs"]] == [None, None]


def test_json_of_status_has_the_processes_of_each_lease(seen: Seen) -> None:
    by_command = sorted(seen.leases, key=lambda lease: str(lease["command"]))
    assert [lease["processes"] for lease in by_command] == [[pid] for pid in seen.pids]
