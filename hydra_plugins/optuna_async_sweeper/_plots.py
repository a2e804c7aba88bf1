"""Writes Optuna's own plots of a study to files in the sweep's directory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

PLOTS = "plots"
"""Name of the plots' directory."""


def write_plots(study: optuna.Study, directory: Path) -> list[str]:
    """Write the plots for which the study has enough trials; return lines for the user.

    The files are HTML made by plotly, or PNG made by matplotlib if plotly is not installed.
    """
    if find_spec("plotly"):
        import optuna.visualization as visual

        def save(figure: Any, name: str) -> None:
            # All plots share one copy of plotly.js beside them, so they work without a network.
            figure.write_html(home / f"{name}.html", include_plotlyjs="directory")
    elif find_spec("matplotlib"):
        import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

        mpl.use("Agg")
        import optuna.visualization.matplotlib as visual  # type: ignore[no-redef]

        def save(figure: Any, name: str) -> None:
            axes = figure.flat[0] if hasattr(figure, "flat") else figure
            axes.figure.savefig(home / f"{name}.png", dpi=150, bbox_inches="tight")
            mpl.pyplot.close(axes.figure)
    else:
        return ["plots need plotly (for HTML) or matplotlib (for PNG): pip install plotly"]
    home = directory / PLOTS
    home.mkdir(exist_ok=True)
    lines = []
    written = 0
    for name, plot in _wanted(study, visual).items():
        try:
            save(plot(study), name)
            written += 1
        except Exception as error:  # raised by a plotting library or the file system; the other plots are still written
            lines.append(f"plot {name} cannot be made: {str(error).splitlines()[0] if str(error) else error!r}")
    return [*lines, f"{written} plots are in {home}"]


def _wanted(study: optuna.Study, visual: Any) -> dict[str, Callable[[optuna.Study], Any]]:
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if not done:
        return {}
    several = len(study.directions) > 1
    wanted: dict[str, Callable[[optuna.Study], Any]] = {}
    if several:
        if len(study.directions) <= 3:
            wanted["pareto_front"] = visual.plot_pareto_front
        return wanted
    wanted["optimization_history"] = visual.plot_optimization_history
    wanted["slice"] = visual.plot_slice
    if len(done[0].params) > 1:
        wanted["parallel_coordinate"] = visual.plot_parallel_coordinate
        if len(done) > 3 and len({trial.values[0] for trial in done}) > 1:
            wanted["param_importances"] = visual.plot_param_importances
    if any(trial.intermediate_values for trial in trials):
        wanted["intermediate_values"] = visual.plot_intermediate_values
    return wanted
