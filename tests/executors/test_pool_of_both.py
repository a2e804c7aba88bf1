"""Leases of the program itself beside those of its calls, on one pool."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import gpu_launcher


@pytest.fixture
def pool(tmp_path: Path) -> gpu_launcher.Pool:
    return gpu_launcher.Pool("simulated:2", tmp_path / "pool")


def mask() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_lease_that_the_program_gives_back_is_free_though_an_executor_runs(pool: gpu_launcher.Pool) -> None:
    with pool, gpu_launcher.PoolExecutor(gpus=1, pool=pool) as executor:
        with pool.lease(gpus=1) as lease:
            (held,) = lease.devices
            seen = {call.result() for call in [executor.submit(mask) for _ in range(4)]}
            assert seen == {str(1 - held.index)}, "what the program holds is nobody else's"
        # The processes of the executor were forked while the lease was held.
        with pool.lease(gpus=2, timeout=30):
            pass


def test_all_entries_share_one_pool(pool: gpu_launcher.Pool) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    with pool, pool.lease(gpus=1) as lease:
        (held,) = lease.devices
        other = str(1 - held.index)
        masks = gpu_launcher.parallel_map(range(3), function=lambda record: mask(), pool=pool, progress=False)
        assert set(masks) == {other}

        def objective(trial: optuna.Trial) -> float:
            trial.set_user_attr("mask", mask())
            return 0.0

        gpu_launcher.optimize(study, objective, n_trials=2, pool=pool)
        assert {trial.user_attrs["mask"] for trial in study.trials} == {other}
