"""Whose a running trial is: the sweep that launched its job, named so that others can say later whether it lives.

A new trial has its owner from the moment it exists. One that was queued is taken by whoever makes it run first, and has
its owner a moment later; until then those that tried to take it are known, each under a name of its own, so that who
loses the race, or dies in it, does not write over the winner's.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies.attributes import CLAIM, OWNER

_working: set[str] = set()
"""Ids of this process's sweeps that work now, where there may be several: in threads of it."""
changing = threading.Lock()
"""To be held while the methods of a storage object are others for a while, which several threads may want."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep of one program."""

    identity: ProcessIdentity
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return {**self.identity.to_json(), "sweep": self.id}

    def owns(self, trial: FrozenTrial) -> bool:
        """Whether it launched the trial."""
        return trial.user_attrs.get(OWNER) == self.to_json()

    def outlives(self, trial: FrozenTrial) -> bool:
        """Whether a trial that runs is of a dead sweep. Unknown means alive, as for a program that is not ours."""
        if OWNER in trial.user_attrs:
            return self._dead(trial.user_attrs[OWNER])
        claims = [value for name, value in trial.user_attrs.items() if name.startswith(CLAIM)]
        return bool(claims) and all(map(self._dead, claims))

    def may_be_at_work(self, written: Any) -> bool:
        """Whether another sweep, as `to_json` wrote it, may still run. Unknown means that it does."""
        return not self._dead(written)

    def _dead(self, written: Any) -> bool:
        try:
            identity, sweep = ProcessIdentity.from_json(written), written["sweep"]
        except (KeyError, TypeError, ValueError):
            return False
        if identity == self.identity:
            return bool(sweep != self.id) and sweep not in _working  # an earlier one of this program
        return identity.lives() is False


def own(storage: BaseStorage, sweep: Sweep) -> BaseStorage:
    """Have every trial that is asked for through `storage` say whose it is. Returns the same object."""
    create, change = storage.create_new_trial, storage.set_trial_state_values
    owner = sweep.to_json()

    def create_new_trial(study_id: int, template_trial: FrozenTrial | None = None) -> int:
        if template_trial is None:
            template_trial = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={OWNER: owner})
        return create(study_id, template_trial)

    def set_trial_state_values(trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state is not TrialState.RUNNING:
            return change(trial_id, state, values)
        try:
            storage.set_trial_user_attr(trial_id, f"{CLAIM}{sweep.id}", owner)
        except UpdateFinishedTrialError:
            return False  # somebody took it, and it is over
        taken = change(trial_id, state, values)
        if taken:
            storage.set_trial_user_attr(trial_id, OWNER, owner)
        return taken

    storage.create_new_trial = create_new_trial  # type: ignore[method-assign]
    storage.set_trial_state_values = set_trial_state_values  # type: ignore[method-assign]
    return storage


@contextmanager
def working(sweep: Sweep) -> Iterator[None]:
    """While entered, other sweeps of this process know that this one works."""
    _working.add(sweep.id)
    try:
        yield
    finally:
        _working.discard(sweep.id)


@contextmanager
def owning(storage: BaseStorage, sweep: Sweep) -> Iterator[None]:
    """While entered, `storage` is as `own` makes it, and nobody else is `changing` one."""
    with changing:
        before = dict(vars(storage))
        own(storage, sweep)
        try:
            yield
        finally:
            for name in ("create_new_trial", "set_trial_state_values"):
                if name in before:
                    setattr(storage, name, before[name])
                else:
                    delattr(storage, name)
