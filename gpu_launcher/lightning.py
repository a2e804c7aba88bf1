"""For Lightning: a callback that ends a training which the sweep prunes. Needs `lightning` or `pytorch-lightning`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from gpu_launcher.errors import OptionError
from gpu_launcher.studies.reporting import in_trial, report


def _base() -> Any:
    """Lightning's Callback, of the package that the program uses."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name is None or error.name != name.partition(".")[0]:
                raise  # it is installed, and lacks something itself
    raise ModuleNotFoundError("gpu_launcher.lightning needs Lightning: pip install lightning", name="lightning")


class PruningCallback(_base()):  # type: ignore[misc]
    """Reports a metric after each validation, and ends the training if the trial is pruned.

    Its step is the epoch. `optuna.TrialPruned` then leaves `Trainer.fit` in every rank, upon which the trial counts as
    pruned. Under DDP, the ranks that Lightning starts as scripts of their own leave at the same epoch. With the
    strategies that fork or spawn all ranks (`ddp_spawn`, `ddp_notebook`) nothing is pruned.

    In Hydra's config: `{_target_: gpu_launcher.lightning.PruningCallback, monitor: val/loss}`. Outside a sweep of
    `hydra/sweeper=optuna_async` it does nothing.
    """

    def __init__(self, monitor: str = "val_loss") -> None:
        """`monitor` is the name under which the program logs the metric, with `self.log`."""
        super().__init__()
        self.monitor = monitor

    @property
    def state_key(self) -> str:
        """Lightning keeps callbacks apart by it."""
        key: str = self._generate_state_key(monitor=self.monitor)
        return key

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Raises optuna.TrialPruned if so, and OptionError if there is no such metric."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not in_trial():
            return
        # The later ranks' values are not heard, and need not exist.
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
