"""Makes `hydra/sweeper=optuna_async` hold where a config also states another sweeper's `_target_`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from omegaconf import DictConfig

OURS = "hydra_plugins.optuna_async_sweeper.sweeper.OptunaAsyncSweeper"
OFFICIAL = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"


class ChooseSweeper(Callback):
    """See the module. Hydra calls it before it makes the sweeper; only the config of optuna_async names it.

    The lightning-hydra-template, and what is made from it, states `_target_` beside `override /hydra/sweeper: optuna`.
    The group that is chosen on the command line does not change that line.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Put the chosen sweeper's `_target_` in the place of the official one."""
        from omegaconf import open_dict, read_write

        hydra = config.hydra
        if hydra.runtime.choices.get("hydra/sweeper") == "optuna_async" and hydra.sweeper.get("_target_") == OFFICIAL:
            with read_write(hydra), open_dict(hydra.sweeper):
                hydra.sweeper._target_ = OURS
                hydra.overrides.hydra.append(f"hydra.sweeper._target_={OURS}")  # for the jobs, which compose it again
