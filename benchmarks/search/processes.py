"""Whole sweeps in real processes: how long they take, and how much of that time the slots are at work."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from statistics import median
from typing import Any

from overhead.handover import percentile, successions
from overhead.programs import Run, program, scratch
from programs.objectives import OBJECTIVES

from search.sweepers import Sweeper

OBJECTIVE = "hartmann6"


def measure(
    sweepers: list[Sweeper], *, trials: int, slots: int, seeds: int, seconds: float, sigma: float
) -> dict[str, Any]:
    """Run each sweeper with each seed, one after another, so that a busy minute of the machine does not hit only one.

    Trials take `seconds` at the median and spread by `sigma`; the same trial takes every sweeper the same time.
    Raises ProgramError if a sweep fails, or loses a trial.
    """
    runs: dict[str, list[dict[str, float]]] = {sweeper.name: [] for sweeper in sweepers}
    for seed in range(seeds):
        for sweeper in sweepers:
            runs[sweeper.name].append(_once(sweeper, trials, slots, seed, seconds, sigma))
    return {
        "objective": OBJECTIVE,
        "trials": trials,
        "slots": slots,
        "seeds": seeds,
        "median_s": seconds,
        "sigma": sigma,
        "sweepers": {name: {"runs": of, **_summary(of)} for name, of in runs.items()},
    }


def _summary(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def _once(sweeper: Sweeper, trials: int, slots: int, seed: int, seconds: float, sigma: float) -> dict[str, float]:
    objective = OBJECTIVES[OBJECTIVE]
    with scratch() as directory:
        witness = directory / "witness"
        command = program(
            "sleeper.py",
            "-m",
            *(f"+{name}={searched}" for name, searched in objective.space.items()),
            f"+objective={OBJECTIVE}",
            f"+seed={seed}",
            f"+median={seconds}",
            f"+sigma={sigma}",
            f"hydra.sweeper.n_trials={trials}",
            f"{sweeper.seed}={seed}",
            "hydra.sweep.dir=sweep",
            *sweeper.options(slots),
        )
        with Run(command, directory, {"BENCH_WITNESS": str(witness)}) as run:
            usage = run.wait()
        records = [json.loads(line) for line in witness.read_text().splitlines()]
        if sorted(record["job"] for record in records) != list(range(trials)):
            raise ValueError(f"{sweeper.name}: {len(records)} of {trials} trials ran, or some ran twice")
        found = {"elapsed_s": usage.wall, "cpu_s": usage.cpu, "others_cores": usage.others, **use(records, slots)}
        found["best_regret"] = min(record["value"] for record in records) - objective.minimum
        if sweeper.ours:
            found |= waits(records, directory / "sweep" / "study.db")
        return found


def use(records: list[dict[str, Any]], slots: int) -> dict[str, float]:
    """How much of the slots' time is spent in task functions.

    `span` is from the first one's first line to the last one's last line: without the program's start and end.
    """
    began, ended = min(record["first"] for record in records), max(record["last"] for record in records)
    busy = sum(record["last"] - record["first"] for record in records)
    # What no sweeper can help: in the end, slots have nothing to do. Measured until the last trial began.
    last = max(record["first"] for record in records)
    before = sum(min(record["last"], last) - record["first"] for record in records)
    return {
        "span_s": (ended - began) / 1e9,
        "utilisation": busy / (slots * (ended - began)),
        "utilisation_before_last": before / (slots * max(1, last - began)),
        "utilisation_possible": possible(records, slots),
    }


def possible(records: list[dict[str, Any]], slots: int) -> float:
    """The utilisation of a sweeper that starts the next of these trials the moment that a slot is free.

    It is below 1, because in the end there is nothing left to start.
    """
    free = [0] * slots
    durations = [record["last"] - record["first"] for record in sorted(records, key=lambda record: int(record["job"]))]
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return sum(durations) / (slots * max(free))


def waits(records: list[dict[str, Any]], database: Path) -> dict[str, float]:
    """Milliseconds: pauses of devices, and how old a trial is when its job begins (`asked`)."""
    import optuna

    pauses = [(after["first"] - before["last"]) / 1e6 for before, after in successions(records)]
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    (study,) = storage.get_all_studies()
    asked = []
    for trial in storage.get_all_trials(study._study_id, deepcopy=False):
        assert trial.datetime_start is not None
        asked.append((trial.user_attrs["gpu_launcher:job"]["started"] - trial.datetime_start.timestamp()) * 1e3)
    return {
        "pause_median_ms": median(pauses),
        "pause_p90_ms": percentile(pauses, 90),
        "pause_p99_ms": percentile(pauses, 99),
        "asked_before_median_ms": median(asked),
    }
