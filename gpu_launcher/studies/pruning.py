"""Decides which running trials to prune, from one view of the study for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial

from gpu_launcher.studies.study_storage import StudyStorage

VIEW_SECONDS = 1.0
"""Seconds for which a view of the study is used. During that time pruners may miss trials of other sweeps."""


class Judge:
    """Judges the running trials of one session.

    A pruner reads all of the study's trials for each trial that it judges. Optuna reads running trials from the
    database each time, which takes tens of milliseconds for 64 of them. Here the trials are read once for all that ask.
    They are kept for a while, updated with the reports since then.
    """

    def __init__(self, study: optuna.Study, storage: StudyStorage, clock: Callable[[], float]) -> None:
        """`storage` is the study's own, or a wrapper of it. `clock` returns seconds."""
        self._study = study
        self._storage = storage
        self._clock = clock
        self._found: dict[int, FrozenTrial] = {}
        """The view: trials by id, in the order of their numbers."""
        self._found_at: float | None = None

    def forget(self) -> None:
        """Read the study again before the next judgment, because a trial was told."""
        self._found_at = None

    def judge(
        self, trials: Mapping[int, int], reports: Mapping[int, Mapping[int, float]]
    ) -> dict[int, bool | Exception]:
        """Whether the study's pruner would prune each of the running trials `{number: id}`, or what it raises.

        `reports` are the trials' reports, `{id: {step: value}}`, which are already stored. Raises what the storage
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
            return {number: self._should_prune(self._found[id]) for number, id in known.items()}

    def _should_prune(self, trial: FrozenTrial) -> bool | Exception:
        try:
            return bool(self._study.pruner.prune(self._study, trial))
        except UpdateFinishedTrialError:  # the pruner writes to trials, and this one was ended elsewhere
            return False
        except Exception as error:  # the user's pruner can raise anything
            return error
