"""Makes `hydra/sweeper=optuna_async` take effect if a config also sets the official sweeper's `_target_`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from omegaconf import DictConfig

OURS = "hydra_plugins.optuna_async_sweeper.sweeper.OptunaAsyncSweeper"
OFFICIAL = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"


class ChooseSweeper(Callback):
    """Replaces the official sweeper's `_target_` if optuna_async was chosen.

    Only the config of optuna_async names this callback. Hydra calls it before it creates the sweeper.

    The lightning-hydra-template and projects made from it set `_target_` beside `override /hydra/sweeper: optuna`.
    Choosing the group on the command line does not change that line.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Replace the official sweeper's `_target_` with that of the chosen sweeper."""
        from omegaconf import open_dict, read_write

        hydra = config.hydra
        if hydra.runtime.choices.get("hydra/sweeper") == "optuna_async" and hydra.sweeper.get("_target_") == OFFICIAL:
            with read_write(hydra), open_dict(hydra.sweeper):
                hydra.sweeper._target_ = OURS
                hydra.overrides.hydra.append(f"hydra.sweeper._target_={OURS}")  # jobs compose the config again
