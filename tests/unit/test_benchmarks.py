"""The benchmark works. How fast anything is, is no matter of tests: that depends on what else the machine does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "launch_overhead.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree"),
]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=500, check=False
    )


def measured(directory: Path, *arguments: str) -> dict[str, Any]:
    """The parts of a quick run, of launchers that are always there, with programs that import nothing heavy."""
    file = directory / "results.json"
    done = benchmark("--quick", "--json", str(file), "--launchers", "gpu_pool,gpu_pool-spawn,basic", *arguments)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(file.read_text())
    assert results["heavy_import"] == "json"
    assert results["machine"]["cores"] > 0
    return dict(results["parts"])


def test_it_compares_whole_sweeps(tmp_path: Path) -> None:
    launchers = measured(tmp_path, "sweep")["sweep"]["launchers"]
    assert set(launchers) == {"gpu_pool", "gpu_pool-spawn", "basic"}
    assert all(found["wall"] > 0 and found["cpu"] > 0 for found in launchers.values())


def test_it_finds_every_pause_of_every_device_and_where_its_time_goes(tmp_path: Path) -> None:
    for found in measured(tmp_path, "handover")["handover"].values():
        assert found["pauses"] == found["jobs"] - found["devices"]
        assert 0 < found["median_ms"] <= found["p99_ms"] <= found["max_ms"]
        # The steps follow each other: one that was taken out of its order would be negative.
        assert all(time >= 0 for time in found["steps_median_ms"].values())


def test_it_weighs_all_processes_of_a_launcher(tmp_path: Path) -> None:
    found = measured(tmp_path, "memory")["memory"]
    processes = {name: look["processes"] for name, look in found["all jobs run"]["launchers"].items()}
    assert set(processes) == {"gpu_pool", "gpu_pool-spawn"}
    assert all(number >= 1 + 2 * 4 for number in processes.values()), "a launcher, four jobs, their supervisors"
    assert found["more jobs wait"]["launchers"]["gpu_pool"]["processes"] > processes["gpu_pool"]


def test_it_tells_what_the_plugin_adds_to_other_programs(tmp_path: Path) -> None:
    found = measured(tmp_path, "startup")["startup"]
    assert found["cpu"]["without_ms"] > 0


def test_a_part_that_is_not_there_is_named() -> None:
    done = benchmark("--quick", "hand-over")
    assert done.returncode == 2
    assert "there is no part 'hand-over': choose from sweep, handover, memory, startup" in done.stderr


def test_it_compares_storages_of_a_study_and_counts_trials_that_run_twice(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT.with_name("storage.py")), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    storages = json.loads(file.read_text())["storages"]
    assert set(storages) == {"gpu_launcher.storage", "Optuna's SQLite", "Optuna's SQLite, WAL", "journal file"}
    found = storages["gpu_launcher.storage"]
    assert (found["errors"], found["ran_again"], found["left_running"]) == ({}, 0, 0)
    assert 0 < found["ask"]["median_ms"] <= found["ask"]["p99_ms"]


def test_it_measures_sweeps_verdicts_and_the_head_on_several_nodes(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT.with_name("nodes.py")), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(file.read_text())["parts"]
    assert {"one machine", "two nodes"} <= set(parts["sweep"]["launchers"])
    assert all(found["wall"] > 0 and found["cpu"] > 0 for found in parts["sweep"]["launchers"].values())
    assert all(0 < found["median_ms"] <= found["p95_ms"] for found in parts["verdicts"].values())
    assert parts["many"]["memory"][0][0] == 0
    assert parts["many"]["memory"][-1][1] > 0
    assert parts["many"]["jobs_per_second"] > 0


REQUESTS = {"pause": 3, "continue": 3, "cancel": 3, "retry": 3, "limit": 6, "stop": 1}


def test_it_compares_sweeps_that_are_steered_and_watched_with_those_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT.with_name("steering.py")), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert {name: len(times) for name, times in found["requests"].items()} == REQUESTS
    ways = found["ways"]
    assert list(ways) == ["no socket", "socket", "asked", "watched"]
    assert all(found["wall"] > 0 and found["cpu"] > 0 for found in ways.values())


def test_it_measures_the_pages_of_a_huge_sweep_and_of_one_whose_jobs_report(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT.with_name("web.py")), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(file.read_text())["parts"]
    assert {"first jobs", "then: a sorted table", "results --html"} <= set(parts["huge"]["seconds"])
    assert all(wall > 0 for times in parts["huge"]["seconds"].values() for wall, _ in times)
    live = parts["live"]
    if "skipped" not in live:
        assert live["cores"]["server"] > 0
        assert 0 < live["late_s"]["median"] <= live["late_s"]["max"]
        assert len(live["memory"]) == 4
