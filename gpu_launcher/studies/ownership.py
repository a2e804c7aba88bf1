"""Whose a running trial is: the sweep that launched its job, named so that others can say later whether it lives.

A new trial has its owner from the moment it exists. One that was queued is taken by whoever makes it run first, and has
its owner a moment later; until then those that tried to take it are known, each under a name of its own, so that who
loses the race, or dies in it, does not write over the winner's.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial

from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies.trial_attrs import CLAIM, OWNER

_working: set[str] = set()
"""Ids of this process's sweeps that work now, where there may be several: in threads of it."""


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
        return identity.is_alive() is False


@contextmanager
def working(sweep: Sweep) -> Iterator[None]:
    """While entered, other sweeps of this process know that this one works."""
    _working.add(sweep.id)
    try:
        yield
    finally:
        _working.discard(sweep.id)
