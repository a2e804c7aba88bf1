"""Prints, as JSON, the sampler and pruner that optuna_async creates from the config."""

import json
import sys

from hydra import compose, initialize
from hydra.core.plugins import Plugins

from hydra_plugins.optuna_async_sweeper._pruners import make_pruner
from hydra_plugins.optuna_async_sweeper._samplers import make_sampler
from hydra_plugins.optuna_async_sweeper._search_space import read_search_space

with initialize(config_path=None, **({"version_base": None} if sys.argv[1] == "1.3" else {})):
    config = compose(overrides=["hydra/sweeper=optuna_async", *sys.argv[2:]], return_hydra_config=True)
sweeper = Plugins.instance()._instantiate(config.hydra.sweeper)
options = sweeper.options
sampler, why = make_sampler(
    options["sampler"],
    choice=config.hydra.runtime.choices["hydra/sweeper/sampler"],
    space=read_search_space(["k=a,b"]),
    directions=["minimize"],
    n_trials=options["n_trials"],
)
print(
    json.dumps(
        {
            "node": type(options["sampler"]).__name__,
            "sampler": type(sampler).__name__,
            "multivariate": getattr(sampler, "_multivariate", None),
            "startup": getattr(sampler, "_n_startup_trials", None),
            "pruner": type(make_pruner(options["pruner"])).__name__,
            "why": why,
        }
    )
)
