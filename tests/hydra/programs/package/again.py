"""Starts the program again, as Lightning's DDP does for every rank but the first."""

from __future__ import annotations

import os
import subprocess
import sys

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd, to_absolute_path

RANK = "LOCAL_RANK"


def start_rank_1() -> None:
    if RANK in os.environ:
        return
    main = sys.modules["__main__"]
    if main.__spec__ is None:
        command = [sys.executable, to_absolute_path(sys.argv[0])]
    else:
        command = [sys.executable, "-m", main.__spec__.name]
    run_dir = f'"{HydraConfig.get().run.dir}"'
    more = [f"hydra.run.dir={run_dir}", "hydra.job.name=rank_1", "hydra.output_subdir=null"]
    subprocess.run([*command, *sys.argv[1:], *more], env={**os.environ, RANK: "1"}, cwd=get_original_cwd(), check=True)


def rank() -> int:
    return int(os.environ.get(RANK, 0))
