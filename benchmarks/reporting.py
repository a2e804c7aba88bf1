"""What reporting costs a job: 64 jobs that report once a second, with the median pruner.

    python benchmarks/reporting.py            two and a half minutes
    python benchmarks/reporting.py --quick    seconds: whether it works

Each job measures its own calls of `report` and `should_prune`. A call of `should_prune` waits for the verdict on what
was just reported, which the sweeper gives after it has stored the report; it gives up after 50 ms. For how long a
verdict takes, each job then waits on, for at most half an interval.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import optuna
from overhead import machine
from overhead.handover import percentile
from overhead.programs import ProgramError, Run, program, scratch
from rich.console import Console
from rich.table import Table

MEDIAN, P99 = 1.0, 10.0
"""Milliseconds that `report` may take in the job."""
ERRORS = re.compile(r"OperationalError|StorageInternalError|database is locked|sqlite3|sqlalchemy")
CALLS = (
    ("report_ns", "report"),
    ("should_prune_ns", "should_prune"),
    ("verdict_ns", "from report to verdict"),
)


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, Any] = {"machine": machine.describe(), "quick": options.quick}
    console.print(
        f"{found['machine']['date']}: {found['machine']['cores']} cores, load "
        f"{' '.join(map(str, found['machine']['load_average']))}, Optuna {optuna.__version__}",
        highlight=False,
    )
    found |= measure(jobs=options.jobs, trials=options.trials, steps=options.steps, interval=options.interval)
    table = Table(title=f"{options.jobs} jobs report every {options.interval} s, ms", title_justify="left")
    for place, column in enumerate(("call", "calls", "median", "90 %", "99 %", "longest")):
        table.add_column(column, justify="right" if place else "left")
    for key, label in CALLS:
        of = found[key]
        figures = (of[name] for name in ("median_ms", "p90_ms", "p99_ms", "max_ms"))
        table.add_row(label, str(of["calls"]), *(f"{value:.3g}" for value in figures))
    console.print(table)
    console.print(
        f"{found['late']} verdicts took longer than should_prune waits; {found['at_once']} jobs ran at the same time; "
        f"{found['states']}; {found['stored']} of {found['report_ns']['calls']} reports in the database; "
        f"{len(found['database_errors'])} lines about database errors in the output; "
        f"others used {found['others_cores']:.2f} cores, the sweep {found['own_cores']:.2f}",
        highlight=False,
    )
    reached = found["report_ns"]["median_ms"] <= MEDIAN and found["report_ns"]["p99_ms"] <= P99
    console.print(
        f"report: at most {MEDIAN} ms at the median, {P99} ms at 99 %: {'reached' if reached else 'missed'}",
        highlight=False,
    )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few jobs and short intervals")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--jobs", type=int, help="at the same time; default: 64")
    parser.add_argument("--trials", type=int, help="of the sweep; default: 3 times as many as jobs")
    parser.add_argument("--steps", type=int, help="reports of a trial that is not pruned; default: 40")
    parser.add_argument("--interval", type=float, help="seconds between two reports of a job; default: 1")
    options = parser.parse_args()
    options.jobs = options.jobs or (6 if options.quick else 64)
    options.trials = options.trials or 3 * options.jobs
    options.steps = options.steps or (5 if options.quick else 40)
    options.interval = options.interval or (0.2 if options.quick else 1.0)
    return options


def measure(*, jobs: int, trials: int, steps: int, interval: float, where: Sequence[str] = ()) -> dict[str, Any]:
    """Run the sweep. Raises ProgramError if it fails, and ValueError if a trial is missing.

    `where` are the launcher's options for the devices; by default there are as many as jobs, on this machine.
    """
    with scratch() as directory:
        place = directory / "records"
        place.mkdir()
        command = program(
            "reporter.py",
            "-m",
            "+x=interval(0.0,1.0)",
            f"+steps={steps}",
            f"+interval={interval}",
            "hydra/launcher=gpu_pool",
            *(where or (f"hydra.launcher.devices=simulated:{jobs}",)),
            "hydra.launcher.start_method=fork",
            "hydra/sweeper=optuna_async",
            # What is measured is reporting, so asking is to cost little.
            "hydra/sweeper/sampler=random",
            "hydra.sweeper.pruner=median",
            f"hydra.sweeper.n_trials={trials}",
            "hydra.sweep.dir=sweep",
        )
        with Run(command, directory, {"BENCH_PLACE": str(place)}) as run:
            usage = run.wait()
        records = [json.loads(path.read_text()) for path in place.iterdir()]
        if len(records) != trials:
            raise ValueError(f"{len(records)} of {trials} trials left a record")
        storage = optuna.storages.RDBStorage(f"sqlite:///{directory / 'sweep' / 'study.db'}")
        (study,) = storage.get_all_studies()
        stored = storage.get_all_trials(study._study_id, deepcopy=False)
        said = [directory / "output.txt", *(directory / "sweep").rglob("*.log")]
        return {
            "jobs": jobs,
            "trials": trials,
            "interval_s": interval,
            "elapsed_s": usage.wall,
            "own_cores": usage.cpu / usage.wall,
            "others_cores": usage.others,
            "at_once": _at_once(records),
            "verdicts_ms": [time / 1e6 for record in records for time in record["verdict_ns"]],
            **{key: _spread([time / 1e6 for record in records for time in record[key]]) for key, _ in CALLS},
            "late": sum(record["late"] for record in records),
            "stored": sum(len(trial.intermediate_values) for trial in stored),
            "states": ", ".join(
                f"{sum(trial.state.name == state for trial in stored)} {state.lower()}"
                for state in sorted({trial.state.name for trial in stored})
            ),
            "database_errors": [
                line for path in said for line in path.read_text(errors="replace").splitlines() if ERRORS.search(line)
            ],
        }


def _at_once(records: list[dict[str, Any]]) -> int:
    """Most jobs that ran at the same time."""
    changes = sorted((record[key], change) for record in records for key, change in (("began", 1), ("ended", -1)))
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def _spread(times: list[float]) -> dict[str, float]:
    if not times:
        return dict.fromkeys(("calls", "median_ms", "p90_ms", "p99_ms", "max_ms"), 0)
    return {
        "calls": len(times),
        "median_ms": median(times),
        "p90_ms": percentile(times, 90),
        "p99_ms": percentile(times, 99),
        "max_ms": max(times),
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the cleanup, so that no program is left running
    try:
        sys.exit(main())
    except ProgramError as error:
        sys.exit(f"reporting: {error}")
