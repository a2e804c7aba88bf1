"""Decides which running trials to prune, for all of them from one view of the study."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import optuna
from optuna.trial import FrozenTrial

from gpu_launcher.studies.study_storage import StudyStorage

VIEW_SECONDS = 1.0
"""How long a view of the study is used. For so long pruners may miss trials of other sweeps."""


class Judge:
    """Judges the trials of one session.

    A pruner reads all the study's trials for each trial that it judges, of which those that run come from the database
    each time: with 64 of them, tens of milliseconds. Here they are read once for all that ask, and kept for a while,
    with what has been reported since.
    """

    def __init__(self, study: optuna.Study, storage: StudyStorage, clock: Callable[[], float]) -> None:
        """`storage` is the study's own, or has that for its backend. `clock` is in seconds."""
        self._study = study
        self._storage = storage
        self._clock = clock
        self._found: dict[int, FrozenTrial] = {}
        """The view: trials by id, in the order of their numbers."""
        self._found_at: float | None = None

    def forget(self) -> None:
        """Read the study again at the next question, because a trial was told."""
        self._found_at = None

    def judge(
        self, trials: Mapping[int, int], reports: Mapping[int, Mapping[int, float]]
    ) -> dict[int, bool | Exception]:
        """For the trials `{number: id}`, which run: whether the study's pruner would prune each, or what it raises.

        `reports` are what they have reported, `{id: {step: value}}`, which has been stored. Raises what the storage
        raises.
        """
        now = self._clock()
        if (
            self._found_at is None
            or now - self._found_at > VIEW_SECONDS
            or not self._found.keys() >= {*trials.values(), *reports}
        ):
            every = self._storage.get_all_trials(self._study._study_id, deepcopy=False)
            self._found = {trial._trial_id: trial for trial in every}
            self._found_at = now
        else:
            for id, steps in reports.items():
                self._found[id] = changed = copy.copy(self._found[id])
                changed.intermediate_values = {**changed.intermediate_values, **steps}
        with self._storage.used_by(self._study), self._storage.showing(self._found):
            known = {number: id for number, id in trials.items() if id in self._found}
            return {number: self._one(self._found[id]) for number, id in known.items()}

    def _one(self, trial: FrozenTrial) -> bool | Exception:
        try:
            return bool(self._study.pruner.prune(self._study, trial))
        except Exception as error:  # whatever the user's pruner raises
            return error
