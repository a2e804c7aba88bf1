"""Opens the study of a sweep, checks that the two fit, and defines the overrides of its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import get_method
from omegaconf import DictConfig
from optuna.samplers import BaseSampler, BruteForceSampler, GPSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from gpu_launcher.errors import OptionError, StudyError
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.report_curves import STUDY_FILE
from gpu_launcher.studies.storage import storage as open_storage
from gpu_launcher.studies.storage_url import without_password
from gpu_launcher.studies.study_session import LeftOutError, StudySession
from gpu_launcher.studies.study_storage import StudyStorage
from hydra_plugins.gpu_pool_launcher._filter import OPTION

from ._classes import instantiate, plain
from ._joining import join
from ._options import SweeperOptions
from ._pruners import make_pruner
from ._samplers import grid_size, make_sampler, takes_turns
from ._search_space import SearchSpace, difference

MAX_DRAWS = 1000
"""Maximum number of random points that are tried against the filter, at about 1 ms each."""


@dataclass(frozen=True)
class StudyPlan:
    """Everything needed to open the study."""

    config: DictConfig
    """The sweep's own config."""
    raw: dict[str, Any]
    """`hydra.sweeper`, unchecked."""
    options: SweeperOptions
    space: SearchSpace
    sweep: TrialOwner

    def open(self) -> tuple[StudySession, list[str]]:
        """Open the study; return the session and lines for the user.

        Raises GpuLauncherError if the sweep cannot begin.
        """
        storage = StudyStorage(optuna.storages.get_storage(self._storage()), self.sweep)
        bounds = self.options.bounds
        pruner = make_pruner(self.raw.get("pruner"))
        study = optuna.create_study(
            study_name=self.name,
            storage=storage,
            pruner=pruner,
            directions=[StudyDirection[direction.upper()] for direction in self.options.directions],
            load_if_exists=True,
        )
        had = [direction.name.lower() for direction in study.directions]
        if had != list(self.options.directions):
            raise StudyError(
                f"study {self.name!r} has the direction {', '.join(had)}, and hydra.sweeper.direction is "
                f"{', '.join(self.options.directions)}: use the same, or another hydra.sweeper.study_name"
            )
        custom = self._custom is not None
        sweeps_before = join(
            study,
            storage,
            self.space.distributions,
            lambda others: difference(self.space, others, custom=custom),
            custom=custom,
        )
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
        more = None if bounds.n_trials is None else len(trials) + bounds.n_trials
        study.sampler, why = make_sampler(
            self.raw.get("sampler"),
            choice=self.config.hydra.runtime.choices.get("hydra/sweeper/sampler"),
            space=self.space,
            directions=self.options.directions,
            n_trials=bounds.total_trials or more,
            seed=self.options.seed,
            sweeps_before=sweeps_before,
            overrides=list(self.config.hydra.overrides.hydra),
        )
        # The import takes seconds, and the GP sampler would do it when it first fits.
        warm_up = partial(import_module, "torch") if isinstance(study.sampler, GPSampler) else lambda: None
        session = StudySession(
            study,
            storage,
            self._define,
            bounds,
            max_retries=self.options.retry_stale,
            combinations=self._combinations(study.sampler),
            in_turn=takes_turns(study.sampler),
            warm_up=warm_up,
            draw=self._draw,
        )
        remarks = [f"study {self.name!r} in {self.where}, with {len(trials)} trials" if trials else self._opened, why]
        if not self.space.distributions and self._custom is None:
            remarks.append(
                "there is nothing to search, and all trials are the same: name a parameter, as in lr=interval(0.0,1.0)"
            )
        remarks += session.fail_stale_trials()
        session.enqueue([self._point(point) for point in self.options.enqueue])
        return session, remarks

    @property
    def name(self) -> str:
        """The study's name: `study_name`, or by default one made from the job's name.

        Without a named storage, a sweep's directory has one study, named after the job. In a named storage, which other
        sweeps may use, each sweep has its own study, whose name also contains the sweep's directory.
        """
        if name := self.raw.get("study_name"):
            return str(name)
        job = str(self.config.hydra.job.name or "study")
        if self.raw.get("storage") is None:
            return job
        return "-".join([job, *Path(str(self.config.hydra.sweep.dir)).absolute().parts[-2:]])

    @property
    def where(self) -> str:
        """The storage as users see it, without passwords."""
        given = plain(self.raw.get("storage"))
        if given is None:
            return f"sqlite:///{self._file}"
        return without_password(given) if isinstance(given, str) else "the given storage"

    @property
    def _file(self) -> Path:
        return Path(str(self.config.hydra.sweep.dir)).absolute() / STUDY_FILE

    @property
    def _opened(self) -> str:
        return f"study {self.name!r} in {self.where}"

    def _storage(self) -> BaseStorage:
        given = plain(self.raw.get("storage"))
        if given is None:
            return open_storage(f"sqlite:///{self._file}")
        if isinstance(given, dict):
            given = instantiate(given, "hydra.sweeper.storage")
        return open_storage(given)

    @property
    def _custom(self) -> Callable[[DictConfig, optuna.Trial], None] | None:
        target = self.raw.get("custom_search_space")
        if target is None:
            return None
        try:
            custom: Callable[[DictConfig, optuna.Trial], None] = get_method(str(target))
        except Exception as error:  # importing the user's module may raise anything
            raise OptionError("hydra.sweeper.custom_search_space", f"{target} cannot be imported: {error}") from error
        return custom

    def _combinations(self, sampler: BaseSampler) -> int | None:
        """The number of combinations, if the sampler tries each once; None if it is unknown."""
        if self._custom is not None or not isinstance(sampler, BruteForceSampler):
            return None
        return grid_size(self.space)

    def _point(self, point: Mapping[str, Any]) -> dict[str, Any]:
        encoded = self.space.encode(point)
        unknown = [name for name in encoded if name not in self.space.distributions]
        if unknown and self._custom is None:
            known = ", ".join(self.space.distributions) or "none"
            raise OptionError(
                "hydra.sweeper.enqueue", f"{unknown[0]} is not a parameter of this search: it has {known}"
            )
        return encoded

    def _define(self, trial: optuna.Trial) -> list[str]:
        for name, distribution in self.space.distributions.items():
            trial._suggest(name, distribution)
        if (custom := self._custom) is not None:
            custom(self.config, trial)
        overrides = self.space.overrides(trial.params)
        if (chosen := self.options.filter) is not None and not chosen.keeps(self.space.job_values(trial.params)):
            raise LeftOutError(f"it does not satisfy {OPTION}={chosen.text}")
        return overrides

    def _draw(self) -> dict[str, Any] | None:
        """Draw random parameters that satisfy the filter; None if none of `MAX_DRAWS` does."""
        chosen = self.options.filter
        if chosen is None or self._custom is not None:
            return None
        study = optuna.create_study(sampler=RandomSampler())  # in memory, and for this only
        for _ in range(MAX_DRAWS):
            point = study.ask(dict(self.space.distributions)).params
            if chosen.keeps(self.space.job_values(point)):
                return point
        return None
