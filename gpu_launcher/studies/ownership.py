"""The owner of a running trial: the sweep that launched its job, recorded so that others can tell whether it is alive.

A new trial has its owner from the moment it exists. A queued trial belongs to the first sweep that sets it running; its
owner is recorded a moment later. Until then the trial has claims, one for each sweep that tried to take it. So a sweep
that loses the race, or dies in it, does not overwrite the winner's record.
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
"""Ids of the sweeps that are running in this process, each in its own thread."""


@dataclass(frozen=True, slots=True)
class TrialOwner:
    """A sweep of a program, as the owner of its trials."""

    identity: ProcessIdentity
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def to_json(self) -> dict[str, Any]:
        """The sweep in the form in which a trial stores its owner."""
        return {**self.identity.to_json(), "sweep": self.id}

    def owns(self, trial: FrozenTrial) -> bool:
        """Whether this sweep launched the trial."""
        return trial.user_attrs.get(OWNER) == self.to_json()

    def outlives(self, trial: FrozenTrial) -> bool:
        """Whether a running trial belongs to a dead sweep. Unknown, such as a program that is not ours, means alive."""
        if OWNER in trial.user_attrs:
            return self._dead(trial.user_attrs[OWNER])
        claims = [value for name, value in trial.user_attrs.items() if name.startswith(CLAIM)]
        return bool(claims) and all(map(self._dead, claims))

    def may_be_running(self, written: Any) -> bool:
        """Whether another sweep, as `to_json` wrote it, may still be running. Unknown means alive."""
        return not self._dead(written)

    def _dead(self, written: Any) -> bool:
        try:
            identity, sweep = ProcessIdentity.from_json(written), written["sweep"]
        except (KeyError, TypeError, ValueError):
            return False
        if identity == self.identity:
            return bool(sweep != self.id) and sweep not in _working  # an earlier sweep of this program
        return identity.is_alive() is False


@contextmanager
def working(sweep: TrialOwner) -> Iterator[None]:
    """Context in which other sweeps of this process see that this sweep is running."""
    _working.add(sweep.id)
    try:
        yield
    finally:
        _working.discard(sweep.id)
