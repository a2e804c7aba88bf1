"""Lets a sweep join a study. It must search the study's space, and must not repeat the points of earlier sweeps.

The study itself records the search space, the number of its sweeps so far, and the sweeps that may still be running.
Its trials are not enough: a trial shows its search space only once it is sampled, and two sweeps that start together
have no trial yet.
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
    """The record that a study keeps of its search."""

    space: dict[str, BaseDistribution] = field(default_factory=dict)
    custom: bool = True
    """Whether a function may add parameters to trials."""
    sweeps: int = 0
    """Number of sweeps that have begun."""
    at_work: list[Any] = field(default_factory=list)
    """The sweeps that may still be running, as `TrialOwner.to_json` writes them."""


def join(
    study: optuna.Study, storage: StudyStorage, space: Space, difference: Callable[[Space], str | None], *, custom: bool
) -> int:
    """Record this sweep in the study; return the number of earlier sweeps, which is 0 for a new study.

    `storage` is the study's. With `custom`, a function adds parameters to the space. `difference` says how the sweep's
    search space differs from another. Raises StudyError if the study has a different search space.
    """
    sweep = storage.sweep
    with storage.locked():
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
        kept = _read(storage.get_study_user_attrs(study._study_id).get(SEARCH))
        at_work = [one for one in kept.at_work if sweep.may_be_running(one)]
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
    """The seed for a sweep of a study: `seed` itself for the first, and a different number derived from it later."""
    if seed is None or not sweeps_before:
        return seed
    digest = hashlib.sha256(f"{seed}:{sweeps_before}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial binds its study to a search space. Failed trials do not: the space may be the reason."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) or (
        trial.state is TrialState.WAITING and RETRY_OF in trial.user_attrs
    )


def _searched(trials: list[FrozenTrial], kept: _Search, space: Space) -> Space:
    """The space that a study searches; empty if it is still open.

    It is the space of the latest finished trial. Without one, it is the recorded space with the parameters of running
    trials. These may be sampled only in part, so the rest is assumed to be the space of this sweep.
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
    """Read the study's record. It may be malformed, because other programs can write it, too."""
    try:
        space = {str(name): json_to_distribution(text) for name, text in written["space"].items()}
        return _Search(space, bool(written["custom"]), int(written["sweeps"]), list(written["at_work"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return _Search()
