"""A sweep becomes one of a study's: it must search the study's space, and must not repeat an earlier sweep's points.

The study itself keeps what its sweeps search, how many there have been, and which may be at work. A trial shows what it
searches only once it has been sampled, and two sweeps that start together have no trial yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.errors import StudyError
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.trial_attrs import RETRY_OF, SEARCH

Space = Mapping[str, BaseDistribution]


@dataclass
class _Search:
    """What a study keeps."""

    space: dict[str, BaseDistribution] = field(default_factory=dict)
    custom: bool = True
    """Whether trials may have more parameters, which only a function knows."""
    sweeps: int = 0
    """How many have begun."""
    at_work: list[Any] = field(default_factory=list)
    """Those that may be at work, as `Sweep.to_json` has them."""


def join(
    study: optuna.Study, storage: StudyStorage, space: Space, difference: Callable[[Space], str | None], *, custom: bool
) -> int:
    """Return how many sweeps the study has had before this one: 0 for a new study.

    `storage` is the study's. With `custom` a function adds to the space. `difference` says how the sweep's search space
    differs from another. Raises StudyError if the study has another one.
    """
    sweep = storage.sweep
    with storage.alone():
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
        kept = _read(storage.get_study_user_attrs(study._study_id).get(SEARCH))
        at_work = [one for one in kept.at_work if sweep.may_be_at_work(one)]
        if not at_work and not any(map(_counts, trials)):
            kept = _Search(sweeps=kept.sweeps)
        known = _searched(trials, kept, space)
        if known and (differs := difference(known)):
            raise StudyError(
                f"study {study.study_name!r} has another search space ({differs}): use the same, or another "
                "hydra.sweeper.study_name"
            )
        before = max(kept.sweeps, 1 if trials else 0) if trials or at_work else 0
        written = {
            "space": {name: distribution_to_json(distribution) for name, distribution in space.items()},
            "custom": custom,
            "sweeps": before + 1,
            "at_work": [*at_work, sweep.to_json()],
        }
        storage.set_study_user_attr(study._study_id, SEARCH, written)
    return before


def derived_seed(seed: int | None, sweeps_before: int) -> int | None:
    """The seed as given for the first sweep of a study; for each later one another number made from it."""
    if seed is None or not sweeps_before:
        return seed
    digest = hashlib.sha256(f"{seed}:{sweeps_before}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial binds its study to a search space. Failed ones do not: the space may have been the reason."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) or (
        trial.state is TrialState.WAITING and RETRY_OF in trial.user_attrs
    )


def _searched(trials: list[FrozenTrial], kept: _Search, space: Space) -> Space:
    """What a study searches, empty if that is open: by its latest finished trial, or what it keeps and trials that run.

    Trials that run may have been sampled in part. What may come is taken to be what this sweep searches.
    """
    for trial in reversed(trials):
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            return trial.distributions
    if not kept.custom:
        return kept.space
    found = dict(kept.space)
    for trial in trials:
        if trial.state is TrialState.RUNNING:
            found |= trial.distributions
    return {**space, **found} if found else {}


def _read(written: Any) -> _Search:
    """What others can write, too, is not trusted to have a form."""
    try:
        space = {str(name): json_to_distribution(text) for name, text in written["space"].items()}
        return _Search(space, bool(written["custom"]), int(written["sweeps"]), list(written["at_work"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return _Search()
