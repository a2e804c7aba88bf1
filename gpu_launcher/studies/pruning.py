"""Which of the running trials are to be pruned, judged for all of them from one look at the study."""

from __future__ import annotations

from collections.abc import Mapping

import optuna


def verdicts(study: optuna.Study, trials: Mapping[int, int]) -> dict[int, bool]:
    """For the trials `{number: id}`, which run: whether the study's pruner would prune each.

    A pruner reads all the study's trials, and a database takes milliseconds for that; with hundreds of trials, tens.
    They are read once for all who ask, as Optuna itself does while it samples.
    """
    storage = study._storage
    found = storage.get_all_trials(study._study_id, deepcopy=False)
    study._thread_local.cached_all_trials = found
    try:
        by_id = {trial._trial_id: trial for trial in found}
        return {number: bool(study.pruner.prune(study, by_id[id])) for number, id in trials.items() if id in by_id}
    finally:
        study._thread_local.cached_all_trials = None
