"""The work that the programs of this package share."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd

from . import again

log = logging.getLogger(__name__)


class Schedule:
    def __init__(self, lr: float) -> None:
        self.lr = lr


def work(lr: float) -> float:
    """Start rank 1, then record what this rank sees."""
    value = 10 * float(lr)
    again.start_rank_1()
    config = HydraConfig.get()
    log.debug("rank %d learns at %s", again.rank(), lr)
    found = {
        "pid": os.getpid(),
        "number": config.job.num,
        "lr": lr,
        "mode": config.mode.name,
        "mask": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "output_dir": config.runtime.output_dir,
        "original_cwd": get_original_cwd(),
        "module": getattr(sys.modules["__main__"].__spec__, "name", None),
    }
    Path(config.runtime.output_dir, f"rank-{again.rank()}.json").write_text(json.dumps(found))
    return value
