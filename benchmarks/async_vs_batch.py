"""What waiting for the slowest costs: `hydra/sweeper=optuna_async` beside the official Optuna sweeper.

    python benchmarks/async_vs_batch.py                       both parts; see README.md here for how long
    python benchmarks/async_vs_batch.py processes --seeds 3   real sweeps in real processes: time and utilisation
    python benchmarks/async_vs_batch.py simulated --seeds 20  best value over time: real samplers, simulated clock
    python benchmarks/async_vs_batch.py --quick               under a minute: whether it works

Trials sleep for lognormal times; a trial takes the same time whichever sweeper asks for it. The official sweeper
(`pip install hydra-optuna-sweeper==1.4.0rc3`) gets as many `n_jobs` as there are slots.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from overhead import machine
from overhead.programs import ProgramError
from rich.console import Console
from rich.table import Table
from search import processes, simulated
from search.sweepers import SWEEPERS

PARTS = ("processes", "simulated")
BASELINE = "optuna, gpu_pool"
"""The official sweeper on our launcher: what differs from ours is then only how it asks."""
NAMES = list(dict.fromkeys([*(s.name for s in SWEEPERS), *(s.name for s in simulated.STRATEGIES)]))
"""`optuna` is the official one where time is simulated, and no launcher makes a difference."""
RESAMPLES = 10_000


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 150)
    results: dict[str, Any] = {"machine": machine.describe(), "quick": options.quick, "parts": {}}
    about = results["machine"]
    optuna_version = machine.version("optuna")
    official = machine.version("hydra-optuna-sweeper")
    console.print(
        f"{about['date']}: {about['cores']} cores, load {' '.join(map(str, about['load_average']))}, Hydra "
        f"{about['versions']['hydra-core']}, Optuna {optuna_version}, hydra-optuna-sweeper {official}",
        highlight=False,
    )
    if "processes" in options.parts:
        results["parts"]["processes"] = _processes(console, options)
    if "simulated" in options.parts:
        results["parts"]["simulated"] = _simulated(console, options)
    results["machine"]["load_average_after"] = machine.describe()["load_average"]
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: both")
    parser.add_argument("--quick", action="store_true", help="few and short trials, one seed")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--slots", type=int, default=8, help="trials at the same time; default: 8")
    parser.add_argument("--trials", type=int, help="of each sweep; default: 100")
    parser.add_argument("--seeds", type=int, help="sweeps of each kind; default: 3 of processes, 20 simulated")
    parser.add_argument("--seconds", type=float, help="median duration of a real trial; default: 2")
    parser.add_argument("--sigma", type=float, default=0.5, help="of the durations' logarithm; default: 0.5")
    parser.add_argument(
        "--sweepers",
        type=lambda text: text.split(";"),
        default=NAMES,
        metavar="NAME;...",
        help=f"those to compare, of {'; '.join(NAMES)}",
    )
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    for wrong in [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {wrong!r}: choose from {', '.join(PARTS)}")
    for wrong in [name for name in options.sweepers if name not in NAMES]:
        parser.error(f"there is no sweeper {wrong!r}: choose from {'; '.join(NAMES)}")
    options.trials = options.trials or (12 if options.quick else 100)
    options.seconds = options.seconds or (0.3 if options.quick else 2.0)
    return options


def _processes(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    chosen = []
    for sweeper in SWEEPERS:
        if reason := sweeper.missing():
            console.print(f"{sweeper.name} is skipped: {reason}")
        elif sweeper.name in options.sweepers:
            chosen.append(sweeper)
    found = processes.measure(
        chosen,
        trials=options.trials,
        slots=options.slots,
        seeds=options.seeds or (1 if options.quick else 3),
        seconds=options.seconds,
        sigma=options.sigma,
    )
    table = _table(
        f"{found['trials']} trials of {found['median_s']} s (sigma {found['sigma']}) on {found['slots']} slots, "
        f"median of {found['seeds']} sweeps",
        (
            "sweeper",
            "program, s",
            "trials, s",
            "factor",
            "utilisation",
            "possible",
            "to last start",
            "pause, ms",
            "99 %",
            "others",
        ),
    )
    base = found["sweepers"].get(BASELINE)
    for name, of in found["sweepers"].items():
        pause = [f"{of[key]:.0f}" if key in of else "" for key in ("pause_median_ms", "pause_p99_ms")]
        table.add_row(
            name,
            f"{of['elapsed_s']:.1f}",
            f"{of['span_s']:.1f}",
            f"{of['elapsed_s'] / base['elapsed_s']:.2f}" if base else "",
            f"{of['utilisation']:.2f}",
            f"{of['utilisation_possible']:.2f}",
            f"{of['utilisation_before_last']:.2f}",
            *pause,
            f"{of['others_cores']:.2f}",
        )
    console.print(table)
    return found


def _simulated(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    # One thread is the fastest for matrices of this size, and leaves other programs their CPU.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    strategies = [
        strategy
        for strategy in simulated.STRATEGIES
        if strategy.name in options.sweepers and (not strategy.batches or machine.version("hydra-optuna-sweeper"))
    ]
    found = simulated.measure(
        strategies,
        trials=options.trials,
        slots=options.slots,
        seeds=options.seeds or (1 if options.quick else 20),
        sigma=options.sigma,
        say=lambda line: console.print(f"[dim]{line}[/dim]", highlight=False),
    )
    times = [f"{when:.3g}" for when in found["times"]]
    table = _table(
        f"regret, simulated: {found['trials']} trials on {found['slots']} slots, {found['seeds']} seeds; the median, "
        "and 95 % of bootstrapped medians; time in a trial's median duration",
        ("objective", "sweeper", *(f"at {when}" for when in times), "all trials", "ends at", "ask, ms"),
    )
    for objective, strategies_found in found["objectives"].items():
        for name, runs in strategies_found.items():
            shown = [_interval([run["regret_at"][place] for run in runs]) for place in range(len(times))]
            end, asking = median(run["end"] for run in runs), median(run["ask_ms"] for run in runs)
            every = _interval([run["regret"] for run in runs])
            table.add_row(objective, name, *shown, every, f"{end:.1f}", f"{asking:.0f}")
    console.print(table)
    return found


def _interval(values: list[float]) -> str:
    """The median, and where 95 % of medians lie of as many values drawn from these."""
    import numpy

    drawn = numpy.random.default_rng(0).choice(values, size=(RESAMPLES, len(values)))
    medians = sorted(float(value) for value in numpy.median(drawn, axis=1))
    low, *_, high = quantiles(medians, n=40, method="inclusive")
    return f"{median(values):.2g} ({low:.2g} to {high:.2g})"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the cleanup, so that no program is left running
    try:
        sys.exit(main())
    except ProgramError as error:
        sys.exit(f"async_vs_batch: {error}")
