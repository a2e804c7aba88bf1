"""What a study costs that many processes share: our SQLite beside Optuna's own, its journal file and PostgreSQL.

    python benchmarks/storage.py                                         under two minutes on two cores
    python benchmarks/storage.py --postgresql postgresql://user@host/db  and that
    python benchmarks/storage.py --quick                                 to see that it works

Every process asks for a trial, gives it three parameters and tells its value, again and again, without any pause: more
than sweeps do, whose trials last. At first the study has enqueued trials, each of which has to run once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from overhead import machine
from rich.console import Console
from rich.table import Table

import gpu_launcher

Results = dict[str, Any]


def ours(place: str) -> BaseStorage:
    return gpu_launcher.storage(f"sqlite:///{place}")


def optunas(place: str) -> BaseStorage:
    return RDBStorage(f"sqlite:///{place}")


def optunas_with_wal(place: str) -> BaseStorage:
    made = RDBStorage(f"sqlite:///{place}")
    with closing(sqlite3.connect(place, timeout=60)) as database:
        database.execute("PRAGMA journal_mode = WAL")
    return made


def journal(place: str) -> BaseStorage:
    return JournalStorage(JournalFileBackend(place))


def server(place: str) -> BaseStorage:
    return gpu_launcher.storage(place)


STORAGES: dict[str, Callable[[str], BaseStorage]] = {
    "gpu_launcher.storage": ours,
    "Optuna's SQLite": optunas,
    "Optuna's SQLite, WAL": optunas_with_wal,
    "journal file": journal,
    "PostgreSQL": server,
}


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 120)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    results: Results = {"machine": machine.describe(), "options": vars(options), "storages": {}}
    about = results["machine"]
    console.print(
        f"{about['date']}: {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}, Optuna "
        f"{optuna.__version__}, SQLite {sqlite3.sqlite_version}, load {' '.join(map(str, about['load_average']))}\n",
        highlight=False,
    )
    for name in STORAGES:
        if name != "PostgreSQL" or options.postgresql:
            results["storages"][name] = _measured(name, options)
    console.print(_table(results["storages"], options))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--trials", type=int, default=50, help="for each process")
    parser.add_argument("--enqueued", type=int, default=60, help="of these trials")
    parser.add_argument("--postgresql", metavar="URL", help="of a database that there is, in which a study is made")
    parser.add_argument("--quick", action="store_true", help="few trials: figures are not worth much")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    options = parser.parse_args()
    if options.quick:
        options.processes, options.trials, options.enqueued = 3, 5, 6
    return options


def _measured(name: str, options: argparse.Namespace) -> Results:
    with tempfile.TemporaryDirectory() as directory:
        place = options.postgresql if name == "PostgreSQL" else f"{directory}/study.db"
        study = f"benchmark-{uuid.uuid4().hex}"
        begun = optuna.create_study(storage=STORAGES[name](place), study_name=study)
        for number in range(options.enqueued):
            begun.enqueue_trial({}, user_attrs={"enqueued": number})
        # Fresh interpreters: Optuna's own storages do not survive a fork.
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(options.processes)
        given = [(name, place, study, options.trials, barrier, f"{directory}/{n}") for n in range(options.processes)]
        workers = [context.Process(target=_work, args=some) for some in given]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError(f"{name}: a process failed: see above")
        parts = [json.loads(Path(some[-1]).read_text()) for some in given]
        states = Counter(trial.state.name for trial in begun.get_trials(deepcopy=False))
        if name == "PostgreSQL":
            optuna.delete_study(study_name=study, storage=begun._storage)
    return _summed(parts, states)


def _work(name: str, place: str, study_name: str, trials: int, barrier: Barrier, answer: str) -> None:
    """Ask and tell, in a process of its own, and write down how long each took."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler()
    study = optuna.load_study(study_name=study_name, storage=STORAGES[name](place), sampler=sampler)
    found: Results = {"ask": [], "tell": [], "enqueued": [], "errors": [], "told": 0}
    barrier.wait()
    found["began"], found["cpu"] = time.time(), -time.process_time()
    for _ in range(trials):
        try:
            before = time.perf_counter()
            trial = study.ask()
            asked = time.perf_counter()
            found["ask"].append(asked - before)
            if "enqueued" in trial.user_attrs:
                found["enqueued"].append(trial.user_attrs["enqueued"])
            value = sum(trial.suggest_float(parameter, 0, 1) for parameter in "abc")
            before = time.perf_counter()
            study.tell(trial, value)
            found["tell"].append(time.perf_counter() - before)
            found["told"] += 1
        except Exception as error:  # of all kinds: that is what is counted
            found["errors"].append(type(error).__name__)
    found["ended"], found["cpu"] = time.time(), found["cpu"] + time.process_time()
    Path(answer).write_text(json.dumps(found))


def _summed(parts: list[Results], states: Counter[str]) -> Results:
    elapsed = max(part["ended"] for part in parts) - min(part["began"] for part in parts)
    runs = Counter(number for part in parts for number in part["enqueued"])
    return {
        "elapsed": elapsed,
        "trials_per_second": sum(part["told"] for part in parts) / elapsed,
        "cpu_ms": 1000 * sum(part["cpu"] for part in parts) / max(1, sum(part["told"] for part in parts)),
        **{
            call: {"median_ms": 1000 * statistics.median(times), "p99_ms": 1000 * _percentile(times, 99)}
            for call in ("ask", "tell")
            if (times := [taken for part in parts for taken in part[call]])
        },
        "errors": dict(Counter(error for part in parts for error in part["errors"])),
        "ran_again": sum(runs.values()) - len(runs),
        "left_running": states["RUNNING"],
    }


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _table(storages: Results, options: argparse.Namespace) -> Table:
    title = f"{options.processes} processes, {options.trials} trials each, {options.enqueued} of them enqueued"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("trials/s", "CPU, ms", "ask, ms", "99 %", "tell, ms", "99 %", "errors", "ran again", "left RUNNING"):
        table.add_column(column, justify="right")
    for name, found in storages.items():
        times = [f"{found[call][figure]:.0f}" for call in ("ask", "tell") for figure in ("median_ms", "p99_ms")]
        counts = [sum(found["errors"].values()), found["ran_again"], found["left_running"]]
        table.add_row(name, f"{found['trials_per_second']:.0f}", f"{found['cpu_ms']:.0f}", *times, *map(str, counts))
    return table


if __name__ == "__main__":
    sys.exit(main())
