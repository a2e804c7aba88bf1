"""The sweeper class `optuna_async` that Hydra finds. Every Hydra program imports it at its start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper

from . import config as _config  # noqa: F401  (stores the configs, also where Hydra finds this class by entry point)

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


class OptunaAsyncSweeper(Sweeper):
    """Asks Optuna for a trial whenever a job can start, and tells it each result immediately."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `OptunaAsyncSweeperConf`; `sweep` checks them."""
        self.options = options
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store Hydra's arguments and create the launcher."""
        self.config = config
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the trials; see `_sweep.sweep`."""
        from gpu_launcher.errors import UnsupportedVersionError
        from gpu_launcher.requirements import check_version

        try:
            check_version("optuna")
        except UnsupportedVersionError as error:  # otherwise the next import fails midway
            raise CompactHydraException(f"hydra/sweeper=optuna_async: {error}") from None
        from ._sweep import sweep

        return sweep(self, arguments)
