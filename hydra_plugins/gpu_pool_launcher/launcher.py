"""The launcher class that Hydra finds. Every Hydra program imports it at its start, so the work is in `_launch`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher

from . import config as _config  # noqa: F401  (stores the config, also where Hydra finds this class by entry point)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


class GpuPoolLauncher(Launcher):
    """Runs each job in its own process, on devices leased from the machine's pool."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `GpuPoolLauncherConf`."""
        super().__init__()
        self.options = options
        self.config: DictConfig | None = None
        self.task_function: TaskFunction | None = None
        self.hydra_context: HydraContext | None = None
        self.node: Any = None
        """The node, kept for sweepers that launch several batches."""
        self.labels: Any = None
        """The jobs' labels, made of the overrides that differ between the jobs of all batches."""
        self.lock: Any = None
        """The lock on the sweep's directory, held as long as this launcher or its node lives."""
        self.logs: Any = None
        """The log file of each job, kept for sweepers that launch several batches."""
        self.throttle: Any = None
        """How much might run at the end of the batch before."""
        self.detachment: Any = None
        """What ties this process to the terminal's, if the sweep is to continue without the terminal."""
        self.failed = 0
        """Number of failed jobs in all batches."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare the sweep's directory before Hydra writes into it; see `hydra.plugins.launcher.Launcher`."""
        self.config = config
        self.hydra_context = hydra_context
        self.task_function = task_function
        if sys.platform == "linux":  # elsewhere `launch` says what is wrong
            from ._directory import detach, leave_directory, take_directory
            from ._large_grid import announce_large_grid

            if self.options.get("dry_run"):
                leave_directory(self)
            else:
                if self.options.get("detach"):
                    detach(self)
                take_directory(self)
            announce_large_grid(config, hydra_context.config_loader)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; see `hydra.plugins.launcher.Launcher`. A job's failure is in its JobReturn, not raised."""
        if sys.platform != "linux":
            raise CompactHydraException("hydra/launcher=gpu_pool: runs on Linux only; use another launcher here")
        from ._launch import launch

        return launch(self, job_overrides, initial_job_idx)
