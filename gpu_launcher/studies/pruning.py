"""Which of the running trials are to be pruned, judged for all of them from one look at the study."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

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
    """Have the storage answer with what the study's trials are now.

    Done to the storage because all pruners read through it: Study.get_trials has no cache, and Hyperband makes studies
    of its own.
    """
    found = storage.get_all_trials(study_id, deepcopy=False)

    def get_all_trials(
        study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        shown = [trial for trial in found if states is None or trial.state in states]
        return copy.deepcopy(shown) if deepcopy else shown

    storage.get_all_trials = get_all_trials  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del storage.get_all_trials
