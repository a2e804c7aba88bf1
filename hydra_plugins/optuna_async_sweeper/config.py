"""The options of `hydra/sweeper=optuna_async`. Imported at the start of every Hydra program: keep it light."""

import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from hydra_plugins.gpu_pool_launcher.resolvers import register_resolver

HELP = {
    "sampler": "Sampler: auto (the GP sampler where it suits, else TPE), tpe, gp, random, cmaes, nsgaii, nsgaiii, "
    "qmc, grid, bruteforce, a class of optuna.samplers, {name: tpe, n_startup_trials: 5}, or a node with _target_.",
    "pruner": "Pruner: median, hyperband, asha, percentile, threshold, wilcoxon, a class of optuna.pruners, {name: "
    "patient, patience: 3, wrapped: median}, or a node with _target_. null: no pruning.",
    "direction": "minimize or maximize; for several objectives, a list of these.",
    "storage": "Where the study is kept: a URL such as sqlite:///study.db. null: a SQLite file in the sweep directory.",
    "study_name": "Name of the study in the storage. null: a name made for this sweep.",
    "n_trials": "Number of trials that this sweep runs.",
    "total_trials": "Number of trials of the study that should complete or be pruned, including those of earlier "
    "sweeps and the failed trials of this one. n_trials is then ignored. null: n_trials applies.",
    "n_jobs": "Maximum number of trials at the same time. null: as many as the devices allow.",
    "max_failure_rate": "Fraction of the finished trials, from 0 to 1, that may fail before the sweep ends. null: "
    "failures do not end the sweep.",
    "params": "What to search or fix, as on the command line: lr: interval(0, 1). The command line takes precedence. "
    "zip(lr=choice(1,2),n=choice(3,4)) varies several keys together.",
    "filter": "Expression that a trial must satisfy to run: batch * accumulate <= 512. null: all do.",
    "custom_search_space": "Dotted name of a function of the config and the trial that suggests more parameters.",
    "timeout": "Time after which no new trial starts, such as 90, 30m or 2h. null: no limit.",
    "patience": "Number of completed trials without a better value after which no new trial starts. null: no limit.",
    "retry_stale": (
        "How many times to queue a lost trial again: one that was running when its sweep, or a process that runs its "
        "jobs, died."
    ),
    "enqueue": "Known good points to try first: a list of {parameter: value}, or a YAML file with one.",
    "kill_pruned": "Stop a job that should be pruned but does not ask.",
    "plots": "Write plots of the study to the sweep directory at the end.",
    "seed": "Seed of the sampler. Later sweeps on the same study derive their own seeds from it, so that they do not "
    "propose the same points again. A sweep whose jobs run at the same time is not repeatable, even with a seed.",
}
"""What each option means; `--cfg hydra` and shell completion show it under `hydra.sweeper.help`."""


@dataclass
class OptunaAsyncSweeperConf:
    """The options, with their defaults; HELP has their documentation."""

    _target_: str = "hydra_plugins.optuna_async_sweeper.sweeper.OptunaAsyncSweeper"
    # Without this, Hydra 1.3 would create the sampler and pruner. Hydra 1.4 leaves them to the sweeper anyway.
    _recursive_: bool = False
    defaults: list[Any] = field(
        default_factory=lambda: ["_self_", {"sampler": "auto"}, "/hydra/gpu_launcher/choose_sweeper"]
    )
    sampler: Any = MISSING
    pruner: Any = None
    direction: Any = "minimize"
    storage: Any = None
    study_name: str | None = None
    n_trials: int | None = 20
    total_trials: int | None = None
    n_jobs: int | None = None
    max_failure_rate: float | None = None
    params: dict[str, Any] | None = None
    filter: str | None = None
    custom_search_space: str | None = None
    timeout: Any = None
    patience: int | None = None
    retry_stale: int = 1
    enqueue: Any = None
    kill_pruned: bool = False
    plots: bool = False
    seed: int | None = None
    help: dict[str, str] = field(default_factory=lambda: dict(HELP))


CALLBACK = "hydra_plugins.optuna_async_sweeper.callback.ChooseSweeper"
_EVOLUTION = "population_size mutation mutation_prob crossover crossover_prob swapping_prob constraints_func"

SAMPLERS = {
    "auto": "seed",
    "tpe": "seed n_startup_trials n_ei_candidates multivariate group constant_liar constraints_func",
    "gp": "seed n_startup_trials deterministic_objective independent_sampler warn_independent_sampling "
    "constraints_func",
    "random": "seed",
    "cmaes": "seed x0 sigma0 n_startup_trials independent_sampler warn_independent_sampling consider_pruned_trials "
    "popsize use_separable_cma with_margin lr_adapt source_trials",
    "nsgaii": f"seed {_EVOLUTION}",
    "nsgaiii": f"seed {_EVOLUTION} reference_points dividing_parameter",
    "qmc": "seed qmc_type scramble independent_sampler warn_asynchronous_seeding warn_independent_sampling",
    "grid": "seed",
    "bruteforce": "seed",
}
"""The configs of hydra/sweeper/sampler and their options. null means Optuna's default, or ours for tpe."""


def _store_samplers() -> None:
    """Store the configs that the official plugin does not have: Hydra 1.4 warns about a name that is stored twice.

    Hydra imports plugins in no fixed order. So the official plugin is imported first if it is installed. That costs
    nothing, because Hydra imports it anyway.
    """
    with suppress(ImportError):  # not installed, or broken, as Hydra itself will say
        import_module("hydra_plugins.hydra_optuna_sweeper.config")
    store = ConfigStore.instance()
    group = "hydra/sweeper/sampler"
    taken = store.list(group) if "sampler" in store.repo.get("hydra", {}).get("sweeper", {}) else []
    for name, options in SAMPLERS.items():
        if f"{name}.yaml" not in taken:
            # Not a struct, so that hydra.sweeper.sampler={name: ..., ...} can have other keys; the sweeper checks them.
            node = OmegaConf.create({"name": name, **dict.fromkeys(options.split())}, flags={"struct": False})
            store.store(group=group, name=name, node=node, provider="gpu_launcher")


_store_samplers()


def _callback() -> dict[str, str]:
    """The callback's config. Hydra 1.4 would warn about it, as about any callback that the program does not allow."""
    warnings.filterwarnings("ignore", rf"hydra\.utils\.instantiate\(\) resolved _target_='{re.escape(CALLBACK)}'")
    return {"_target_": CALLBACK}


register_resolver("gpu_pool.choose_sweeper", _callback)
# In `_global_`, because it would otherwise be placed within hydra.sweeper.
ConfigStore.instance().store(
    group="hydra/gpu_launcher",
    name="choose_sweeper",
    node={"hydra": {"callbacks": {"gpu_launcher": "${gpu_pool.choose_sweeper:}"}}},
    package="_global_",
    provider="gpu_launcher",
)
ConfigStore.instance().store(
    group="hydra/sweeper", name="optuna_async", node=OptunaAsyncSweeperConf, provider="gpu_launcher"
)
