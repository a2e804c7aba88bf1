"""Tests distributed jobs of two processes each, side by side in one sweep: Lightning DDP on CPU, and torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.leases.file_ledger import FileLedger
from tests.waiting import alive, until
from tests.warm import TextProgram

pytest.importorskip("torch", reason="needs torch: pip install 'gpu-launcher[ddp]'")
pytest.importorskip("lightning", reason="needs Lightning: pip install 'gpu-launcher[ddp]'")

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., TextProgram]

SWEEP = ["-m", "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4", "hydra.sweep.dir=sweep"]
JOBS = RANKS = (0, 1)


def witnesses(directory: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The records of all ranks, by job and rank."""
    return {
        (job, rank): json.loads(file.read_text())
        for job in JOBS
        for rank in RANKS
        if (file := directory / "sweep" / str(job) / f"rank-{rank}.json").exists()
    }


def of_this_test(directory: Path) -> list[str]:
    """All living processes that have this test's pool in their environment, described by id and command line."""
    marker = f"GPU_LAUNCHER_POOL_DIR={directory / 'pool'}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            if marker in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0") and alive(process.pid):
                found.append(f"{process.pid} {process.cmdline()}")
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def leases(directory: Path) -> list[str]:
    with FileLedger(directory / "pool") as ledger:
        return [str(lease) for lease in ledger.snapshot().leases]


def log(directory: Path, job: int) -> str:
    return (directory / "sweep" / str(job) / "job.log").read_text()


def statuses(directory: Path) -> list[str]:
    return [job["status"] for job in json.loads((directory / "returns.json").read_text())]


@pytest.fixture
def sweep(start: Start, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a sweep of two jobs; return once all of their ranks train."""
    processes = []

    def sweep(program: str, *overrides: str) -> subprocess.Popen[str]:
        process = start(tmp_path, program, *SWEEP, "wait=true", *overrides)
        processes.append(process)
        until(lambda: len(witnesses(tmp_path)) == 4 or process.poll() is not None, "not all ranks begin")
        assert process.poll() is None, process.communicate()
        return process

    yield sweep
    for process in processes:
        process.kill()  # and its jobs with it
        process.communicate()


@pytest.mark.parametrize(("program", "method"), [("ddp.py", "spawn"), ("torchrun.py", "fork")])
def test_two_distributed_jobs_run_side_by_side_and_share_nothing(
    run: Run, tmp_path: Path, program: str, method: str
) -> None:
    how = (f"hydra.launcher.start_method={method}", f"hydra.job.chdir={method == 'fork'}", "hydra.job.name=mine")
    ran = run(tmp_path, program, *SWEEP, *how, "note='a b=c, d','{e: [f]}'")
    assert ran.returncode == 0, ran.stderr + log(tmp_path, 0) + log(tmp_path, 1)
    assert statuses(tmp_path) == ["COMPLETED", "COMPLETED"]
    found = witnesses(tmp_path)  # no rank continues before all records exist
    for job in JOBS:
        first, second = found[job, 0], found[job, 1]
        assert first["number"] == second["number"] == job
        assert first["sum"] == second["sum"] == 3 * 10**job, "its ranks know each other, and no other job's"
        assert first["mask"] == second["mask"]
        assert first["port"] == second["port"]
        assert [f"rank {rank} trains" in log(tmp_path, job) for rank in RANKS] == [True, True]
        if program == "ddp.py":
            for rank in RANKS:
                check_rank_of_lightning(tmp_path, job, rank, found[job, rank])
            check_files_of_lightning(tmp_path / "sweep" / str(job))
    devices = [device for job in JOBS for device in found[job, 0]["mask"].split(",")]
    assert len(set(devices)) == len(devices) == 4
    assert found[0, 0]["port"] != found[1, 0]["port"]
    assert len({one["pid"] for one in found.values()}) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"pool", "returns.json", "sweep"}
    left = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert left == {".gpu_launcher", "multirun.yaml", "results.csv", "0", "1"}
    assert of_this_test(tmp_path) == []


def check_rank_of_lightning(directory: Path, job: int, rank: int, found: dict[str, Any]) -> None:
    """Check one rank. Lightning starts the program again for ranks other than 0, and they must see the same job."""
    assert found["output_dir"] == str(directory / "sweep" / str(job))
    assert found["original_cwd"] == str(directory)
    assert found["mode"] == ("RUN" if rank else "MULTIRUN")
    assert found["world_size"] == 2
    assert found["cfg"]["note"] == ("a b=c, d", "{e: [f]}")[job]


def check_files_of_lightning(directory: Path) -> None:
    kept = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    hydras = {f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")}
    logs = {"job.log", "mine.log", "train_ddp_process_1.log"}
    lightnings = {"csv/metrics.csv", "csv/checkpoints/epoch=0-step=2.ckpt"}
    assert kept == {"rank-0.json", "rank-1.json", *hydras, *logs, *lightnings}


@pytest.mark.parametrize(("program", "rank"), [("ddp.py", 0), ("ddp.py", 1), ("torchrun.py", 1)])
def test_a_job_that_fails_in_one_rank_leaves_no_rank_and_the_other_job_completes(
    sweep: Callable[..., subprocess.Popen[str]], tmp_path: Path, program: str, rank: int
) -> None:
    process = sweep(program, f"fail=null,{rank}")
    found = witnesses(tmp_path)
    until(lambda: not any(alive(found[1, rank]["pid"]) for rank in RANKS), "a rank of the failed job stays")
    assert all(alive(found[0, rank]["pid"]) for rank in RANKS)
    until(lambda: len(leases(tmp_path)) == 1, "the failed job keeps its devices")
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=500)
    assert process.returncode == 1
    assert statuses(tmp_path) == ["COMPLETED", "FAILED"], err
    assert f"rank {rank} fails" in log(tmp_path, 1)
    assert out == ""
    assert of_this_test(tmp_path) == []
    assert leases(tmp_path) == []


@pytest.mark.parametrize(("program", "method"), [("ddp.py", "fork"), ("torchrun.py", "spawn")])
def test_no_rank_survives_a_killed_launcher(
    sweep: Callable[..., subprocess.Popen[str]], tmp_path: Path, program: str, method: str
) -> None:
    process = sweep(program, f"hydra.launcher.start_method={method}", "note=one,two")
    assert len(leases(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not of_this_test(tmp_path), "a process stays", seconds=60)
    assert leases(tmp_path) == []
