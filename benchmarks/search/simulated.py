"""Best value over time: real samplers, asked and told as each sweeper does it, on a simulated clock.

A hundred trials for each of three functions, many seeds and several sweepers would take hours of sleeping, and what is
compared here does not depend on it: which trials are known when the next one is chosen. So time is simulated, and
nothing but trials takes any; the samplers are those that the two sweepers make of their options.
"""

from __future__ import annotations

import heapq
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import optuna
from hydra.utils import instantiate
from omegaconf import OmegaConf
from programs.objectives import OBJECTIVES, Objective, seconds

from hydra_plugins.optuna_async_sweeper._samplers import make_sampler
from hydra_plugins.optuna_async_sweeper._search_space import SearchSpace, read_search_space

AHEAD = 1
"""Trials that our sweeper has asked for, and its launcher prepared, before a device is free."""

Course = list[tuple[float, float]]
"""When a trial ended, in medians of a trial's duration, and what it returned."""


@dataclass(frozen=True)
class Strategy:
    """A sampler, and whether it is asked in batches."""

    name: str
    sampler: Callable[[SearchSpace, int, int], optuna.samplers.BaseSampler]
    """Of the space, how many trials there will be, and the seed."""
    batches: bool


def _ours(name: str) -> Callable[[SearchSpace, int, int], optuna.samplers.BaseSampler]:
    def sampler(space: SearchSpace, trials: int, seed: int) -> optuna.samplers.BaseSampler:
        made, _ = make_sampler(name, choice=None, space=space, directions=["minimize"], n_trials=trials, seed=seed)
        return made

    return sampler


def _official(space: SearchSpace, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """What Hydra makes of the official sweeper's default. Raises ImportError where it is not installed."""
    from hydra_plugins.hydra_optuna_sweeper.config import TPESamplerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Hydra 1.4 wants a whitelist of what configs may call
        sampler = instantiate(OmegaConf.structured(TPESamplerConfig(seed=seed)))
    assert isinstance(sampler, optuna.samplers.BaseSampler)
    return sampler


STRATEGIES = (
    Strategy("optuna_async auto", _ours("auto"), batches=False),
    Strategy("optuna_async tpe", _ours("tpe"), batches=False),
    Strategy("optuna", _official, batches=True),
)


def simulate(
    strategy: Strategy, objective: Objective, *, trials: int, slots: int, seed: int, sigma: float
) -> tuple[Course, float]:
    """One search; returns what ended when, and the seconds of real time that asking for a trial took on average."""
    space = read_search_space([f"{name}={searched}" for name, searched in objective.space.items()])
    study = optuna.create_study(sampler=strategy.sampler(space, trials, seed))
    took = 0.0

    def ask(count: int) -> Iterator[optuna.Trial]:
        nonlocal took
        began = time.perf_counter()
        # Both sweepers make all trials of a batch before they sample any of its parameters.
        asked = [study.ask() for _ in range(count)]
        for trial in asked:
            for name, distribution in space.distributions.items():
                trial._suggest(name, distribution)
        took += time.perf_counter() - began
        return iter(asked)

    def duration(trial: optuna.Trial) -> float:
        return seconds(seed, trial.number, median=1.0, sigma=sigma)

    run = _batches if strategy.batches else _stream
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        course = run(study, ask, duration, objective, trials, slots)
    return course, took / trials


Ask = Callable[[int], Iterator[optuna.Trial]]


def _stream(
    study: optuna.Study,
    ask: Ask,
    duration: Callable[[optuna.Trial], float],
    objective: Objective,
    trials: int,
    slots: int,
) -> Course:
    course: Course = []
    running: list[tuple[float, int, optuna.Trial]] = []
    prepared: list[optuna.Trial] = []
    now, asked = 0.0, 0
    while len(course) < trials:
        while len(running) < slots and (prepared or asked < trials):
            while len(prepared) < 1 + AHEAD and asked < trials:
                prepared += ask(1)
                asked += 1
            trial = prepared.pop(0)
            heapq.heappush(running, (now + duration(trial), trial.number, trial))
        now, _, trial = heapq.heappop(running)
        course.append((now, _tell(study, trial, objective)))
    return course


def _batches(
    study: optuna.Study,
    ask: Ask,
    duration: Callable[[optuna.Trial], float],
    objective: Objective,
    trials: int,
    slots: int,
) -> Course:
    course: Course = []
    now = 0.0
    while len(course) < trials:
        batch = list(ask(min(slots, trials - len(course))))
        ended = [(now + duration(trial), _tell(study, trial, objective)) for trial in batch]
        course += sorted(ended)
        now = max(end for end, _ in ended)
    return course


def _tell(study: optuna.Study, trial: optuna.Trial, objective: Objective) -> float:
    value = objective.evaluate(trial.params)
    study.tell(trial, value)
    return value


def best_at(course: Course, when: float) -> float:
    """The best value that was known then; infinity if none was."""
    return min((value for end, value in course if end <= when), default=float("inf"))


def measure(
    strategies: list[Strategy], *, trials: int, slots: int, seeds: int, sigma: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Courses of all searches: `{objective: {strategy: [{regret at TIMES, ...} for each seed]}}`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    whole = trials / slots
    # Quarters of the time that slots need that are never idle, at trials of median duration; and then twice that.
    times = [whole / 4, whole / 2, whole, 2 * whole]
    found: dict[str, Any] = {}
    for name, objective in OBJECTIVES.items():
        found[name] = {}
        for strategy in strategies:
            runs = []
            for seed in range(seeds):
                course, asking = simulate(strategy, objective, trials=trials, slots=slots, seed=seed, sigma=sigma)
                runs.append(
                    {
                        "regret_at": [best_at(course, when) - objective.minimum for when in times],
                        "regret": best_at(course, float("inf")) - objective.minimum,
                        "end": max(end for end, _ in course),
                        "ask_ms": 1000 * asking,
                    }
                )
            found[name][strategy.name] = runs
            say(f"{name}: {strategy.name}")
    return {"trials": trials, "slots": slots, "seeds": seeds, "sigma": sigma, "times": times, "objectives": found}
