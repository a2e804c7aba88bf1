"""The options of `hydra/sweeper=grid_async`. Imported at the start of every Hydra program: keep it light."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

HELP = {
    "max_batch_size": "Jobs that are given to the launcher at a time, each batch when the last one has ended. "
    "null: all, which gpu_pool runs as devices become free.",
    "params": "What to sweep over, as on the command line: lr: 1e-3,1e-4. zip(lr=choice(1,2),n=choice(3,4)) "
    "varies several keys together.",
    "filter": "Expression that a combination must satisfy to become a job: batch * accumulate <= 512. null: all do.",
}
"""What each option means; `--cfg hydra` and shell completion show it under `hydra.sweeper.help`."""


@dataclass
class GridAsyncSweeperConf:
    """The options, with their defaults; HELP has their documentation."""

    _target_: str = "hydra_plugins.grid_async_sweeper.sweeper.GridAsyncSweeper"
    max_batch_size: int | None = None
    params: dict[str, Any] | None = None
    filter: str | None = None
    help: dict[str, str] = field(default_factory=lambda: dict(HELP))


ConfigStore.instance().store(
    group="hydra/sweeper", name="grid_async", node=GridAsyncSweeperConf, provider="gpu_launcher"
)
