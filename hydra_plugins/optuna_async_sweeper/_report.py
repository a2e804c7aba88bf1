"""What a sweep says and leaves in the end: best trials, importances, plots. Called where the study is."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.studies.desk import Best, Desk, Summary

if TYPE_CHECKING:
    from optuna.importance import BaseImportanceEvaluator

    from ._study import StudyPlan

MOST_SHOWN = 10
"""Trials of a Pareto front, and parameters, that are listed."""
ENOUGH = 4
"""Trials that must have completed before importances mean anything."""


def finish(desk: Desk, summary: Summary, plan: StudyPlan, directory: Path) -> list[str]:
    """Lines for the user. Plots are written to `directory`, if they are wanted."""
    lines = [_best(best, plan) for best in summary.best[:MOST_SHOWN]]
    if len(summary.best) > MOST_SHOWN:
        lines.append(f"... and {len(summary.best) - MOST_SHOWN} more trials on the Pareto front")
    lines += _importances(desk.study)
    if plan.options.plots:
        from ._plots import write_plots

        lines += write_plots(desk.study, directory)
    return lines


def _best(best: Best, plan: StudyPlan) -> str:
    values = ", ".join(f"{value:.6g}" for value in best.values)
    params = " ".join(f"{name}={value}" for name, value in plan.space.values(best.params).items())
    several = len(plan.options.directions) > 1
    return f"{'on the Pareto front' if several else 'best'}: {values}, trial {best.number} ({params})" + (
        f" in {best.directory}" if best.directory else ""
    )


def _importances(study: optuna.Study) -> list[str]:
    """A table, most important first, with a column for each objective; none where they cannot be computed."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < ENOUGH or len(done[0].params) < 2:
        return []
    objectives = range(len(study.directions))
    if any(len({trial.values[number] for trial in done}) < 2 for number in objectives):
        return []  # all are equally good
    # It imports scikit-learn, which takes more than a second: not before the first job, and not in every job's memory.
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    evaluator: BaseImportanceEvaluator
    evaluator = FanovaImportanceEvaluator(seed=0) if find_spec("sklearn") else PedAnovaImportanceEvaluator()
    targets = [partial(_value, number) for number in objectives] if len(objectives) > 1 else [None]
    found = [get_param_importances(study, evaluator=evaluator, target=target) for target in targets]
    names = sorted(found[0], key=lambda name: -max(column[name] for column in found))[:MOST_SHOWN]
    if not names:
        return []
    width = max(map(len, names))
    table = [f"  {name:<{width}}" + "".join(f"  {column[name]:.2f}" for column in found) for name in names]
    return ["parameter importances" + (", by objective:" if len(found) > 1 else ":"), *table]


def _value(number: int, trial: FrozenTrial) -> float:
    """Of one objective."""
    return float(trial.values[number])
