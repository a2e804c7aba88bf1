"""The storage of a study as one sweep uses it.

It delegates to the user's storage, as Optuna's own `_CachedStorage` does, and adds what a sweep needs:

- ownership: every trial that is created or taken through it records which sweep runs it;
- retries while the database is unavailable, if the sweep wants them;
- a context for each operation (`uninterrupted`), with which a sweep keeps operations from being cut off halfway;
- a view: pruners see trials that were read once for all of them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.studies import storage as databases
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.storage_retry import StorageRetry
from gpu_launcher.studies.trial_attrs import CLAIM, OWNER

P = ParamSpec("P")
T = TypeVar("T")

_swapping = threading.RLock()
"""Held while a study's storage is replaced, because several threads may optimize one study."""


class StudyStorage(BaseStorage):
    """Wraps the storage of a study for one sweep; see the module."""

    def __init__(self, backend: BaseStorage, sweep: TrialOwner) -> None:
        self.backend = backend
        self.sweep = sweep
        self.retry: StorageRetry | None = None
        self.uninterrupted: Callable[[], AbstractContextManager[None]] = nullcontext
        """Returns the context in which each operation runs."""
        self._view: dict[int, FrozenTrial] | None = None
        """Trials by id, in the order of their numbers."""

    @contextmanager
    def showing(self, trials: dict[int, FrozenTrial]) -> Iterator[None]:
        """Context in which `get_all_trials` returns these, `{id: trial}`, with the attributes that pruners set.

        The storage does this because all pruners read through it: Study.get_trials has no cache, and Hyperband creates
        studies of its own. The attributes matter because successive halving records each trial's rungs and compares
        them with those of other trials.
        """
        self._view = trials
        try:
            yield
        finally:
            self._view = None

    @contextmanager
    def used_by(self, study: optuna.Study) -> Iterator[None]:
        """Context in which a study uses this storage instead of its backend."""
        if study._storage is self:
            yield
            return
        with _swapping:
            before, study._storage = study._storage, self
            try:
                yield
            finally:
                study._storage = before

    def locked(self) -> AbstractContextManager[None]:
        """See `storage.locked`."""
        return databases.locked(self.backend)

    def store_reports(self, reports: Mapping[int, Mapping[int, float]]) -> set[int]:
        """See `storage.store_reports`."""
        return self._do(databases.store_reports, self.backend, reports)

    def _do(self, operation: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        def done() -> T:
            with self.uninterrupted():
                return operation(*arguments, **options)

        return done() if self.retry is None else self.retry.retrying(done)()

    # Methods that add to the backend.

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial that has its owner from the moment it exists."""
        if template_trial is None:
            template_trial = optuna.trial.create_trial(
                state=TrialState.RUNNING, user_attrs={OWNER: self.sweep.to_json()}
            )
        return self._do(self.backend.create_new_trial, study_id, template_trial)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set a trial's state. To take a queued trial, first claim it, and record the owner if the trial was taken."""
        if state is not TrialState.RUNNING:
            return self._do(self.backend.set_trial_state_values, trial_id, state, values)
        owner = self.sweep.to_json()
        with self.uninterrupted():
            try:
                self.set_trial_user_attr(trial_id, f"{CLAIM}{self.sweep.id}", owner)
            except UpdateFinishedTrialError:
                return False  # another sweep took it, and it has already ended
            taken = self._do(self.backend.set_trial_state_values, trial_id, state, values)
            if taken:
                self.set_trial_user_attr(trial_id, OWNER, owner)
            return taken

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials of the view, if there is one; otherwise those of the backend."""
        if self._view is None:
            return self._do(self.backend.get_all_trials, study_id, deepcopy=deepcopy, states=states)
        shown = [trial for trial in self._view.values() if states is None or trial.state in states]
        return copy.deepcopy(shown) if deepcopy else shown

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set the attribute, also in the view if there is one."""
        self._do(self.backend.set_trial_system_attr, trial_id, key, value)
        if self._view is not None and trial_id in self._view:
            self._view[trial_id] = changed = copy.copy(self._view[trial_id])
            changed.system_attrs = {**changed.system_attrs, key: value}

    # Methods that only delegate to the backend.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """See `BaseStorage`."""
        return self._do(self.backend.create_new_study, directions, study_name)

    def delete_study(self, study_id: int) -> None:
        """See `BaseStorage`."""
        self._do(self.backend.delete_study, study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """See `BaseStorage`."""
        self._do(self.backend.set_study_user_attr, study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """See `BaseStorage`."""
        self._do(self.backend.set_study_system_attr, study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        """See `BaseStorage`."""
        return self._do(self.backend.get_study_id_from_name, study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """See `BaseStorage`."""
        return self._do(self.backend.get_study_name_from_id, study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See `BaseStorage`."""
        return self._do(self.backend.get_study_directions, study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        return self._do(self.backend.get_study_user_attrs, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        return self._do(self.backend.get_study_system_attrs, study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """See `BaseStorage`."""
        return self._do(self.backend.get_all_studies)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """See `BaseStorage`."""
        self._do(self.backend.set_trial_param, trial_id, param_name, param_value_internal, distribution)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """See `BaseStorage`."""
        return self._do(self.backend.get_trial_id_from_study_id_trial_number, study_id, trial_number)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """See `BaseStorage`."""
        self._do(self.backend.set_trial_intermediate_value, trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See `BaseStorage`."""
        self._do(self.backend.set_trial_user_attr, trial_id, key, value)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See `BaseStorage`."""
        return self._do(self.backend.get_trial, trial_id)

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """See `BaseStorage`."""
        return self._do(self.backend.get_best_trial, study_id)

    def remove_session(self) -> None:
        """See `BaseStorage`."""
        self._do(self.backend.remove_session)
