"""Decides when a sweep stops asking for trials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.studies.trial_attrs import LEFT_OUT

FINISHED_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
MIN_ENDED = 10
"""Trials that must have ended before `max_failure_rate` applies, unless it is 0."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits at which a sweep stops asking for trials. None means no limit."""

    n_trials: int | None = None
    """Trials that this sweep asks for."""
    total_trials: int | None = None
    """The study's completed, pruned and running trials, plus this sweep's failed ones; not those that are left out."""
    timeout: float | None = None
    """Seconds since the session was opened."""
    patience: int | None = None
    """Trials in a row that completed without improving the best value."""
    max_failure_rate: float | None = None
    """Share of this sweep's ended trials that may have failed, once `MIN_ENDED` have ended."""


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """The sweep asks for no more trials."""

    reason: str | None
    """A line for the user; None if the end was expected."""
    failed: bool = False
    """Whether the sweep ends as a failure."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of what a sweep has done so far."""

    asked: int
    ended: int
    failed: int
    """Ended trials that failed."""
    seconds: float
    """Seconds since the sweep began."""
    all_tried: bool
    """Whether the sampler has said that there are no more combinations."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The stopping rules of one sweep on one study."""

    study: optuna.Study
    bounds: Bounds
    combinations: int | None
    """The number of all combinations, for a sampler that tries each once; otherwise None."""

    def expected(self, failed: int) -> int | None:
        """The number of trials that the sweep will run, as far as known; None if it is unknown."""
        counts = []
        if self.bounds.n_trials is not None:
            counts.append(self.bounds.n_trials)
        if self.bounds.total_trials is not None:
            counts.append(max(0, self.bounds.total_trials - self._total(failed)))
        if self.combinations is not None:
            counts.append(self._left(self.combinations))
        return min(counts, default=None)

    def over(self, tally: Tally) -> SearchEnded | None:
        """Why no more trials are asked for; None if more may be."""
        bounds, failed, ended = self.bounds, tally.failed, tally.ended
        if bounds.n_trials is not None and tally.asked >= bounds.n_trials:
            return SearchEnded(None)
        if bounds.timeout is not None and tally.seconds >= bounds.timeout:
            return SearchEnded("no more trials are asked for: the timeout has passed")
        if tally.all_tried and not self._trials(TrialState.WAITING):
            return SearchEnded("no more trials are asked for: every combination has been tried")
        if self.combinations is not None and not self._left(self.combinations):
            return SearchEnded(None)
        if bounds.total_trials is not None and self._total(failed) >= bounds.total_trials:
            return SearchEnded(None)
        if bounds.max_failure_rate is not None and failed:
            few = ended < MIN_ENDED and bounds.max_failure_rate > 0
            if not few and failed / ended > bounds.max_failure_rate:
                reason = f"no more trials are asked for: {failed} of {ended} trials failed"
                return SearchEnded(
                    f"{reason}, more than max_failure_rate={bounds.max_failure_rate} allows", failed=True
                )
        if bounds.patience is not None and (since := self._since_best()) >= bounds.patience:
            return SearchEnded(
                f"no more trials are asked for: {since} trials in a row completed without improving on the best"
            )
        return None

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study._storage.get_all_trials(self.study._study_id, deepcopy=False, states=states)

    def _total(self, failed: int) -> int:
        trials = self._trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return sum(LEFT_OUT not in trial.user_attrs for trial in trials) + failed

    def _left(self, combinations: int) -> int:
        """The number of combinations that are neither tried nor being tried, plus queued trials."""
        queued = self._trials(TrialState.WAITING)
        tried = {repr(sorted(trial.params.items())) for trial in self._trials(*FINISHED_STATES, TrialState.RUNNING)}
        return max(0, combinations - len(tried)) + len(queued)

    def _since_best(self) -> int:
        """The number of trials that completed after the best one."""
        done = sorted(self._trials(TrialState.COMPLETE), key=lambda trial: (trial.datetime_complete, trial.number))
        sign = 1.0 if self.study.direction is StudyDirection.MINIMIZE else -1.0
        best, since = math.inf, 0
        for trial in done:
            value = sign * trial.values[0]
            since = 0 if value < best else since + 1
            best = min(best, value)
        return since
