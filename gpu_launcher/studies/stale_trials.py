"""Fail trials that did not come to their end, and queue again what they tried.

The copy is queued before the trial fails. A program that is killed in between leaves a trial that the next sweep fails,
and for which it finds the copy. The other way round there would be none.
"""

from __future__ import annotations

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from gpu_launcher.studies.ownership import Sweep
from gpu_launcher.studies.trial_attrs import FAILURE, JOB, LOST, OURS, RETRY_OF
from gpu_launcher.wording import count

NEVER = -1
"""Value of `max_retries` with which no trial is queued again, not even one that never ran."""


def fail_stale_trials(study: optuna.Study, sweep: Sweep, max_retries: int, who: str = "sweep") -> list[str]:
    """Fail the trials that dead sweeps left running, and queue each again, at most `max_retries` times.

    Returns what was done, as lines for the user, to whom a sweep is `who`. Trials whose owner lives, may live, or is
    unknown are left alone.
    """
    died = f"its {who} ended without telling"
    storage = study._storage
    trials = storage.get_all_trials(study._study_id, deepcopy=False)
    have_copies = {trial.user_attrs[RETRY_OF][-1] for trial in trials if RETRY_OF in trial.user_attrs}
    failed, queued = 0, 0
    for trial in trials:
        if trial.state is not TrialState.RUNNING or not sweep.outlives(trial):
            continue
        lost = losses(trial)
        again = lost <= max_retries
        copied = again and trial.number not in have_copies
        if queue_again(study, trial, lost, died) if copied else fail(storage, trial._trial_id, died):
            failed += 1
            queued += again
    if not failed:
        return []
    again_said = f", and {queued} of them queued again" if queued else ""
    return [f"marked {count(failed, 'trial')} as failed that a dead {who} had left running{again_said}"]


def losses(trial: FrozenTrial) -> int:
    """Count how often what the trial tries has been lost, including now."""
    # One that never ran has not been the reason.
    return int(trial.user_attrs.get(LOST, 0)) + (JOB in trial.user_attrs)


def queue_again(study: optuna.Study, trial: FrozenTrial, lost: int, message: str | None) -> bool:
    """Fail a trial and queue what it tried. False if it had ended before, and nothing was queued."""
    storage = study._storage
    if storage.get_trial(trial._trial_id).state.is_finished():
        return False  # without leaving a copy that failed, which only one that ends in this moment does
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    kept = {name: value for name, value in trial.user_attrs.items() if not name.startswith(OURS)}
    before = [*trial.user_attrs.get(RETRY_OF, []), trial.number]
    copy = create_trial(
        state=TrialState.WAITING,
        system_attrs={"fixed_params": params},  # as Study.enqueue_trial has it
        user_attrs={**kept, RETRY_OF: before, LOST: lost},
    )
    copied = storage.create_new_trial(study._study_id, copy)
    if fail(storage, trial._trial_id, message):
        return True
    fail(storage, copied, f"trial {trial.number}, which it was to repeat, has ended after all")
    return False


def fail(storage: BaseStorage, id: int, message: str | None) -> bool:
    """Fail a trial. False if it had ended before."""
    try:
        if message is not None:
            storage.set_trial_user_attr(id, FAILURE, message)
        storage.set_trial_state_values(id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True
