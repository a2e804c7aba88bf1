"""What the pages cost: how soon those of a huge sweep appear, and what a page costs while 64 jobs report.

    python benchmarks/web.py            five minutes; `huge` or `live` alone
    python benchmarks/web.py --quick    whether it works

- `huge`: a sweep of 20,000 jobs, and a server that has not read it yet: the time until it answers with the first jobs,
  and until it answers with all of them, sorted. How long a sorted table takes then, and `results --html`. Where
  optuna-dashboard is installed, the answer from which it makes its page of a study of as many trials, the same way.
- `live`: jobs that report once a second, and the page with their curves in Chromium: CPU of the server and of the
  browser, how late reports are drawn, and the memory of both. Needs Playwright and Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import importlib.util
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent))

import optuna
from overhead import machine
from overhead.handover import percentile
from overhead.programs import LIMIT, ProgramError, Run, program, scratch
from results import write_sweep
from rich.console import Console
from rich.table import Table

from gpu_launcher.web.catalogue import id_of

PARTS = ("huge", "live")
FIRST_SECONDS = 1.0
"""Seconds in which the first jobs of a huge sweep are to appear."""
MAX_CORES = 0.3
"""Cores that each of server and browser may use while jobs report."""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync")
UNREAD = b"is being read"
"""What the page of a sweep says as long as a part of it has not been read."""
DRAWN = """() => {
  const canvas = echarts.getInstanceByDom(document.querySelector("#reports figure > div"));
  const epoch = EPOCH, seen = new Set();
  window.late = [];
  window.draws = 0;
  canvas.on("rendered", () => {
    const now = Date.now() / 1000 - epoch;
    const fresh = [];
    for (const { name, data } of canvas.getOption().series) {
      for (const [step, time] of data) {
        const key = `${name} ${step}`;
        if (!seen.has(key)) fresh.push(now - time);
        seen.add(key);
      }
    }
    if (window.draws++) window.late.push(...fresh); // not those that were there before
  });
}"""
"""Notes how old each report is when it is drawn for the first time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], help="default: both")
    parser.add_argument("--quick", action="store_true", help="few jobs, one round, some seconds")
    parser.add_argument("--jobs", type=int, help="of the huge sweep; default: 20000")
    parser.add_argument("--rounds", type=int, help="of the huge sweep; default: 3")
    parser.add_argument("--reporters", type=int, help="jobs that report; default: 64")
    parser.add_argument("--seconds", type=float, help="for which a page is open; default: 60")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    options = parser.parse_args()
    usual = (300, 1, 4, 12.0) if options.quick else (20_000, 3, 64, 60.0)
    for name, value in zip(("jobs", "rounds", "reporters", "seconds"), usual, strict=True):
        setattr(options, name, getattr(options, name) or value)
    console = Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, Any] = {"machine": machine.describe(), "quick": options.quick, "parts": {}}
    if "huge" in (options.parts or PARTS):
        found["parts"]["huge"] = huge = measure_huge(options.jobs, options.rounds)
        show_huge(console, huge)
    if "live" in (options.parts or PARTS):
        found["parts"]["live"] = live = measure_live(options.reporters, options.seconds)
        show_live(console, live)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


# A huge sweep


def measure_huge(jobs: int, rounds: int) -> dict[str, Any]:
    others = machine.Others()
    times: dict[str, list[tuple[float, float]]] = {}
    with scratch() as directory:
        sweep = directory / "sweep"
        write_sweep(sweep, jobs)
        study = None
        if importlib.util.find_spec("optuna_dashboard") is not None:
            study = write_study(directory / "study.db", jobs)
        for _ in range(rounds):
            for name, seconds in {**time_page(directory, sweep), **time_dashboard(study)}.items():
                times.setdefault(name, []).append(seconds)
    return {"jobs": jobs, "rounds": rounds, "seconds": times, "others_cores": others.cores(0.0)}


def time_page(directory: Path, sweep: Path) -> dict[str, tuple[float, float]]:
    """Seconds until a new server answers, and seconds of CPU that it takes for that."""
    found = {}
    path = f"/sweeps/{id_of(sweep)}"
    with serving(directory) as server:

        def read_all() -> None:
            while UNREAD in server.get(path):
                pass

        found["first jobs"] = timed(lambda: server.get(path), server.cpu)
        found["then: all jobs have been read"] = timed(read_all, server.cpu)
        found["then: a sorted table"] = timed(lambda: server.get(f"{path}?sort=-loss"), server.cpu)
    command = [sys.executable, "-m", "gpu_launcher.cli", "results", str(sweep), "--html", str(directory / "page.html")]
    run = functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    found["results --html"] = timed(run, children_cpu)
    return found


def time_dashboard(study: str | None) -> dict[str, tuple[float, float]]:
    """Seconds until a new optuna-dashboard answers with a study."""
    if study is None:
        return {}
    code = (
        "import sys, wsgiref.simple_server as s, optuna_dashboard as d\n"
        f"server = s.make_server('127.0.0.1', 0, d.wsgi({study!r}))\n"
        "print(f'http://127.0.0.1:{server.server_port}/?token=', flush=True)\n"
        "server.serve_forever()\n"
    )
    with Server([sys.executable, "-c", code], {}) as server:
        return {"optuna-dashboard: all trials": timed(lambda: server.get("/api/studies/1"), server.cpu)}


def write_study(file: Path, trials: int) -> str:
    """Write a study whose trials are copies of one, and return the URL of its storage."""
    url = f"sqlite:///{file}"
    study = optuna.create_study(storage=url, study_name="sweep")
    study.add_trial(
        optuna.trial.create_trial(
            value=0.5,
            params={"lr": 0.1, "seed": 1.0},
            distributions={name: optuna.distributions.FloatDistribution(0.0, 1e6) for name in ("lr", "seed")},
        )
    )
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        for table in ("trials", "trial_params", "trial_values"):
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")][1:]
            changed = {"number": "n.i", "trial_id": "n.i + 1", "value": "n.i / 7.0", "param_value": "n.i / 3.0"}
            shown = ", ".join(changed.get(name, name) for name in columns)
            numbers = f"WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < {trials - 1})"
            database.execute(f"{numbers} INSERT INTO {table} ({', '.join(columns)}) SELECT {shown} FROM n, {table}")
    return url


def show_huge(console: Console, found: dict[str, Any]) -> None:
    table = Table(title=f"a sweep of {found['jobs']} jobs, {found['rounds']} rounds", title_justify="left")
    for place, column in enumerate(("seconds until", "median", "least", "most", "CPU, median")):
        table.add_column(column, justify="right" if place else "left")
    for name, times in found["seconds"].items():
        wall, cpu = zip(*times, strict=True)
        table.add_row(name, *(f"{value:.3g}" for value in (median(wall), min(wall), max(wall), median(cpu))))
    console.print(table)
    reached = median(wall for wall, _ in found["seconds"]["first jobs"]) <= FIRST_SECONDS
    console.print(f"first jobs within {FIRST_SECONDS:.0f} s: {'reached' if reached else 'missed'}", highlight=False)
    console.print(f"the machine's cores in use: {found['others_cores']:.2f}", highlight=False)
    if not any(name.startswith("optuna-dashboard") for name in found["seconds"]):
        console.print("optuna-dashboard is not installed", highlight=False)


# A sweep whose jobs report


def measure_live(reporters: int, seconds: float) -> dict[str, Any]:
    """Raises ProgramError."""
    if importlib.util.find_spec("playwright") is None:
        return {"skipped": "Playwright is not installed"}
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        return {"skipped": "there is no Chromium"}
    from playwright.sync_api import sync_playwright

    with scratch() as directory, contextlib.ExitStack() as stack:
        epoch = time.time()
        command = program(
            "live_reporter.py",
            "-m",
            "+x=interval(0.0,1.0)",
            f"+steps={3 * int(seconds) + 60}",
            "+interval=1.0",
            "hydra/launcher=gpu_pool",
            f"hydra.launcher.devices=simulated:{reporters}",
            "hydra/sweeper=optuna_async",
            "hydra/sweeper/sampler=random",
            f"hydra.sweeper.n_trials={reporters}",
            "hydra.sweep.dir=sweep",
        )
        run = stack.enter_context(Run(command, directory, {"BENCH_EPOCH": str(epoch)}))
        server = stack.enter_context(serving(directory))
        browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=chromium, args=list(FLAGS))
        stack.callback(browser.close)
        page = browser.new_page()
        page.set_default_timeout(LIMIT * 1000)
        page.goto(server.link)
        page.wait_for_url("**/pool")
        page.goto(f"http://{server.host}/sweeps/{wait_for_sweep(run, server, directory / 'sweep')}")
        page.get_by_text(f"{reporters} running").first.wait_for()
        page.get_by_text(f"What {reporters} jobs reported").wait_for()
        page.evaluate(DRAWN.replace("EPOCH", str(epoch)))
        return {"jobs": reporters, **watch(page, browser, server, seconds)}


def wait_for_sweep(run: Run, server: Server, sweep: Path) -> str:
    """Wait until the server knows the sweep, and return its id."""
    while not run.ended:
        if f"/sweeps/{id_of(sweep)}".encode() in server.get("/sweeps"):
            return id_of(sweep)
        time.sleep(0.1)
    run.wait()
    raise ProgramError("the sweep ended before the server knew it")


def watch(page: Any, browser: Any, server: Server, seconds: float) -> dict[str, Any]:
    """Leave the page open, and return what that takes."""
    devtools, tools = browser.new_browser_cdp_session(), page.context.new_cdp_session(page)

    def cpu() -> dict[str, float]:
        processes = devtools.send("SystemInfo.getProcessInfo")["processInfo"]
        used = {"server": server.cpu(), "renderer": 0.0, "rest of the browser": 0.0}
        for process in processes:
            used["renderer" if process["type"] == "renderer" else "rest of the browser"] += process["cpuTime"]
        return used

    def memory() -> dict[str, float]:
        tools.send("HeapProfiler.collectGarbage")
        heap = tools.send("Runtime.getHeapUsage")["usedSize"] / 1e6
        nodes = tools.send("Memory.getDOMCounters")["nodes"]
        return {"heap_mb": heap, "nodes": nodes, "server_mb": server.memory() / 1e6}

    others, looks = machine.Others(), [memory()]
    began, before = time.monotonic(), cpu()
    page.wait_for_timeout(seconds * 1000)
    after, wall = cpu(), time.monotonic() - began
    late, draws = page.evaluate("[window.late, window.draws]")
    if not late:
        raise ProgramError("the page drew no report")
    looks.append(memory())  # this takes CPU, so it is not done meanwhile
    for _ in range(2):  # curves have grown to as many points as are drawn by then
        page.wait_for_timeout(seconds * 1000)
        looks.append(memory())
    return {
        "seconds": wall,
        "cores": {name: (after[name] - before[name]) / wall for name in before},
        "busy_cores": others.cores(0.0),
        "late_s": {"reports": len(late), "median": median(late), "p95": percentile(late, 95), "max": max(late)},
        "draws": draws,
        "memory": looks,
    }


def show_live(console: Console, found: dict[str, Any]) -> None:
    if "skipped" in found:
        console.print(f"live: {found['skipped']}", highlight=False)
        return
    table = Table(title=f"a page of {found['jobs']} jobs that report each second", title_justify="left")
    for place, column in enumerate(("", "cores")):
        table.add_column(column, justify="right" if place else "left")
    for name, cores in found["cores"].items():
        table.add_row(name, f"{cores:.3f}")
    console.print(table)
    late = found["late_s"]

    def each(name: str) -> str:
        return ", ".join(f"{look[name]:.3g}" for look in found["memory"])

    console.print(
        f"{found['draws']} times drawn in {found['seconds']:.0f} s; {late['reports']} reports were drawn after "
        f"{late['median']:.1f} s (median), {late['p95']:.1f} s (95 %), {late['max']:.1f} s (longest)\n"
        f"every {found['seconds']:.0f} s: JavaScript heap {each('heap_mb')} MB, DOM nodes {each('nodes')}, "
        f"server {each('server_mb')} MB\n"
        f"the machine's cores in use: {found['busy_cores']:.2f}",
        highlight=False,
    )
    reached = all(found["cores"][name] <= MAX_CORES for name in ("server", "renderer"))
    console.print(
        f"server and renderer: at most {MAX_CORES} cores each: {'reached' if reached else 'missed'}", highlight=False
    )


# Servers


@dataclass(frozen=True)
class Answer:
    headers: Mapping[str, str]
    body: bytes


class Server:
    """A server that prints its link. Use as a context manager, which ends it."""

    def __init__(self, command: Sequence[str], environ: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.link = ""
        assert self._process.stdout is not None
        while "token=" not in self.link:
            if not (line := self._process.stdout.readline()):
                raise ProgramError(f"{self._process.args} ended with status {self._process.wait()}")
            self.link = line.strip()
        self.host = urlsplit(self.link).netloc
        self._cookie = ""
        if token := urlsplit(self.link).query.removeprefix("token="):
            self._cookie = self._ask(f"/?token={token}").headers["set-cookie"].partition(";")[0]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def get(self, path: str) -> bytes:
        return self._ask(path).body

    def _ask(self, path: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=LIMIT)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Cookie": self._cookie} if self._cookie else {})
            response = connection.getresponse()
            if response.status != 200:
                raise ProgramError(f"{path}: {response.status} {response.reason}")
            return Answer(response.headers, response.read())

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Number of bytes that no other process shares."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def serving(directory: Path) -> Server:
    """A server of the pages of the sweeps below a directory."""
    command = [sys.executable, "-m", "gpu_launcher.cli", "web", str(directory), "--devices", "simulated:2"]
    return Server(command, {"GPU_LAUNCHER_POOL_DIR": str(directory / "pool")})


def timed(action: Callable[[], object], cpu: Callable[[], float]) -> tuple[float, float]:
    """Seconds that it takes, and seconds of CPU."""
    began, before = time.monotonic(), cpu()
    action()
    return time.monotonic() - began, cpu() - before


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the cleanup, so that no program is left running
    try:
        sys.exit(main())
    except ProgramError as error:
        sys.exit(f"web: {error}")
