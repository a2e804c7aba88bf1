"""The sweepers that are compared, and how each is told to use so many slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from overhead.machine import version


@dataclass(frozen=True)
class Sweeper:
    """One way to search with the same program."""

    name: str
    options: Callable[[int], list[str]]
    """Overrides that choose it, for so many slots."""
    seed: str
    """The key of its sampler's seed."""
    ours: bool
    needs: tuple[str, ...] = ()
    """Distributions that have to be installed for it."""

    def missing(self) -> str | None:
        """Why it cannot be measured, if so."""
        absent = [distribution for distribution in self.needs if not version(distribution)]
        return f"{' and '.join(absent)} not installed" if absent else None


def _pool(slots: int) -> list[str]:
    return ["hydra/launcher=gpu_pool", f"hydra.launcher.devices=simulated:{slots}", "hydra.launcher.start_method=fork"]


def _ours(sampler: str) -> Sweeper:
    return Sweeper(
        f"optuna_async {sampler}",
        lambda slots: ["hydra/sweeper=optuna_async", f"hydra/sweeper/sampler={sampler}", *_pool(slots)],
        "hydra.sweeper.seed",
        ours=True,
    )


def _official(launcher: str, options: Callable[[int], list[str]], *needs: str) -> Sweeper:
    # It launches batches of `n_jobs`, and its own sampler's options are what it comes with.
    return Sweeper(
        f"optuna, {launcher}",
        lambda slots: ["hydra/sweeper=optuna", f"hydra.sweeper.n_jobs={slots}", *options(slots)],
        "hydra.sweeper.sampler.seed",
        ours=False,
        needs=("hydra-optuna-sweeper", *needs),
    )


SWEEPERS = (
    _ours("tpe"),
    _ours("auto"),
    _official("gpu_pool", _pool),
    _official(
        "joblib", lambda slots: ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={slots}"], "hydra-joblib-launcher"
    ),
)
