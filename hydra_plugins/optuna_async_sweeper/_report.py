"""Reports on a sweep at its end: best trials, parameter importances, plots. Runs in the head, which has the study."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.studies.study_session import Best, SearchSummary, StudySession
from gpu_launcher.wording import count
from hydra_plugins.gpu_pool_launcher._filter import OPTION

if TYPE_CHECKING:
    from ._study import StudyPlan

MAX_SHOWN = 10
"""Maximum number of listed trials of a Pareto front, and of parameters in the table of importances."""
ENOUGH = 4
"""Minimum number of completed trials for meaningful importances."""


def finish(session: StudySession, summary: SearchSummary, plan: StudyPlan, directory: Path) -> list[str]:
    """Report on a sweep: return lines for the user, and write plots to `directory` if the user wants them."""
    lines = [_best(best, plan) for best in summary.best[:MAX_SHOWN]]
    if len(summary.best) > MAX_SHOWN:
        lines.append(f"... and {len(summary.best) - MAX_SHOWN} more trials on the Pareto front")
    if session.left_out:
        lines.append(f"{count(session.left_out, 'proposal')} did not satisfy {OPTION}, and did not run")
    lines += _importances(session.study)
    if plan.options.plots:
        from ._plots import write_plots

        lines += write_plots(session.study, directory)
    return lines


def _best(best: Best, plan: StudyPlan) -> str:
    values = ", ".join(f"{value:.6g}" for value in best.values)
    params = " ".join(f"{name}={value}" for name, value in plan.space.unzipped(best.params).items())
    several = len(plan.options.directions) > 1
    return f"{'on the Pareto front' if several else 'best'}: {values}, trial {best.number} ({params})" + (
        f" in {best.directory}" if best.directory else ""
    )


def _importances(study: optuna.Study) -> list[str]:
    """The lines of the table of importances, most important first; empty if they cannot be computed."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < ENOUGH or len(done[0].params) < 2:
        return []
    if any(len({trial.values[number] for trial in done}) < 2 for number in range(len(study.directions))):
        return []  # all trials are equally good
    found = []
    with warnings.catch_warnings():
        # The evaluator warns that it is experimental in Optuna 4, and that it seeks low values, as `_value` provides.
        warnings.simplefilter("ignore")
        with _ped_anova() as (get_param_importances, evaluator):
            for number, direction in enumerate(study.directions):
                target = partial(_value, number, 1.0 if direction is StudyDirection.MINIMIZE else -1.0)
                found.append(get_param_importances(study, evaluator=evaluator, target=target))
    names = sorted(found[0], key=lambda name: -max(column[name] for column in found))[:MAX_SHOWN]
    if not names:
        return []
    width = max(map(len, names))
    table = [f"  {name:<{width}}" + "".join(f"  {column[name]:.2f}" for column in found) for name in names]
    return ["parameter importances" + (", by objective:" if len(found) > 1 else ":"), *table]


@contextmanager
def _ped_anova() -> Iterator[tuple[Callable[..., dict[str, float]], Any]]:
    """Provide Optuna's `get_param_importances` and its PED-ANOVA evaluator without importing scikit-learn.

    `optuna.importance` imports scikit-learn for its other evaluators. That takes more than a second, but the module
    works without scikit-learn if that cannot be imported. So this context manager hides scikit-learn, imports
    `optuna.importance`, and removes it again afterwards.
    """
    name, needless = "optuna.importance", "sklearn"
    spared = needless not in sys.modules and name not in sys.modules
    before = vars(optuna).get("importance")
    if spared:
        sys.modules[needless] = None  # type: ignore[assignment]  # None makes Python's import fail
    try:
        importance = import_module(name)
        yield importance.get_param_importances, importance.PedAnovaImportanceEvaluator()
    finally:
        if spared:
            del sys.modules[needless]
            for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
                del sys.modules[module]
            if before is not None:
                vars(optuna)["importance"] = before


def _value(number: int, sign: float, trial: FrozenTrial) -> float:
    """A trial's value for one objective, with its sign changed if necessary so that lower is better."""
    return sign * float(trial.values[number])
