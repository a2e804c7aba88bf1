"""`parallel_map` in the hands of somebody who got something wrong: what is said, and that it helps."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from gpu_launcher.errors import OptionError, RecordError, SetupError, UnpicklableError, UnreadableError, WorkerDiedError
from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.executors.pool_executor import PoolExecutor
from gpu_launcher.executors.record_worker import MAX_TOGETHER
from gpu_launcher.jobs.where import Where
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from tests.waiting import until

TREE = Path(__file__).parents[2]


def causes(error: BaseException) -> list[BaseException]:
    """The error and its causes, of which there are few."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        assert cause not in chain, "it is its own cause"
        chain.append(cause)
    return chain


# What functions raise that would mean something else here


def leave(record: int) -> None:
    sys.exit("bye")


def interrupt(record: int) -> None:
    raise KeyboardInterrupt


def exhaust(record: int) -> int:
    none: Iterator[int] = iter(())
    return next(none)


@pytest.mark.parametrize(
    ("function", "kind"), [(leave, SystemExit), (interrupt, KeyboardInterrupt), (exhaust, StopIteration)]
)
def test_what_cannot_be_raised_here_is_the_exception_of_a_record_error(pool: Where, function: Any, kind: type) -> None:
    with pytest.raises(RecordError, match=rf"record 0 \(7\) failed on .*(?s:.*){kind.__name__}") as caught:
        list(parallel_map([7], function=function, pool=pool))
    assert type(caught.value.exception) is kind
    assert causes(caught.value) == [caught.value]


def test_a_setup_that_raises_stop_iteration_says_so(pool: Where) -> None:
    with pytest.raises(SetupError, match=r"setup failed on .*(?s:.*)StopIteration") as caught:
        list(parallel_map([1], setup=lambda: next(iter(())), function=lambda record, model: record, pool=pool))
    assert causes(caught.value) == [caught.value]


# What cannot be sent back


def some_locks(record: int) -> Any:
    return [threading.Lock()] if record % 3 == 2 else record


def lazily(record: int) -> Iterator[int]:
    return (number for number in range(record))


async def soon(record: int = 0) -> int:
    return record


def unawaited(record: int) -> Any:
    return soon(record)


@pytest.mark.parametrize(
    ("function", "index", "reason"),
    [
        (some_locks, 2, r"TypeError: cannot pickle '_thread\.lock' object \(found at the value\[0\]\)\. Remedy"),
        (lazily, 0, r"TypeError: cannot pickle 'generator' object\. Remedy: return a list"),
        (unawaited, 0, r"TypeError: cannot pickle 'coroutine' object\. Remedy: .*asyncio\.run"),
    ],
)
def test_a_result_that_cannot_be_sent_back_is_named_with_a_remedy(
    pool: Where, function: Any, index: int, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = rf"^the result of records\[{index}\] cannot be sent back: {reason}"
    with pytest.raises(UnpicklableError, match=said) as caught:
        list(parallel_map(range(9), function=function, pool=pool))
    assert isinstance(caught.value.__cause__, RecordError)
    assert f"the result of records[{index}]" in str(caught.value.__cause__)
    assert "record_worker.py" not in str(caught.value.__cause__)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("function", [lazily, unawaited])
def test_an_executor_says_what_to_do_about_such_values(
    pool: Where, function: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with PoolExecutor(pool=pool) as executor:  # type: ignore[arg-type]
        error = executor.submit(function, 1).exception()
        asynchronous = executor.submit(soon).exception()
    assert isinstance(error, UnpicklableError)
    assert re.search(r"\(\) returned what cannot be pickled: TypeError: .* Remedy: .*(a list|asyncio\.run)", str(error))
    assert re.match(r"soon\(\) returned .* Remedy: an `async def` function only returns", str(asynchronous))
    assert capfd.readouterr().err == ""


# Options


async def later() -> Any:
    yield 1


def numbers() -> Iterator[int]:
    yield 1


class Asynchronous:
    async def __call__(self, record: int) -> int:
        return record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": soon}, r"function: soon is asynchronous.*`lambda record: asyncio\.run\(soon\(record\)\)`"),
        ({"function": functools.partial(soon, 1)}, "function: partial is asynchronous"),
        ({"function": Asynchronous()}, "function: Asynchronous is asynchronous"),
        ({"setup": soon}, r"setup: soon is asynchronous.*`lambda: asyncio\.run\(soon\(\)\)`"),
        ({"function": later}, "function: later is asynchronous"),
        ({"function": numbers}, "function: numbers has a `yield`.* Remedy: return a list"),
        ({"setup": abs, "function": None}, "function: is missing.*the second argument is `setup`"),
        ({"ordered": "no"}, "ordered: must be True or False, got 'no'"),
        ({"progress": 1}, "progress: must be True or False, got 1"),
        ({"total": -4}, "total: must be an integer >= 0, got -4"),
        ({"total": "many"}, "total: must be an integer >= 0, got 'many'"),
        ({"start_method": "thread"}, "start_method: must be one of auto, fork, spawn, got 'thread'"),
        (
            {"records": numbers},
            r"records: <function numbers .* is a function: call it, as in `parallel_map\(numbers\(\)",
        ),
        ({"records": 5}, "records: 5 is a single int: give a list"),
        ({"records": None}, "records: None is"),
        ({"records": later()}, "records: <async_generator .* is asynchronous"),
    ],
)
def test_options_that_make_no_sense_are_named_with_a_remedy(pool: Where, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parallel_map(**{"records": [1], "function": abs, "pool": pool, **options})


def test_what_the_records_raise_when_they_are_begun_is_raised(pool: Where) -> None:
    class Records:
        def __iter__(self) -> Iterator[int]:
            raise TypeError("no file")

    with pytest.raises(TypeError, match="no file"):
        parallel_map(Records(), function=abs, pool=pool)


# The program is killed while it waits for what it holds itself

WAITS_FOR_ITSELF = """
import pathlib, sys
import gpu_launcher

def touch(record):
    pathlib.Path(sys.argv[1]).touch()

pool = gpu_launcher.Pool(devices="simulated:1")
with pool.lease():
    if sys.argv[2] == "parallel_map":
        list(gpu_launcher.parallel_map([1], function=touch, pool=pool))
    else:
        with gpu_launcher.PoolExecutor(pool=pool) as executor:
            executor.submit(touch, 1).result()
"""


def standing(ledger: FileLedger) -> tuple[int, int]:
    """How many leases and tickets there are."""
    view = ledger.snapshot()
    return len(view.leases), len(view.tickets)


@pytest.mark.parametrize("what", ["parallel_map", "executor"])
def test_a_lease_that_is_freed_by_the_programs_death_goes_to_none_of_its_workers(tmp_path: Path, what: str) -> None:
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PYTHONPATH": str(TREE)}
    for _ in range(4):
        command = [sys.executable, "-c", WAITS_FOR_ITSELF, str(tmp_path / "touched"), what]
        with (
            (tmp_path / "err").open("wb") as err,
            subprocess.Popen(command, env=environment, stderr=err) as program,
            FileLedger(resolve_pool_directory(str(tmp_path / "pool"))) as ledger,
        ):
            until(lambda ledger=ledger: standing(ledger) == (1, 1))
            program.send_signal(signal.SIGKILL)
            program.wait()
            until(lambda ledger=ledger: standing(ledger) == (0, 0))
        said = (tmp_path / "err").read_text()
        assert [line for line in said.splitlines() if not line.startswith(("waiting for", "1 device is simul"))] == []
        assert not (tmp_path / "touched").exists()


# Few open files

MORE_THAN_FILES = """
import resource, sys, time
import gpu_launcher

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
if sys.argv[1] == "parallel_map":
    work = lambda number: time.sleep(0.05) or number
    print(sum(gpu_launcher.parallel_map(range(200), function=work, gpus=0, num_workers=64)))
else:
    with gpu_launcher.PoolExecutor(gpus=0, max_workers=64) as executor:
        futures = [executor.submit(lambda number=number: time.sleep(0.05) or number) for number in range(100)]
        print(sum(future.result() for future in futures))
"""


@pytest.mark.parametrize(("what", "expected"), [("parallel_map", "19900"), ("executor", "4950")])
def test_calls_for_which_there_are_no_files_wait_for_others_to_end(tmp_path: Path, what: str, expected: str) -> None:
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PYTHONPATH": str(TREE)}
    command = [sys.executable, "-c", MORE_THAN_FILES, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert (done.stdout.strip(), done.returncode) == (expected, 0), done.stderr
    assert "open files" not in done.stderr


def test_a_call_for_which_there_are_no_files_is_cancelled_with_the_others(tmp_path: Path) -> None:
    script = """
import resource, time
import gpu_launcher

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for _ in gpu_launcher.parallel_map(range(65), function=lambda number: time.sleep(0.3), gpus=0, num_workers=64):
    pass
print("done")
"""
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PYTHONPATH": str(TREE)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
    assert "worker" not in done.stderr


# Exceptions that cannot travel


class OnlyThere(Exception):
    """Can be read only in the process that made it."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        if pid != os.getpid():
            raise ValueError("elsewhere")


def of_an_odd_class(record: int) -> None:
    class OddError(Exception):
        lock = threading.Lock()

    raise OddError("1 and 2")


def only_there(record: int) -> None:
    raise OnlyThere(os.getpid())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (of_an_odd_class, r"OddError: 1 and 2\. The exception itself cannot be pickled \(TypeError: .*\)\. Remedy: "),
        (only_there, r"OnlyThere: \d+\. The exception itself cannot be unpickled in this process \(ValueError: else"),
    ],
)
def test_an_exception_that_cannot_travel_is_told_in_the_same_words_everywhere(
    pool: Where, function: Any, said: str
) -> None:
    with PoolExecutor(pool=pool) as executor:  # type: ignore[arg-type]
        assert re.search(said, str(executor.submit(function, 1).exception()))
    with pytest.raises(UnreadableError, match=said):
        list(parallel_map([1], function=function, pool=pool))
    with pytest.raises(UnreadableError, match=said):
        list(parallel_map([1], setup=functools.partial(function, 1), function=abs, pool=pool))


class Singular(Exception):
    def __reduce__(self) -> Any:
        return str, ("singular",)


def test_an_exception_that_would_become_something_else_does_not(pool: Where) -> None:
    def work(record: int) -> None:
        raise Singular

    with pytest.raises(Singular):
        list(parallel_map([1], function=work, pool=pool))


# Never iterated over


@pytest.mark.parametrize("how", ["dropped", "closed", "with"])
def test_one_that_nobody_iterates_over_says_that_nothing_was_called(
    pool: Where, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    results = parallel_map([1], function=abs, pool=pool)
    if how == "closed":
        results.close()
    elif how == "with":
        with results:
            pass
    del results
    gc.collect()
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.match(r"parallel_map was not iterated over, so that nothing was called: .* Remedy: ", said)


def test_one_that_is_left_for_another_reason_says_nothing(pool: Where, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), parallel_map([1], function=abs, pool=pool):
        raise ZeroDivisionError
    for _ in parallel_map([1, 2], function=abs, pool=pool):
        break
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == []


def test_a_forgotten_one_is_told_of_at_the_end_of_the_program_and_by_no_fork_of_it(tmp_path: Path) -> None:
    script = """
import os
import gpu_launcher

results = gpu_launcher.parallel_map([1], function=print, pool=gpu_launcher.Pool(devices="cpu:2"))
if os.fork() == 0:
    raise SystemExit
os.wait()
"""
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PYTHONPATH": str(TREE)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert (done.stdout, done.returncode) == ("", 0)
    assert done.stderr.count("parallel_map was not iterated over") == 1


# Records that are so quick that several are begun at once


def in_places(record: int) -> int:
    if record % 1000 == 999:
        raise StopIteration
    if record % 777 == 776:
        raise ValueError(record)
    return -record


def test_each_of_many_quick_records_that_fail_is_known(pool: Where) -> None:
    results = list(parallel_map(range(50_000), function=in_places, gpus=0, on_error="return", pool=pool))
    assert len(results) == 50_000
    for record, result in enumerate(results):
        if record % 1000 == 999 or record % 777 == 776:
            assert isinstance(result, RecordError)
            assert (result.index, result.record) == (record, record)
            assert type(result.exception) is (StopIteration if record % 1000 == 999 else ValueError)
        else:
            assert result == -record


def test_a_quick_record_that_kills_its_workers_is_found_among_the_others(pool: Where) -> None:
    def deadly(record: int) -> int:
        if record == 33_333:
            os.kill(os.getpid(), signal.SIGKILL)
        return -record

    results = list(parallel_map(range(50_000), function=deadly, gpus=0, on_error="return", pool=pool))
    assert isinstance(results[33_333].exception, WorkerDiedError)
    assert "as had the one before, which was at it, too" in str(results[33_333])
    results[33_333] = -33_333
    assert results == [-record for record in range(50_000)]


def test_results_wait_for_few_slow_records_that_were_begun_with_quick_ones(pool: Where, tmp_path: Path) -> None:
    begun = mmap.mmap(-1, 8)

    def slow_in_the_end(record: int) -> int:
        begun[:8] = record.to_bytes(8, "little")
        if record >= 20_000:
            time.sleep(0.1)  # longer than results are kept
        return record

    found = parallel_map(range(20_100), function=slow_in_the_end, gpus=0, num_workers=1, start_method="fork", pool=pool)
    with found:
        aheads = [int.from_bytes(begun[:8], "little") - result for result in itertools.islice(found, 20_040)]
    assert max(aheads[20_000:]) <= 2 * MAX_TOGETHER
    assert median(aheads[20_000 + MAX_TOGETHER :]) <= 1, "they are known to be slow"


def test_a_worker_that_dies_once_at_quick_records_costs_nothing(pool: Where, tmp_path: Path) -> None:
    killed = tmp_path / "killed"

    def unlucky(record: int) -> int:
        if record == 33_333 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return -record

    results = list(parallel_map(range(50_000), function=unlucky, gpus=0, pool=pool))
    assert killed.exists()
    assert results == [-record for record in range(50_000)]
