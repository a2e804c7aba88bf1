"""Tests programs that launch more than once: sweepers with batches, notebooks, several sweeps in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.test_utils.test_utils import TSweepRunner
from omegaconf import DictConfig

from gpu_launcher.processes.fork_server_client import ForkServer
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.worker import JobContext

Plugins.instance()  # Hydra 1.4: before the first test, whose fixture saves and restores Hydra's singletons

pytestmark = [
    pytest.mark.usefixtures("hydra_restore_singletons"),
    # The runner uses Hydra 1.1's defaults, and Hydra 1.3 warns about these.
    pytest.mark.filterwarnings(r"ignore:\s*Future Hydra versions will no longer change working directory:UserWarning"),
]


def launches(runner: TSweepRunner, directory: Path, *overrides: str) -> list[list[JobReturn]]:
    """Sweep over three jobs that return the process id of their fork server."""

    def task(cfg: DictConfig) -> int:
        supervisor = psutil.Process().parent()
        assert supervisor is not None
        return supervisor.ppid()

    sweep = runner(
        calling_file=None,
        calling_module="hydra.test_utils.a_module",
        task_function=task,
        config_path="configs",
        config_name="compose.yaml",
        overrides=["hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "+a=1,2,3", *overrides],
        temp_dir=directory,
    )
    with sweep:
        returns: Any = sweep.returns
        return list(returns)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_batches_share_one_fork_server_and_count_on(
    hydra_sweep_runner: TSweepRunner, tmp_path: Path, method: str
) -> None:
    batches = launches(
        hydra_sweep_runner,
        tmp_path / "sweep",
        "hydra.sweeper.max_batch_size=1",
        f"hydra.launcher.start_method={method}",
    )
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert len({job.return_value for (job,) in batches}) == 1
    assert [job.hydra_cfg.hydra.job.num for (job,) in batches if job.hydra_cfg] == [0, 1, 2]


def test_a_program_may_sweep_twice(hydra_sweep_runner: TSweepRunner, tmp_path: Path) -> None:
    (first,) = launches(hydra_sweep_runner, tmp_path / "first")
    (second,) = launches(hydra_sweep_runner, tmp_path / "second")
    assert {job.return_value for job in first}.isdisjoint({job.return_value for job in second})


def nothing(number: int, spec: Any, context: JobContext) -> Report:
    return Report(True, None, b"")


def test_a_fork_server_ends_though_a_later_one_has_copies_of_its_descriptors() -> None:
    first = ForkServer(nothing, "fork")
    second = ForkServer(nothing, "fork")
    first.close()  # returns
    second.close()
