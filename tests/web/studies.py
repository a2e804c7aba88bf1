"""Studies of searches, for pages to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

import gpu_launcher
from gpu_launcher.studies.report_curves import STUDY_FILE
from tests.waiting import until
from tests.web.serving import WebServer, WrittenSweep, write_sweep


def found_sweep(server: WebServer, directory: Path) -> WrittenSweep:
    """A sweep that the server has found."""
    sweep = write_sweep(directory)
    until(lambda: server(sweep.url).status == 200, "the server does not find the sweep")
    return sweep


def write_study(directory: Path, reports: list[dict[int, float]], *, told: int = 0) -> optuna.Study:
    """A study in which the trials have these reports, and the first ones have ended."""
    directory.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=gpu_launcher.storage(f"sqlite:///{directory / STUDY_FILE}"), study_name="train")
    for number, steps in enumerate(reports):
        trial = study.ask()
        for step, value in steps.items():
            trial.report(value, step)
        if number < told:
            study.tell(trial, 0.0)
    return study


def close(study: optuna.Study) -> None:
    backend: Any = study._storage
    backend._backend.engine.dispose()
