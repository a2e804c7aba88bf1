"""A Lightning callback that ends the training of a pruned trial. Requires `lightning` or `pytorch-lightning`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from gpu_launcher.errors import OptionError
from gpu_launcher.studies.reporting import in_trial, report


def _base() -> Any:
    """The class Callback of the Lightning package that the program uses."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name is None or error.name != name.partition(".")[0]:
                raise  # the package is installed, but one of its own dependencies is missing
    raise ModuleNotFoundError("gpu_launcher.lightning needs Lightning: pip install lightning", name="lightning")


class PruningCallback(_base()):  # type: ignore[misc]
    """Reports a metric after each validation, and ends the training if the trial is pruned.

    The step of a report is the epoch. To prune, `Trainer.fit` raises `optuna.TrialPruned` in every rank. Under DDP,
    ranks that Lightning starts as separate scripts end at the same epoch. Strategies that fork or spawn all ranks
    (`ddp_spawn`, `ddp_notebook`) do not support pruning.

    In Hydra's config: `{_target_: gpu_launcher.lightning.PruningCallback, monitor: val/loss}`. It does nothing outside
    a sweep of `hydra/sweeper=optuna_async`.
    """

    def __init__(self, monitor: str = "val_loss") -> None:
        """`monitor` is the name that the program passes to `self.log`."""
        super().__init__()
        self.monitor = monitor

    @property
    def state_key(self) -> str:
        """The key by which Lightning distinguishes callbacks."""
        key: str = self._generate_state_key(monitor=self.monitor)
        return key

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the metric. Raises optuna.TrialPruned to prune, OptionError if the metric does not exist."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not in_trial():
            return
        # Only rank 0's value is used, so the other ranks need none.
        value = self._value(trainer.callback_metrics) if trainer.is_global_zero else 0.0
        report(value, trainer.current_epoch)

    def _value(self, metrics: Any) -> float:
        if self.monitor not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise OptionError(
                "PruningCallback.monitor",
                f"there is no metric {self.monitor!r} after validation (there is {known}): log it in a validation "
                f"step with self.log({self.monitor!r}, ...), or monitor another",
            )
        return float(metrics[self.monitor])
