"""Rules for when a sweep asks for no more trials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
MIN_ENDED = 10
"""Trials that must have ended before a rate of failures means anything, unless it is 0."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits after which no more trials are asked for. None: no limit."""

    n_trials: int | None = None
    """Trials that this sweep asks for."""
    total_trials: int | None = None
    """Trials of the study that completed, were pruned, or run, and those of this sweep that failed."""
    timeout: float | None = None
    """Seconds from the opening of the session."""
    patience: int | None = None
    """Trials that completed without improving the best value."""
    max_failure_rate: float | None = None
    """Part of this sweep's trials that may fail, of `MIN_ENDED` or more."""


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """There are no more trials."""

    reason: str | None
    """A line for the user; None if the end was expected."""
    failed: bool = False
    """Whether the sweep is to end as a failure."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a sweep has done so far."""

    asked: int
    ended: int
    failed: int
    """Trials that failed, of those that ended."""
    seconds: float
    """Seconds since the sweep began."""
    all_tried: bool
    """The sampler has said that there are no more combinations."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The rules of one sweep on one study."""

    study: optuna.Study
    bounds: Bounds
    combinations: int | None
    """All combinations, for a sampler that tries each once; else None."""

    def expected(self, failed: int) -> int | None:
        """How many trials the sweep is going to run, as far as that is known before the first."""
        counts = []
        if self.bounds.n_trials is not None:
            counts.append(self.bounds.n_trials)
        if self.bounds.total_trials is not None:
            counts.append(max(0, self.bounds.total_trials - self._total(failed)))
        if self.combinations is not None:
            counts.append(self._left(self.combinations))
        return min(counts, default=None)

    def over(self, tally: Tally) -> SearchEnded | None:
        """Whether no more trials are to be asked for, and why."""
        bounds, failed, ended = self.bounds, tally.failed, tally.ended
        if bounds.n_trials is not None and tally.asked >= bounds.n_trials:
            return SearchEnded(None)
        if bounds.timeout is not None and tally.seconds >= bounds.timeout:
            return SearchEnded("no more trials are asked for: the timeout is over")
        if tally.all_tried and not self._trials(TrialState.WAITING):
            return SearchEnded("no more trials are asked for: every combination has been tried")
        if self.combinations is not None and not self._left(self.combinations):
            return SearchEnded(None)
        if bounds.total_trials is not None and self._total(failed) >= bounds.total_trials:
            return SearchEnded(None)
        if bounds.max_failure_rate is not None and failed:
            few = ended < MIN_ENDED and bounds.max_failure_rate > 0
            if not few and failed / ended > bounds.max_failure_rate:
                reason = f"no more trials are asked for: {failed} of {ended} failed"
                return SearchEnded(f"{reason}, more than max_failure_rate={bounds.max_failure_rate} lets", failed=True)
        if bounds.patience is not None and (since := self._since_best()) >= bounds.patience:
            return SearchEnded(f"no more trials are asked for: {since} completed without improving on the best")
        return None

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study._storage.get_all_trials(self.study._study_id, deepcopy=False, states=states)

    def _total(self, failed: int) -> int:
        return len(self._trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)) + failed

    def _left(self, combinations: int) -> int:
        """Combinations that have not been tried and are not being tried, and what is queued."""
        queued = self._trials(TrialState.WAITING)
        tried = {repr(sorted(trial.params.items())) for trial in self._trials(*ENDED, TrialState.RUNNING)}
        return max(0, combinations - len(tried)) + len(queued)

    def _since_best(self) -> int:
        """Trials that completed after the best one did."""
        done = sorted(self._trials(TrialState.COMPLETE), key=lambda trial: (trial.datetime_complete, trial.number))
        sign = 1.0 if self.study.direction is StudyDirection.MINIMIZE else -1.0
        best, since = math.inf, 0
        for trial in done:
            value = sign * trial.values[0]
            since = 0 if value < best else since + 1
            best = min(best, value)
        return since
