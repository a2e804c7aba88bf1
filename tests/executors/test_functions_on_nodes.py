"""PoolExecutor and parallel_map on several nodes, each with a pool of its own: as on one machine."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher import PoolExecutor, RecordError, WorkerDiedError, parallel_map
from gpu_launcher.errors import JobError, JobTimeoutError, NodeStartError, OptionError, SetupError, UnpicklableError
from gpu_launcher.jobs.where import Where
from gpu_launcher.nodes import group_loop
from gpu_launcher.processes.exceptions import RemoteTraceback
from tests.waiting import until

TWO_EACH = Where("simulated:2")
PATIENCE = 100.0

# Functions are defined inside functions: a node cannot import this module.


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, thread or file of an executor that was shut down."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(tmp_path / "pool-here"))
    yield
    gc.collect()
    until(lambda: not psutil.Process().children())
    until(lambda: threading.active_count() == 1)
    assert list(temporary.iterdir()) == []


def node(directory: Path, name: str) -> str:
    return f"command:env GPU_LAUNCHER_POOL_DIR={directory}/pool-{name}"


@pytest.fixture(params=["with local", "without local"])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return ["local" if request.param == "with local" else node(tmp_path, "a"), node(tmp_path, "b")]


@pytest.fixture
def executor(nodes: list[str]) -> Iterator[PoolExecutor]:
    with PoolExecutor(pool=TWO_EACH, nodes=nodes) as executor:
        yield executor


def meeting(directory: Path, count: int) -> Callable[[int], str]:
    """A function that returns when so many calls run at the same time. It returns the pool of its node."""

    def meet(number: int) -> str:
        (directory / f"began-{number}").touch()
        deadline = time.monotonic() + PATIENCE
        while len(list(directory.glob("began-*"))) < count:
            assert time.monotonic() < deadline, "the calls do not run at the same time"
            time.sleep(0.01)
        return os.environ["GPU_LAUNCHER_POOL_DIR"].rpartition("/")[2]

    return meet


# Calls


@pytest.mark.smoke
def test_calls_and_records_run_on_two_nodes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pool": TWO_EACH, "nodes": ["local", node(tmp_path, "b")]}
    with PoolExecutor(**options) as executor:
        assert len(set(executor.map(meeting(tmp_path, 4), range(4)))) == 2
    results = parallel_map(range(1000), function=lambda record: record + 1, progress=False, **options)
    assert list(results) == list(range(1, 1001))


def test_results_are_those_of_one_machine(executor: PoolExecutor) -> None:
    assert list(executor.map(lambda number: number**2, range(30))) == [number**2 for number in range(30)]
    assert list(executor.map(pow, [2, 3, 4], [5, 6, 7], chunksize=2)) == [32, 729, 16384]
    assert executor.submit(dict, [("a", 1)], b=2).result() == {"a": 1, "b": 2}


def test_calls_run_on_all_nodes_at_the_same_time(executor: PoolExecutor, tmp_path: Path) -> None:
    pools = list(executor.map(meeting(tmp_path, 4), range(4)))
    assert sorted(pools) in (["pool-a", "pool-a", "pool-b", "pool-b"], ["pool-b", "pool-b", "pool-here", "pool-here"])


def test_an_exception_is_raised_as_it_was(executor: PoolExecutor) -> None:
    class OwnError(Exception):
        pass

    def fail(number: int) -> None:
        raise OwnError("bad luck", number)

    with pytest.raises(OwnError) as raised:
        executor.submit(fail, 7).result()
    assert raised.value.args == ("bad luck", 7)
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    with pytest.raises(SystemExit):
        executor.submit(sys.exit, 3).result()


def test_a_call_that_dies_fails_alone(executor: PoolExecutor) -> None:
    calls = [executor.submit(abs, -number) for number in range(4)]
    with pytest.raises(JobError, match=r"\(_exit\) ended with exit code 3"):
        executor.submit(os._exit, 3).result()
    with pytest.raises(UnpicklableError, match="Remedy"):
        executor.submit(threading.Lock).result()
    with pytest.raises(UnpicklableError, match="Remedy"):
        executor.submit(abs, threading.Lock()).result()
    assert [call.result() for call in calls] == [0, 1, 2, 3]


def test_small_calls_pass_large_arguments_and_results(executor: PoolExecutor, tmp_path: Path) -> None:
    release = tmp_path / "release"

    def backwards(data: bytes) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while not release.exists():  # until small calls have passed the large argument, and a result
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return data[::-1]

    data = os.urandom(50 * 2**20)
    large = executor.submit(backwards, data)
    results = list(executor.map(abs, range(-10, 0)))
    assert not large.done()
    release.touch()
    results += list(executor.map(abs, range(-10, 0)))
    assert results == [*range(10, 0, -1)] * 2
    assert large.result() == data[::-1]


def test_calls_that_have_not_begun_can_be_cancelled(nodes: list[str], tmp_path: Path) -> None:
    def wait() -> int:
        (tmp_path / f"began-{os.getpid()}").touch()
        while not (tmp_path / "go on").exists():
            time.sleep(0.01)
        return 1

    with PoolExecutor(pool=TWO_EACH, nodes=nodes, max_workers=2) as executor:
        running = [executor.submit(wait) for _ in range(2)]
        until(lambda: len(list(tmp_path.glob("began-*"))) == 2, seconds=PATIENCE)
        until(lambda: all(call.running() for call in running))
        waiting = [executor.submit(wait) for _ in range(10)]
        assert not any(call.cancel() for call in running)
        assert waiting[3].cancel()
        executor.shutdown(wait=False, cancel_futures=True)
        until(lambda: all(call.cancelled() for call in waiting))
        (tmp_path / "go on").touch()
        assert [call.result() for call in running] == [1, 1]
        with pytest.raises(CancelledError):
            waiting[0].result()
    assert len(list(tmp_path.glob("began-*"))) == 2


def test_no_more_calls_are_made_at_once_than_there_are_open_files_for(
    nodes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(number: int) -> int:
        mine = tmp_path / f"running-{number}"
        mine.touch()
        time.sleep(0.3)
        running = len(list(tmp_path.glob("running-*")))
        mine.unlink()
        return running

    def limit(_: int) -> tuple[int, int]:
        used = len(list(Path("/proc/self/fd").iterdir()))
        return used + group_loop.SPARE_DESCRIPTORS + 2 * 2, -1

    monkeypatch.setattr(resource, "getrlimit", limit)
    with PoolExecutor(pool=TWO_EACH, nodes=nodes) as executor:
        assert max(executor.map(work, range(12))) <= 2


def test_a_call_has_as_many_devices_and_as_much_time_as_it_was_given(nodes: list[str]) -> None:
    with PoolExecutor(gpus=2, timeout=5, pool=TWO_EACH, nodes=nodes) as executor:
        assert executor.submit(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).result() == "0,1"
        with pytest.raises(JobTimeoutError):
            executor.submit(time.sleep, 600).result()


def test_functions_classes_and_exceptions_of_a_script_are_those_of_the_program(
    tmp_path: Path, nodes: list[str]
) -> None:
    program = """
import sys
from gpu_launcher import PoolExecutor, parallel_map
from gpu_launcher.jobs.where import Where

class OwnError(Exception): pass
class Value:
    def __init__(self, number): self.number = number

def twice(value):
    assert isinstance(value, Value)
    if value.number > 5:
        raise OwnError(value.number)
    return Value(2 * value.number)

if __name__ == "__main__":
    options = {"pool": Where("simulated:2"), "nodes": sys.argv[1:]}
    with PoolExecutor(**options) as executor:
        results = list(executor.map(twice, map(Value, range(5))))
        assert all(type(result) is Value for result in results), results
        try:
            executor.submit(twice, Value(6)).result()
        except OwnError as error:
            print(error, [result.number for result in results])
    results = list(parallel_map([Value(number) for number in range(5)], function=twice, progress=False, **options))
    assert all(type(result) is Value for result in results), results
    try:
        list(parallel_map([Value(6)], function=twice, progress=False, **options))
    except OwnError as error:
        print(error, [result.number for result in results])
"""
    (tmp_path / "script.py").write_text(program)
    for how in ("script.py",), ("-c", program):
        done = subprocess.run(
            [sys.executable, *how, *nodes], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert (done.returncode, done.stdout) == (0, "6 [0, 2, 4, 6, 8]\n" * 2), done.stderr


def test_an_executor_of_a_thread_that_has_ended_keeps_its_nodes(nodes: list[str]) -> None:
    with PoolExecutor(pool=TWO_EACH, nodes=nodes) as executor:
        first: list[int] = []
        thread = threading.Thread(target=lambda: first.append(executor.submit(os.getppid).result()))
        thread.start()
        thread.join()
        agents = {child.pid for child in psutil.Process().children()}
        assert list(executor.map(abs, range(8))) == list(range(8))
        assert {child.pid for child in psutil.Process().children()} == agents


@pytest.mark.parametrize("wrong", [[], 3, ["ssh:"], "nowhere"])
def test_invalid_nodes_are_refused(wrong: Any) -> None:
    for make in (lambda: PoolExecutor(nodes=wrong), lambda: parallel_map([1], function=abs, nodes=wrong)):
        with pytest.raises(OptionError) as raised:
            make()
        assert raised.value.option == "nodes"


def test_without_any_usable_node_the_error_says_why() -> None:
    why = r"no node can run jobs: false .*exit status 1"
    with PoolExecutor(nodes="command:false") as executor, pytest.raises(NodeStartError, match=why):
        executor.submit(abs, 1)
    with pytest.raises(NodeStartError, match="false"):
        parallel_map([1], function=abs, nodes="command:false")


# Records


def test_parallel_map_returns_what_it_returns_on_one_machine(nodes: list[str]) -> None:
    def setup() -> tuple[int, int]:
        return 3, 1

    def function(record: int, factor: int, more: int) -> int:
        return record * factor + more

    results = parallel_map(range(10_000), setup, function, pool=TWO_EACH, nodes=nodes, progress=False)
    assert list(results) == [3 * record + 1 for record in range(10_000)]
    unordered = parallel_map(range(1000), setup, function, pool=TWO_EACH, nodes=nodes, progress=False, ordered=False)
    assert sorted(unordered) == [3 * record + 1 for record in range(1000)]


def test_workers_run_on_all_nodes_and_each_sets_itself_up_once(nodes: list[str], tmp_path: Path) -> None:
    def setup() -> str:
        (tmp_path / f"setup-{os.getpid()}").touch()
        return "ready"

    meet = meeting(tmp_path, 4)
    pools = list(
        parallel_map(range(4), setup, lambda record, ready: meet(record), pool=TWO_EACH, nodes=nodes, progress=False)
    )
    assert len(set(pools)) == 2
    assert len(list(tmp_path.glob("setup-*"))) == 4


def test_the_number_of_workers_holds_over_all_nodes(nodes: list[str]) -> None:
    pids = parallel_map(
        range(200), lambda: os.getpid(), lambda record, pid: pid, 1, pool=TWO_EACH, nodes=nodes, progress=False
    )
    assert len(set(pids)) == 1


def test_a_record_at_which_workers_die_is_found(nodes: list[str], tmp_path: Path) -> None:
    def function(record: int) -> int:
        if record == 77:
            os._exit(3)
        return record

    options: dict[str, Any] = {"pool": TWO_EACH, "nodes": nodes, "progress": False}
    results = list(parallel_map(range(200), function=function, on_error="return", **options))
    failed = results[77]
    assert isinstance(failed, RecordError)
    assert isinstance(failed.exception, WorkerDiedError)
    assert [result for result in results if result is not failed] == [n for n in range(200) if n != 77]


def test_errors_of_records_and_of_setup_are_raised_as_they_were(nodes: list[str]) -> None:
    class OwnError(Exception):
        pass

    def fail(*_: object) -> None:
        raise OwnError("bad luck")

    options: dict[str, Any] = {"pool": TWO_EACH, "nodes": nodes, "progress": False}
    with pytest.raises(OwnError) as raised:
        list(parallel_map([1], function=fail, **options))
    assert isinstance(raised.value.__cause__, RecordError)
    with pytest.raises(OwnError) as raised:
        list(parallel_map([1], fail, abs, **options))
    assert isinstance(raised.value.__cause__, SetupError)


def test_large_records_and_results_arrive(nodes: list[str]) -> None:
    records = [os.urandom(3 * 2**20) for _ in range(8)]
    results = parallel_map(records, function=lambda record: record[::-1], pool=TWO_EACH, nodes=nodes, progress=False)
    assert list(results) == [record[::-1] for record in records]


def test_leaving_the_loop_ends_the_workers(nodes: list[str], tmp_path: Path) -> None:
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    with parallel_map(endless(), function=abs, pool=TWO_EACH, nodes=nodes, progress=False) as results:
        for expected in range(2000):
            assert next(results) == expected


def test_what_cannot_be_sent_to_nodes_is_named(nodes: list[str]) -> None:
    lock = threading.Lock()

    def function(record: int) -> int:
        with lock:
            return record

    with pytest.raises(OptionError, match="lock") as raised:
        parallel_map([1], function=function, pool=TWO_EACH, nodes=nodes)
    assert raised.value.option == "function"
