"""Says that Hydra's own sweeper will be silent for long, because it composes the configs of all jobs first."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ._commands import is_basic

MAX_SILENT = 100
"""Number of jobs up to which nothing is said. Composing the config of one takes 45 to 100 ms."""


def announce_large_grid(config: DictConfig, loader: ConfigLoader) -> None:
    """Say so if Hydra will compose the configs of many jobs before it calls the launcher."""
    if not is_basic(config):
        return
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    task = cast("list[str]", OmegaConf.to_container(config.hydra.overrides.task, resolve=False))
    jobs = grid_size([*params, *task], loader)
    if (most := config.hydra.sweeper.get("max_batch_size")) is not None:
        jobs = min(jobs, most)
    if jobs > MAX_SILENT:
        print(
            f"[gpu_pool] Hydra composes the configs of {jobs} jobs before the first job starts; with "
            "hydra/sweeper=grid_async the first job starts at once",
            file=sys.stderr,
            flush=True,
        )


def grid_size(overrides: Sequence[str], loader: ConfigLoader) -> int:
    """The number of jobs that Hydra's own sweeper makes of overrides; 0 if it refuses them."""
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
        if any(one.is_interval_sweep() for one in parsed):
            return 0
        # If several overrides have the same key, the last one counts.
        sizes = {
            one.get_key_element(): sum(1 for _ in one.sweep_string_iterator()) if one.is_sweep_override() else 1
            for one in parsed
        }
    except (HydraException, ValueError):  # the sweeper raises it again
        return 0
    return math.prod(sizes.values())
