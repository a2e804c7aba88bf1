"""Fails trials that a dead sweep left running, and queues their parameters again.

The copy is queued before the trial fails. If the program is killed in between, the next sweep fails the trial and finds
the copy. In the opposite order there would be no copy.
"""

from __future__ import annotations

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.trial_attrs import FAILURE, JOB, LOST, PREFIX, RETRY_OF
from gpu_launcher.wording import count

NEVER = -1
"""Value of `max_retries` with which no trial is queued again, not even one that never ran."""


def fail_stale_trials(study: optuna.Study, sweep: TrialOwner, max_retries: int, who: str = "sweep") -> list[str]:
    """Fail the trials that dead sweeps left running, and queue each again, at most `max_retries` times.

    Returns lines for the user that say what was done; they call a sweep `who`. Trials whose owner is alive, may be
    alive or is unknown are not changed.
    """
    died = f"its {who} ended before the trial did"
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
    return [f"marked {count(failed, 'trial')} of a dead {who} as failed{again_said}"]


def losses(trial: FrozenTrial) -> int:
    """The number of times that the trial's parameters have been lost, including now."""
    # A trial whose job never ran does not count: it cannot be the reason for the loss.
    return int(trial.user_attrs.get(LOST, 0)) + (JOB in trial.user_attrs)


def queue_again(study: optuna.Study, trial: FrozenTrial, lost: int, message: str | None) -> bool:
    """Fail a trial and queue its parameters again. Returns False, and queues nothing, if it had already ended."""
    storage = study._storage
    if storage.get_trial(trial._trial_id).state.is_finished():
        return False  # checked first, so that a failed copy is left only if the trial ends in this moment
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    kept = {name: value for name, value in trial.user_attrs.items() if not name.startswith(PREFIX)}
    before = [*trial.user_attrs.get(RETRY_OF, []), trial.number]
    copy = create_trial(
        state=TrialState.WAITING,
        system_attrs={"fixed_params": params},  # as Study.enqueue_trial has it
        user_attrs={**kept, RETRY_OF: before, LOST: lost},
    )
    copied = storage.create_new_trial(study._study_id, copy)
    if fail(storage, trial._trial_id, message):
        return True
    fail(storage, copied, f"trial {trial.number}, which it was to repeat, ended by itself")
    return False


def fail(storage: BaseStorage, id: int, message: str | None) -> bool:
    """Fail a trial. Returns False if it had already ended."""
    try:
        if message is not None:
            storage.set_trial_user_attr(id, FAILURE, message)
        storage.set_trial_state_values(id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True
