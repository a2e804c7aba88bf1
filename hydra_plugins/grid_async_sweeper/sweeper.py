"""The sweeper class `grid_async` that Hydra finds. Every Hydra program imports it at its start."""

from __future__ import annotations

import itertools
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException

from hydra_plugins.gpu_pool_launcher.launcher import GpuPoolLauncher

from . import config as _config  # noqa: F401  (stores the config, also where Hydra finds this class by entry point)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn


log = logging.getLogger(__name__)


class GridAsyncSweeper(basic_sweeper.BasicSweeper):
    """Hydra's basic sweeper, except that it does not compose every job's config before the first job starts.

    Composing takes 45 to 100 ms for each job, and one config that does not compose ends Hydra's sweep before it begins.
    Here each job composes its own config. If one config does not compose, only its job fails. No failure keeps later
    batches from running.
    """

    def __init__(
        self, max_batch_size: int | None, params: dict[str, Any] | None, filter: str | None = None, **_: Any
    ) -> None:
        """Take the options of `GridAsyncSweeperConf`."""
        super().__init__(max_batch_size, params)
        self.filter = filter

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Launch all jobs, batch after batch; return the JobReturns of each batch.

        Raises the first failed job's exception once all jobs have run.
        """
        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        from gpu_launcher.errors import GpuLauncherError
        from gpu_launcher.jobs.ending import recorded_end
        from hydra_plugins.gpu_pool_launcher._directory import make_directory
        from hydra_plugins.gpu_pool_launcher._ending import final

        try:
            jobs = self._jobs(arguments)
        except GpuLauncherError as error:
            raise final(CompactHydraException(str(error))) from error
        except CompactHydraException as error:
            raise final(error) from error.__cause__
        if isinstance(self.launcher, GpuPoolLauncher) and self.launcher.options.get("dry_run"):
            self.launcher.launch(jobs, initial_job_idx=0)  # of all batches; it ends the program
        directory = make_directory(self.config)
        returns: list[Sequence[JobReturn]] = []
        with recorded_end(directory) if isinstance(self.launcher, GpuPoolLauncher) else nullcontext():
            for batch in self.split_overrides_to_chunks(jobs, self.max_batch_size):
                returns.append(self.launcher.launch(batch, initial_job_idx=sum(map(len, returns))))
            if isinstance(self.launcher, GpuPoolLauncher):
                from hydra_plugins.gpu_pool_launcher._launch import fail_with_first

                fail_with_first([job for batch in returns for job in batch])
            for job in itertools.chain.from_iterable(returns):
                _ = job.return_value  # raises if the job failed, as Hydra's own sweeper does after each batch
        return returns

    def _jobs(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of all jobs, in order."""
        assert self.hydra_context is not None
        from hydra_plugins.gpu_pool_launcher._filter import OPTION, read_filter

        from ._grid import read_dimensions, read_jobs, size

        chosen = None if self.filter is None else read_filter(self.filter)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        dimensions = read_dimensions([*self._parse_config(), *arguments], parser, self.config)
        jobs = read_jobs(dimensions, chosen)
        if chosen is not None:
            log.info(f"{OPTION} leaves {len(jobs)} of {size(dimensions)} combinations")
        return jobs
