"""The sweeper class that Hydra finds. Imported at the start of every Hydra program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins import basic_sweeper

from . import config as _config  # noqa: F401  (stores the config, also where Hydra finds this class by entry point)

if TYPE_CHECKING:
    from collections.abc import Sequence


class GridAsyncSweeper(basic_sweeper.BasicSweeper):
    """Hydra's basic sweeper, without its look at every job's config before the first job may start.

    That takes 45 to 100 ms for each job, and one that does not compose ends the sweep before it begins. Here every job
    composes its own config, and one that cannot fails alone.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, Any] | None, **_: Any) -> None:
        """Take the options of `GridAsyncSweeperConf`."""
        super().__init__(max_batch_size, params)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Leave it to the jobs."""
