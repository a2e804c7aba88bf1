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
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.studies import storage as databases
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.storage_retry import StorageRetry
from gpu_launcher.studies.trial_attrs import CLAIM, OWNER

P = ParamSpec("P")
T = TypeVar("T")

_swapping = threading.RLock()
"""Held while a study's storage is replaced, because several threads may optimize one study."""


def _delegated(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Return a method of StudyStorage that calls the backend's method of the same name."""

    @wraps(method, updated=())  # not its attributes: one of them says that it is abstract
    def delegated(self: Any, /, *arguments: P.args, **options: P.kwargs) -> T:
        operation: Callable[P, T] = getattr(self.backend, method.__name__)
        return cast("T", self._do(operation, *arguments, **options))

    return delegated


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

    create_new_study = _delegated(BaseStorage.create_new_study)
    delete_study = _delegated(BaseStorage.delete_study)
    set_study_user_attr = _delegated(BaseStorage.set_study_user_attr)
    set_study_system_attr = _delegated(BaseStorage.set_study_system_attr)
    get_study_id_from_name = _delegated(BaseStorage.get_study_id_from_name)
    get_study_name_from_id = _delegated(BaseStorage.get_study_name_from_id)
    get_study_directions = _delegated(BaseStorage.get_study_directions)
    get_study_user_attrs = _delegated(BaseStorage.get_study_user_attrs)
    get_study_system_attrs = _delegated(BaseStorage.get_study_system_attrs)
    get_all_studies = _delegated(BaseStorage.get_all_studies)
    set_trial_param = _delegated(BaseStorage.set_trial_param)
    get_trial_id_from_study_id_trial_number = _delegated(BaseStorage.get_trial_id_from_study_id_trial_number)
    set_trial_intermediate_value = _delegated(BaseStorage.set_trial_intermediate_value)
    set_trial_user_attr = _delegated(BaseStorage.set_trial_user_attr)
    get_trial = _delegated(BaseStorage.get_trial)
    get_best_trial = _delegated(BaseStorage.get_best_trial)
    remove_session = _delegated(BaseStorage.remove_session)
