"""Which of the running trials are to be pruned, judged for all of them from one look at the study."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

KEPT = 1.0
"""Seconds for which a look at the study will do: so long a trial of another sweep may go unheeded."""


class Judge:
    """Judges the trials of one desk.

    A pruner reads all the study's trials for each trial that it judges, of which those that run come from the database
    each time: with 64 of them, tens of milliseconds. They are read once for all who ask, and kept for a while, with
    what has been reported since. Nobody else may use the study's storage object meanwhile.
    """

    def __init__(self, study: optuna.Study, clock: Callable[[], float]) -> None:
        """`clock` is in seconds."""
        self._study = study
        self._clock = clock
        self._found: dict[int, FrozenTrial] = {}
        """By id, in the order of their numbers."""
        self._found_at: float | None = None

    def forget(self) -> None:
        """A trial was told: look again."""
        self._found_at = None

    def verdicts(self, trials: Mapping[int, int], reports: Mapping[int, Mapping[int, float]]) -> dict[int, bool]:
        """The same as `judge` does, but raises what the pruner raises of any."""
        judged = self.judge(trials, reports)
        verdicts = {number: verdict for number, verdict in judged.items() if not isinstance(verdict, Exception)}
        for error in judged.values():
            if isinstance(error, Exception):
                raise error
        return verdicts

    def judge(
        self, trials: Mapping[int, int], reports: Mapping[int, Mapping[int, float]]
    ) -> dict[int, bool | Exception]:
        """For the trials `{number: id}`, which run: whether the study's pruner would prune each, or what it raises.

        `reports` are what they have reported, `{id: {step: value}}`, which has been stored. Raises what the storage
        raises.
        """
        now = self._clock()
        if self._found_at is None or now - self._found_at > KEPT or not self._found.keys() >= set(trials.values()):
            every = self._study._storage.get_all_trials(self._study._study_id, deepcopy=False)
            self._found = {trial._trial_id: trial for trial in every}
            self._found_at = now
        else:
            for id, steps in reports.items():
                self._replace(id, intermediate_values={**self._found[id].intermediate_values, **steps})
        with self._one_look():
            known = {number: id for number, id in trials.items() if id in self._found}
            return {number: self._one(self._found[id]) for number, id in known.items()}

    def _one(self, trial: FrozenTrial) -> bool | Exception:
        try:
            return bool(self._study.pruner.prune(self._study, trial))
        except Exception as error:  # whatever the user's pruner raises
            return error

    def _replace(self, id: int, **changes: Any) -> None:
        changed = copy.copy(self._found[id])
        for name, value in changes.items():
            setattr(changed, name, value)
        self._found[id] = changed

    @contextmanager
    def _one_look(self) -> Iterator[None]:
        """Have the storage answer with what was found, and with what pruners note about trials meanwhile.

        Done to the storage because all pruners read through it: Study.get_trials has no cache, and Hyperband makes
        studies of its own. Successive halving notes each trial's rungs, and compares with those that others have.
        """
        storage = self._study._storage
        before = dict(vars(storage))
        note = storage.set_trial_system_attr

        def get_all_trials(
            study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
        ) -> list[FrozenTrial]:
            shown = [trial for trial in self._found.values() if states is None or trial.state in states]
            return copy.deepcopy(shown) if deepcopy else shown

        def set_trial_system_attr(trial_id: int, key: str, value: Any) -> None:
            note(trial_id, key, value)
            if trial_id in self._found:
                self._replace(trial_id, system_attrs={**self._found[trial_id].system_attrs, key: value})

        storage.get_all_trials = get_all_trials  # type: ignore[method-assign]
        storage.set_trial_system_attr = set_trial_system_attr  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name in ("get_all_trials", "set_trial_system_attr"):
                if name in before:
                    setattr(storage, name, before[name])
                else:
                    delattr(storage, name)
