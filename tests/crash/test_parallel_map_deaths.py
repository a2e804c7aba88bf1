"""Whatever dies while `parallel_map` works: every record has exactly one result, and nothing is left."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.errors import NodeDiedError, RecordError, WorkerDiedError
from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.jobs.where import Where
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from gpu_launcher.processes.linux import die_with_parent
from tests.waiting import until

TREE = Path(__file__).parents[2]


@pytest.fixture
def pool(tmp_path: Path) -> Where:
    return Where(devices="simulated:2", pool_dir=tmp_path / "pool")


@pytest.fixture(autouse=True)
def quiet_deaths() -> Iterator[None]:
    """Without core files."""
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, limits)


def leased(pool: Where) -> int:
    with FileLedger(resolve_pool_directory(str(pool.pool_dir))) as ledger:
        view = ledger.snapshot()
        return len(view.leases) + len(view.tickets)


def first_time(path: Path) -> bool:
    """Whether nobody has asked this before, in any process."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


DEATHS: dict[str, Callable[[], object]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGABRT": lambda: os.abort(),
    "exit": lambda: os._exit(3),
    "exit with 0": lambda: os._exit(0),
    "supervisor": lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(60)),
}


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(one, marks=[pytest.mark.smoke] * (one in ("SIGKILL", "exit with 0", "supervisor")))
        for one in DEATHS
    ],
)
def test_a_worker_that_dies_once_is_replaced_and_its_record_dealt_again(
    pool: Where, tmp_path: Path, death: str
) -> None:
    def work(record: int) -> int:
        if record == 77 and first_time(tmp_path / "died"):
            DEATHS[death]()
        return record

    assert list(parallel_map(range(200), function=work, pool=pool)) == list(range(200))
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("death", DEATHS)
def test_a_record_that_kills_every_worker_fails_alone(pool: Where, death: str) -> None:
    def work(record: int) -> int:
        if record == 77:
            DEATHS[death]()
        return record

    found = list(parallel_map(range(200), function=work, on_error="return", pool=pool))
    error = found.pop(77)
    assert found == [n for n in range(200) if n != 77]
    assert isinstance(error, RecordError)
    assert (error.index, error.record) == (77, 77)
    assert isinstance(error.exception, WorkerDiedError)
    assert "its worker " in str(error)
    assert "as had the one before" in str(error)
    if death.startswith("SIG"):
        assert death in str(error)


def test_a_dead_worker_raises_if_that_is_wanted(pool: Where) -> None:
    def work(record: int) -> int:
        if record == 5:
            os._exit(1)
        return record

    results = parallel_map(range(100), function=work, pool=pool)
    assert list(itertools.islice(results, 5)) == list(range(5))
    with pytest.raises(WorkerDiedError, match="exit code 1") as caught:
        next(results)
    assert isinstance(caught.value.__cause__, RecordError)
    assert caught.value.__cause__.record == 5
    assert leased(pool) == 0


@pytest.mark.parametrize("pause", [0, 0.001])
def test_a_record_is_begun_twice_at_most_if_it_kills_its_workers(pool: Where, tmp_path: Path, pause: float) -> None:
    """Or once more, if it is so quick that it is begun with others at first."""

    def work(record: int) -> int:
        with (tmp_path / f"begun-{record}").open("a") as file:
            file.write("x")
        time.sleep(pause)
        if record in (3, 40, 41, 90):
            os._exit(1)
        return record

    found = list(parallel_map(range(100), function=work, on_error="return", pool=pool))
    assert [n for n, one in enumerate(found) if isinstance(one, RecordError)] == [3, 40, 41, 90]
    for record in (3, 40, 41, 90):
        begun = (tmp_path / f"begun-{record}").read_text()
        assert begun == "xx" or (not pause and begun == "xxx")


@pytest.mark.parametrize("seed", range(6))
def test_every_record_has_one_result_however_many_workers_die(pool: Where, seed: int) -> None:
    dice = random.Random(seed)
    deadly = set(dice.sample(range(3000), 4))
    pauses = {n: dice.choice([0.0005, 0.003, 0.03]) for n in dice.sample(range(3000), 60)}
    ordered = bool(seed % 2)

    def work(record: int) -> tuple[int, int]:
        if record in deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if record in pauses:
            time.sleep(pauses[record])
        return record, os.getpid()

    indices: list[int] = []
    failed: list[int] = []
    for result in parallel_map(iter(range(3000)), function=work, ordered=ordered, on_error="return", pool=pool):
        if isinstance(result, RecordError):
            failed.append(result.index)
            indices.append(result.index)
            continue
        indices.append(result[0])
        if dice.random() < 0.002:  # somebody else kills a worker, whatever it is doing
            with contextlib.suppress(ProcessLookupError):
                os.kill(result[1], signal.SIGKILL)
    assert (indices if ordered else sorted(indices)) == list(range(3000))
    assert deadly <= set(failed)
    assert leased(pool) == 0


# Before there is a record


def test_a_worker_that_dies_in_setup_is_replaced(pool: Where, tmp_path: Path) -> None:
    def setup() -> None:
        if first_time(tmp_path / "died"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert list(parallel_map(range(50), setup, lambda record: record, pool=pool)) == list(range(50))


def test_a_setup_that_dies_every_time_is_an_error(pool: Where) -> None:
    with pytest.raises(WorkerDiedError, match=r"was killed by SIGKILL .*before it had set itself up; so did"):
        list(parallel_map(range(50), lambda: os.kill(os.getpid(), signal.SIGKILL), len, pool=pool))
    assert leased(pool) == 0


def test_it_goes_on_with_the_workers_that_can_set_themselves_up(
    pool: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def setup() -> None:
        if not first_time(tmp_path / "one lives"):
            os.kill(os.getpid(), signal.SIGKILL)  # as where the host's memory is enough for one

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "continuing with" in record.getMessage():
                (tmp_path / "said").touch()

    def work(record: int) -> int:
        until((tmp_path / "said").exists)  # while records are left for another worker
        return os.getpid()

    logger, handler = logging.getLogger("gpu_launcher"), Said()
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.WARNING, "gpu_launcher"):
            pids = list(parallel_map(range(40), setup, work, pool=pool))
    finally:
        logger.removeHandler(handler)
    assert len(pids) == 40
    assert len(set(pids)) == 1
    assert "so did the one before; continuing with 1" in caplog.text


# The processes in between


@pytest.mark.parametrize("part", ["guard", "server"])
def test_a_dead_fork_server_costs_what_its_workers_did(pool: Where, part: str) -> None:
    def work(record: int) -> int:
        time.sleep(0.01)
        return record

    results = parallel_map(range(100), function=work, pool=pool)
    found = list(itertools.islice(results, 10))
    node = newest_child()
    guard = node.children()[0]
    (guard if part == "guard" else guard.children()[0]).kill()
    assert found + list(results) == list(range(100))


def newest_child() -> psutil.Process:
    return max(psutil.Process().children(), key=lambda child: child.create_time())


def test_a_dead_node_is_an_error_after_the_results_that_are_there(pool: Where) -> None:
    def work(record: int) -> int:
        time.sleep(0.01)
        return record

    results = parallel_map(itertools.count(), function=work, pool=pool)
    found = list(itertools.islice(results, 10))
    tree = newest_child().children(recursive=True)
    newest_child().kill()
    with pytest.raises(NodeDiedError):
        found.extend(results)  # what it got stays there
    assert found == list(range(len(found)))
    until(lambda: not any(process.is_running() and process.status() != "zombie" for process in tree))
    assert leased(pool) == 0


# The program

PROGRAM = """
import faulthandler, itertools, os, sys, time
faulthandler.dump_traceback_later(200)
from gpu_launcher.executors import record_engine
from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.jobs import where as where_jobs_run
from gpu_launcher.jobs.where import Where

record_engine.END_SECONDS = where_jobs_run.GRACE = 600.0  # workers end by themselves

def work(record):
    if record > 3:
        if record == 4:
            os.write(1, b"busy\\n")  # at once, lest what others print comes in between
        time.sleep(600)
    return record

if __name__ == "__main__":
    where = Where(devices="simulated:2", pool_dir=sys.argv[1])
    try:
        for result in parallel_map(itertools.count(), function=work, pool=where, start_method=sys.argv[2]):
            os.write(1, b"result %d\\n" % result)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
"""


@pytest.fixture
def program(tmp_path: Path, pool: Where) -> Iterator[Callable[[str], tuple[Any, list[psutil.Process]]]]:
    (tmp_path / "program.py").write_text(PROGRAM)
    started: list[subprocess.Popen[bytes]] = []

    def start(method: str) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
        me = os.getpid()
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(pool.pool_dir), method],
            env={**os.environ, "PYTHONPATH": str(TREE), "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: die_with_parent(me),
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line == b"busy\n":
                break
        tree: list[psutil.Process] = []

        def is_whole() -> bool:
            tree[:] = psutil.Process(process.pid).children(recursive=True)
            return len(tree) >= 7  # node, guard, server, two supervisors, two workers

        until(is_whole)
        return process, tree

    yield start
    for process in started:
        process.kill()
        print(*process.communicate())


def dead(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.mark.parametrize("method", [pytest.param("fork", marks=pytest.mark.smoke), "spawn"])
def test_a_killed_program_leaves_nothing(
    program: Callable[[str], tuple[Any, list[psutil.Process]]], pool: Where, tmp_path: Path, method: str
) -> None:
    process, tree = program(method)
    process.kill()
    process.wait()
    until(lambda: dead(tree), seconds=60)
    until(lambda: leased(pool) == 0, seconds=60)
    until(lambda: not list(tmp_path.glob("gpu-launcher-*")), seconds=60)


def test_ctrl_c_ends_the_workers_and_then_the_program(
    program: Callable[[str], tuple[Any, list[psutil.Process]]], pool: Where, tmp_path: Path
) -> None:
    process, tree = program("fork")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=500)
    assert b"interrupted" in out
    assert err.count(b"KeyboardInterrupt") == 1, err
    assert process.returncode == -signal.SIGINT
    assert dead(tree)
    assert leased(pool) == 0
    assert not list(tmp_path.glob("gpu-launcher-*"))


def test_ctrl_c_in_the_middle_of_the_results_ends_the_workers(pool: Where, tmp_path: Path) -> None:
    program = os.getpid()

    def work(record: int) -> int:
        if record == 100:
            until((tmp_path / "results").exists)
            os.kill(program, signal.SIGINT)
        time.sleep(0.01)
        return os.getpid()

    pids: set[int] = set()
    results = parallel_map(itertools.count(), function=work, pool=pool)

    def iterate() -> None:
        for pid in results:
            pids.add(pid)
            (tmp_path / "results").touch()

    with pytest.raises(KeyboardInterrupt):
        iterate()
    results.close()
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert leased(pool) == 0
