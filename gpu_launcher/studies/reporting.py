"""The function that a training loop calls at each step. It imports Optuna only in a trial's job."""

from __future__ import annotations

import os

from gpu_launcher.processes import job_channel, rank_decisions

objective_in: int | None = None
"""The id of the process that runs an objective of `gpu_launcher.optimize`, or None."""


def in_trial() -> bool:
    """Whether this process belongs to the job of a trial."""
    return objective_in == os.getpid() or job_channel.current() is not None or rank_decisions.inherited()


def report(value: float, step: int) -> None:
    """Report an intermediate value to the study, and end this job if the study prunes it.

    If so, it raises optuna.TrialPruned. Do not catch that: the trial then counts as pruned, with its last value.
    Outside a sweep of `hydra/sweeper=optuna_async` and an objective of `gpu_launcher.optimize`, nothing happens. In the
    later ranks of a distributed job it raises when it raises in the first rank. See also `current_trial`.
    """
    if not in_trial():
        return
    from optuna import TrialPruned

    from gpu_launcher.studies.trial import current_trial

    trial = current_trial()
    trial.report(value, step)
    if trial.should_prune():
        raise TrialPruned(f"pruned at step {step}")
