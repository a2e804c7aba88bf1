"""Sweeps on one study: they search the same space, and none repeats the points of another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf

import gpu_launcher
from gpu_launcher.errors import StudyError
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies.ownership import TrialOwner, working
from gpu_launcher.studies.study_session import AskedTrial, StudySession, TrialEnding, TrialOutcome
from hydra_plugins.optuna_async_sweeper._options import read_options
from hydra_plugins.optuna_async_sweeper._search_space import read_search_space
from hydra_plugins.optuna_async_sweeper._study import StudyPlan

HERE = ProcessIdentity.here()
DEAD = replace(HERE, pid=2**22)
"""No process has such an id."""
RANDOM = {"name": "random", "seed": 7}

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def at_work() -> Iterator[TrialOwner]:
    """A sweep of this program that works as long as the test."""
    sweep = TrialOwner(HERE)
    with working(sweep):
        yield sweep


def begin(directory: Path, *space: str, sweep: TrialOwner | None = None, **options: Any) -> StudySession:
    """A sweep on the study of that directory."""
    config = OmegaConf.create(
        {
            "hydra": {
                "job": {"name": "study"},
                "sweep": {"dir": str(directory)},
                "runtime": {"choices": {}},
                "overrides": {"hydra": []},
            }
        }
    )
    raw = {"sampler": RANDOM, "n_trials": 50, **options}
    plan = StudyPlan(config, raw, read_options(raw), read_search_space(space), sweep or TrialOwner(HERE))
    return plan.open()[0]


def ask(
    session: StudySession, count: int = 1, outcome: TrialOutcome | None = TrialOutcome.COMPLETE
) -> list[dict[str, Any]]:
    """The parameters of trials, which end with `outcome`; None lets them run."""
    found = []
    for number in range(count):
        asked = session.ask()
        assert isinstance(asked, AskedTrial)
        found.append(asked.trial.params)
        if outcome is not None:
            session.tell(
                asked.trial.number, TrialEnding(outcome, (float(number),) if outcome is TrialOutcome.COMPLETE else ())
            )
    return found


@pytest.mark.parametrize("outcome", [None, TrialOutcome.COMPLETE, TrialOutcome.PRUNED, TrialOutcome.INTERRUPTED])
def test_another_search_is_refused_whatever_state_the_trials_are_in(
    tmp_path: Path, outcome: TrialOutcome | None
) -> None:
    ask(begin(tmp_path, "x=interval(0.0,1.0)"), 1, outcome)
    with pytest.raises(StudyError, match="the study does not search y; the study searches x too"):
        begin(tmp_path, "y=interval(0.0,1.0)")
    begin(tmp_path, "x=interval(0.0,1.0)")


def test_another_search_is_refused_before_the_first_has_a_trial(tmp_path: Path, at_work: TrialOwner) -> None:
    begin(tmp_path, "x=interval(0.0,1.0)", sweep=at_work)
    with pytest.raises(StudyError, match="another search space"):
        begin(tmp_path, "x=interval(0.0,2.0)")


def test_a_sweep_that_died_without_a_trial_leaves_the_space_open(tmp_path: Path) -> None:
    begin(tmp_path, "x=interval(0.0,1.0)", sweep=TrialOwner(DEAD))
    begin(tmp_path, "y=interval(0.0,1.0)")


def test_a_space_whose_trials_all_failed_can_be_replaced(tmp_path: Path) -> None:
    ask(begin(tmp_path, "x=interval(0.0,1.0)"), 2, TrialOutcome.FAILED)
    begin(tmp_path, "y=interval(0.0,1.0)")


def test_running_trials_of_a_foreign_program_count_as_far_as_sampled(tmp_path: Path) -> None:
    study = optuna.create_study(storage=gpu_launcher.storage(tmp_path / "study.db"), study_name="study")
    study.ask().suggest_float("x", 0, 1)
    with pytest.raises(StudyError, match="the study searches x too"):
        begin(tmp_path, "y=interval(0.0,1.0)")
    begin(tmp_path, "x=interval(0.0,1.0)", "y=interval(0.0,1.0)")


def begin_and_stay(directory: Path, number: int, meet: Any, outcomes: Any) -> None:
    meet.wait()
    try:
        begin(directory, f"x{number}=interval(0.0,1.0)", sweep=TrialOwner(ProcessIdentity.here()))
        outcomes.put("began")
    except StudyError as error:
        outcomes.put(str(error))
    meet.wait()


def test_of_sweeps_that_start_together_one_sets_the_space(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    meet, outcomes = context.Barrier(4), context.Queue()
    sweeps = [context.Process(target=begin_and_stay, args=(tmp_path, number, meet, outcomes)) for number in range(4)]
    for sweep in sweeps:
        sweep.start()
    found = [outcomes.get(timeout=100) for _ in sweeps]
    for sweep in sweeps:
        sweep.join(100)
    assert found.count("began") == 1, found
    assert sum("has another search space" in one for one in found) == 3, found


SAMPLERS = [
    RANDOM,
    {"name": "tpe", "seed": 7},
    {"name": "nsgaii", "seed": 7},
    {"_target_": "optuna.samplers.RandomSampler", "seed": 7},
    {"name": "partial_fixed", "fixed_params": {"k": 3}, "base_sampler": RANDOM},
    *([{"name": "cmaes", "seed": 7}] if find_spec("cmaes") else []),
    *([{"name": "gp", "seed": 7, "n_startup_trials": 3}] if find_spec("torch") else []),
    *(
        [{"name": "qmc", "seed": 7}, {"name": "qmc", "seed": 7, "scramble": True, "qmc_type": "halton"}]
        if find_spec("scipy")
        else []
    ),
]
SPACE = ("x=interval(0.0,1.0)", "k=range(0,10)")


def xs(points: list[dict[str, Any]]) -> list[float]:
    return [point["x"] for point in points]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_seed_repeats_a_new_study_and_no_point_of_an_old_one(tmp_path: Path, sampler: Any) -> None:
    first, again, later, last = (tmp_path / "a", tmp_path / "b", tmp_path / "a", tmp_path / "a")
    for directory in (first, again):
        directory.mkdir()
    found = [xs(ask(begin(directory, *SPACE, sampler=sampler), 6)) for directory in (first, again, later, last)]
    assert found[0] == found[1]
    assert len({*found[0], *found[2], *found[3]}) == 18


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_sweeps_that_share_a_study_propose_no_point_twice(tmp_path: Path, sampler: Any) -> None:
    sweeps = [TrialOwner(HERE) for _ in range(3)]
    with ExitStack() as stack:
        for sweep in sweeps:
            stack.enter_context(working(sweep))
        desks = [begin(tmp_path, *SPACE, sampler=sampler, sweep=sweep) for sweep in sweeps]
        found = [
            xs(ask(session, 1, None if turn % 2 else TrialOutcome.COMPLETE)) for turn in range(4) for session in desks
        ]
    assert len({x for (x,) in found}) == 12


def test_the_sweepers_own_seed_is_treated_as_the_samplers(tmp_path: Path) -> None:
    found = [xs(ask(begin(tmp_path, *SPACE, sampler="random", seed=3), 3)) for _ in range(2)]
    assert len({*found[0], *found[1]}) == 6


def explore(directory: Path, sampler: Any, meet: Any, outcomes: Any) -> None:
    session = begin(
        directory, "a=range(0,6)", "b=range(0,6)", sampler=sampler, sweep=TrialOwner(ProcessIdentity.here())
    )
    meet.wait()
    outcomes.put([tuple(point.values()) for point in ask(session, 12)])


@pytest.mark.parametrize("sampler", [{"name": "grid", "seed": 7}, {"name": "GridSampler", "seed": 7}], ids=str)
def test_sweeps_that_share_a_grid_take_each_point_once(tmp_path: Path, sampler: Any) -> None:
    context = multiprocessing.get_context("fork")
    meet, outcomes = context.Barrier(3), context.Queue()
    sweeps = [context.Process(target=explore, args=(tmp_path, sampler, meet, outcomes)) for _ in range(3)]
    for sweep in sweeps:
        sweep.start()
    found = [point for _ in sweeps for point in outcomes.get(timeout=100)]
    for sweep in sweeps:
        sweep.join(100)
    assert len(set(found)) == len(found) == 36
