"""A Hydra sweep with `memory=auto` on a GPU whose driver reports what each job uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpu_launcher import load_results
from tests.warm import TextProgram

if TYPE_CHECKING:
    from tests.conftest import Machine

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        str(Path("/proc/self/ns/pid").readlink()) != "pid:[4026531836]",
        reason="the driver's process ids belong to another namespace",
    ),
]

GIB = 2**30


@pytest.mark.parametrize(
    "sweep",
    [
        pytest.param(("n=range(12)",), id="grid"),
        pytest.param(("hydra/sweeper=optuna_async", "hydra.sweeper.n_trials=12", "n=range(0,100)"), id="search"),
    ],
)
def test_later_jobs_share_a_gpu_once_the_memory_of_earlier_ones_is_known(
    machine: Machine, tmp_path: Path, start: Callable[..., TextProgram], sweep: tuple[str, ...]
) -> None:
    (tmp_path / "use").mkdir()
    machine.has("count 1", *machine.gpu(0, "GPU-a"))
    program = start(
        tmp_path,
        "uses_memory.py",
        "-m",
        "hydra/launcher=gpu_pool",
        "hydra.launcher.memory=auto",
        "hydra.sweep.dir=sweep",
        *sweep,
        **machine.environment(GPU_LAUNCHER_POOL_DIR=str(tmp_path / "pool")),
    )
    try:
        while program.poll() is None:
            running = [path.name for path in (tmp_path / "use").iterdir()]
            used = (
                f"memory_used {4 * GIB * len(running)}",
                "compute " + " ".join(f"{pid}:{4 * GIB}" for pid in running),
            )
            machine.has("count 1", *machine.gpu(0, "GPU-a", *(used if running else ())))
            time.sleep(0.05)
        _, err = program.communicate(timeout=60)
    finally:
        program.kill()
        program.wait()
    assert program.returncode == 0, err
    assert (tmp_path / "packed").exists(), "two jobs were on the GPU at once"
    table = load_results(tmp_path / "sweep")
    assert {row.outcome for row in table} == {"completed"}
    measured = [row for row in table if row.peak_device_memory is not None]
    assert len(measured) >= 3
    assert {row.peak_device_memory for row in measured} == {4 * GIB}
