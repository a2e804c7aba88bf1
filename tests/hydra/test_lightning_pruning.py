"""Tests `gpu_launcher.lightning.PruningCallback` in real training runs, of one process and of two."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher.errors import OptionError

pytest.importorskip("torch", reason="needs torch: pip install 'gpu-launcher[ddp]'")
pytest.importorskip("lightning", reason="needs Lightning: pip install 'gpu-launcher[ddp]'")

Run = Callable[..., subprocess.CompletedProcess[str]]

PRUNER = "hydra.sweeper.pruner={_target_: optuna.pruners.ThresholdPruner, upper: 5.0}"
GPUS = "hydra.launcher.gpus=${trainer.devices}"
SWEEP = ["-m", "hydra/sweeper=optuna_async", "hydra.sweep.dir=sweep", PRUNER, "hydra.sweeper.n_trials=2", GPUS]
ONE_OF_TWO = ["level=choice(0.0,9.0)", "hydra.sweeper.enqueue=[{level: 0.0},{level: 9.0}]"]
"""Overrides with which trial 0 completes and trial 1, which runs at the same time, is pruned."""
PROGRAM = "ddp_pruned.py"


def study(directory: Path) -> list[optuna.trial.FrozenTrial]:
    storage = gpu_launcher.storage(f"sqlite:///{directory / 'sweep' / 'study.db'}")
    (name,) = optuna.study.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def how(directory: Path, job: int, rank: int) -> tuple[int, str]:
    """The trial that a rank saw, and how its training ended."""
    _, number, epoch, ended = (directory / "sweep" / str(job) / f"rank-{rank}").read_text().split(" ", 3)
    assert epoch == ("3" if ended == "complete" else "0"), ended
    return int(number), ended


def left(directory: Path) -> list[list[str]]:
    """Living processes with this test's pool in their environment."""
    marker = f"GPU_LAUNCHER_POOL_DIR={directory / 'pool'}"
    found = []
    for process in psutil.process_iter():
        try:
            if marker in Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0"):
                found.append(process.cmdline())
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def test_all_ranks_of_a_pruned_trial_leave_at_the_same_epoch_and_the_other_trial_completes(
    run: Run, tmp_path: Path
) -> None:
    # With `linger`, rank 0 stays long enough for Lightning to notice that another rank failed, and to kill rank 0.
    ran = run(tmp_path, PROGRAM, *SWEEP, *ONE_OF_TWO, "linger=true")
    logs = "".join(log.read_text() for log in tmp_path.glob("sweep/*/job.log"))
    assert ran.returncode == 0, ran.stderr + logs
    complete, pruned = study(tmp_path)
    assert (complete.state, complete.value) == (TrialState.COMPLETE, 0.0), logs
    assert complete.intermediate_values == {0: 0.0, 1: 0.0, 2: 0.0}
    assert (pruned.state, pruned.value, pruned.intermediate_values) == (TrialState.PRUNED, 9.0, {0: 9.0}), logs
    assert [how(tmp_path, 0, rank) for rank in (0, 1)] == [(0, "complete")] * 2
    assert [how(tmp_path, 1, rank) for rank in (0, 1)] == [(1, "pruned at step 0")] * 2
    assert left(tmp_path) == []
    kept = {file.suffix for file in (tmp_path / "sweep" / ".gpu_launcher").iterdir()}
    assert kept == {".jsonl", ""}, "reports are in the study, and '' is the suffix of the lock"


def test_a_metric_that_nobody_logs_fails_the_trial_and_the_message_names_those_there_are(
    run: Run, tmp_path: Path
) -> None:
    ran = run(tmp_path, PROGRAM, *SWEEP, "level=choice(0.0)", "callbacks.pruning.monitor=val/los")
    assert ran.returncode == 1
    assert [trial.state for trial in study(tmp_path)] == [TrialState.FAIL] * 2
    assert "there is no metric 'val/los' after validation (there is val/loss)" in ran.stderr
    assert left(tmp_path) == []


def test_one_process_is_pruned_as_well(run: Run, tmp_path: Path) -> None:
    ran = run(tmp_path, PROGRAM, *SWEEP, *ONE_OF_TWO, "trainer.devices=1")
    assert ran.returncode == 0, ran.stderr
    assert [trial.state for trial in study(tmp_path)] == [TrialState.COMPLETE, TrialState.PRUNED]


def test_the_callback_of_optuna_integration_takes_the_trial_from_hydras_config(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("optuna_integration", reason="needs optuna-integration")
    trial = "trial: {_target_: gpu_launcher.current_trial}"
    target = "_target_: optuna_integration.PyTorchLightningPruningCallback"
    callback = ["~callbacks.pruning", f"+callbacks.another={{{target}, monitor: val/loss, {trial}}}"]
    ran = run(tmp_path, PROGRAM, *SWEEP, *ONE_OF_TWO, "trainer.devices=1", *callback)
    assert ran.returncode == 0, ran.stderr
    complete, pruned = study(tmp_path)
    assert (complete.state, pruned.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert complete.intermediate_values == {0: 0.0, 1: 0.0, 2: 0.0}


def test_outside_a_sweep_the_callback_does_nothing(run: Run, tmp_path: Path) -> None:
    ran = run(tmp_path, PROGRAM, "trainer.devices=1", "level=9", "callbacks.pruning.monitor=none", "hydra.run.dir=out")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "rank-0").read_text().endswith("complete")


def test_the_callback_can_be_copied_and_is_told_apart_by_its_metric() -> None:
    from lightning.pytorch.callbacks import Callback

    from gpu_launcher.lightning import PruningCallback

    callback = PruningCallback("val/loss")
    assert isinstance(callback, Callback)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (twin.monitor, twin.state_key) == ("val/loss", callback.state_key)
    assert PruningCallback("val/acc").state_key != callback.state_key
    assert json.dumps(callback.state_dict()) == "{}"


def test_the_error_for_a_metric_says_what_to_do() -> None:
    from gpu_launcher.lightning import PruningCallback

    metrics: dict[str, Any] = {}
    with pytest.raises(OptionError, match=r"there is none.*self\.log\('val_loss'"):
        PruningCallback()._value(metrics)
