"""Tests what a job does before it has devices, so that no device is idle meanwhile."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = textwrap.dedent(
    """
    import os
    import time
    from pathlib import Path

    import hydra
    from hydra.core.hydra_config import HydraConfig

    @hydra.main(version_base=None, config_path=None)
    def main(cfg):
        other = Path(HydraConfig.get().sweep.dir, "1", ".hydra", "config.yaml")
        deadline = time.monotonic() + cfg.patience
        while cfg.job == 0 and not other.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        print("job", cfg.job, "mask", os.environ["CUDA_VISIBLE_DEVICES"], "saw", other.exists())

    main()
    """
)


def sweep(directory: Path, patience: float, *overrides: str) -> list[str]:
    """Run two jobs on one device; return what they printed."""
    (directory / "program.py").write_text(PROGRAM)
    launcher = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:1", "hydra.sweep.dir=sweep")
    subprocess.run(
        [sys.executable, "program.py", "-m", *launcher, "+job=0,1", f"+patience={patience}", *overrides],
        cwd=directory,
        check=True,
        timeout=500,
    )
    return [(directory / "sweep" / job / "job.log").read_text().strip() for job in "01"]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_job_saves_its_config_while_another_has_the_only_device(tmp_path: Path, start_method: str) -> None:
    said = sweep(tmp_path, 200, f"hydra.launcher.start_method={start_method}")
    assert said == ["job 0 mask 0 saw True", "job 1 mask 0 saw True"]


def test_where_hydras_own_config_reads_the_mask_a_job_has_it_first(tmp_path: Path) -> None:
    sweep(tmp_path, 0, "hydra.job_logging.handlers.file.filename=on-${oc.env:CUDA_VISIBLE_DEVICES}.log")
    assert (tmp_path / "on-0.log").exists()
