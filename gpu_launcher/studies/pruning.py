"""Which of the running trials are to be pruned, judged for all of them from one look at the study."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState


def verdicts(study: optuna.Study, trials: Mapping[int, int]) -> dict[int, bool]:
    """For the trials `{number: id}`, which run: whether the study's pruner would prune each.

    A pruner reads all the study's trials for each trial that it judges, of which those that run come from the database
    each time: with 64 of them, tens of milliseconds. They are read once for all who ask. Nobody else may use the
    study's storage object meanwhile.
    """
    with _one_look(study._storage, study._study_id) as found:
        by_id = {trial._trial_id: trial for trial in found}
        return {number: bool(study.pruner.prune(study, by_id[id])) for number, id in trials.items() if id in by_id}


@contextmanager
def _one_look(storage: BaseStorage, study_id: int) -> Iterator[list[FrozenTrial]]:
    """Have the storage answer with what the study's trials are now, and what pruners note about them meanwhile.

    Done to the storage because all pruners read through it: Study.get_trials has no cache, and Hyperband makes studies
    of its own. Successive halving notes each trial's rungs, and compares with those that others have.
    """
    found = list(storage.get_all_trials(study_id, deepcopy=False))
    note = storage.set_trial_system_attr

    def get_all_trials(
        study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        shown = [trial for trial in found if states is None or trial.state in states]
        return copy.deepcopy(shown) if deepcopy else shown

    def set_trial_system_attr(trial_id: int, key: str, value: Any) -> None:
        note(trial_id, key, value)
        for place, trial in enumerate(found):
            if trial._trial_id == trial_id:
                found[place] = copy.copy(trial)
                found[place].system_attrs = {**trial.system_attrs, key: value}

    storage.get_all_trials = get_all_trials  # type: ignore[method-assign]
    storage.set_trial_system_attr = set_trial_system_attr  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del storage.get_all_trials, storage.set_trial_system_attr
