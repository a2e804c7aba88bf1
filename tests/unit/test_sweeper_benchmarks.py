"""The sweeper's benchmarks work. How fast anything is, is no matter of tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BASELINE = "optuna, gpu_pool"

pytest.importorskip("optuna")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source tree"),
]


def benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def measured(name: str, directory: Path, *arguments: str) -> dict[str, Any]:
    file = directory / "results.json"
    done = benchmark(name, "--json", str(file), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def test_real_sweeps_are_timed_whoever_asks(tmp_path: Path) -> None:
    found = measured("async_vs_batch.py", tmp_path, "processes", "--sweepers", f"optuna_async tpe;{BASELINE}")
    sweepers = found["parts"]["processes"]["sweepers"]
    assert "optuna_async tpe" in sweepers
    for of in sweepers.values():
        assert 0 < of["span_s"] < of["elapsed_s"]
        assert 0 < of["utilisation"] <= 1
    assert sweepers["optuna_async tpe"]["pause_median_ms"] > 0


def test_a_trial_takes_every_sweeper_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "programs"))
    from objectives import OBJECTIVES, seconds

    assert seconds(1, 7, median=2.0, sigma=0.5) == seconds(1, 7, median=2.0, sigma=0.5)
    assert seconds(1, 7, median=2.0, sigma=0.5) != seconds(1, 8, median=2.0, sigma=0.5)
    best = {
        "hartmann6": dict(
            zip([f"x{i}" for i in range(6)], (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573), strict=True)
        ),
        "branin": {"x0": 3.14159265, "x1": 2.275},
        "mixed": {"lr": 1e-3, "dropout": 0.2, "layers": 4, "width": 128, "optimizer": "adam", "activation": "gelu"},
    }
    for name, objective in OBJECTIVES.items():
        assert set(best[name]) == set(objective.space)
        assert objective.evaluate(best[name]) == pytest.approx(objective.minimum, abs=1e-4)


def test_searches_are_simulated_with_real_samplers(tmp_path: Path) -> None:
    found = measured("async_vs_batch.py", tmp_path, "simulated")["parts"]["simulated"]["objectives"]
    assert set(found) == {"hartmann6", "branin", "mixed"}
    for strategies in found.values():
        assert {"optuna_async auto", "optuna_async tpe"} <= set(strategies)
        assert all(run["regret"] >= -1e-4 for runs in strategies.values() for run in runs)


def test_jobs_measure_what_their_own_reports_take(tmp_path: Path) -> None:
    found = measured("reporting.py", tmp_path)
    assert 1 < found["at_once"] <= found["jobs"]
    assert found["stored"] == found["report_ns"]["calls"] > 0
    assert 0 < found["report_ns"]["median_ms"] <= found["report_ns"]["max_ms"]
    assert found["database_errors"] == []
