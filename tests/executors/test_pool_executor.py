"""PoolExecutor, with real processes on simulated devices. What all executors do, CPython's own tests say."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, as_completed
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher import Pool, PoolExecutor
from gpu_launcher.errors import JobError, JobTimeoutError, OptionError, PoolDirectoryError, UnpicklableError
from gpu_launcher.jobs import notice_log, where
from gpu_launcher.jobs.where import Where
from tests.waiting import until

METHODS = ["fork", "spawn"]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, thread or file of an executor that was shut down."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    gc.collect()
    until(lambda: not psutil.Process().children())
    until(lambda: threading.active_count() == 1)
    assert list(temporary.iterdir()) == []


def visible() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def touch_and_wait(directory: Path, name: str = "begun") -> int:
    (directory / name).touch()
    until((directory / "go on").exists)
    return os.getpid()


# Values and devices.


def test_each_call_has_a_process_and_devices_of_its_own(pool: Where) -> None:
    with PoolExecutor(pool=pool) as executor:
        calls = [(executor.submit(os.getpid), executor.submit(visible)) for _ in range(5)]
        assert len({pid.result() for pid, _ in calls} | {os.getpid()}) == 6
        assert {devices.result() for _, devices in calls} <= {"0", "1"}


def test_a_call_gets_as_many_devices_as_it_asks_for(pool: Where) -> None:
    with PoolExecutor(gpus=2, pool=pool) as executor:
        assert executor.submit(visible).result() == "0,1"
    with PoolExecutor(gpus=0, pool=pool) as executor:
        assert executor.submit(visible).result() == ""


def test_calls_share_a_device_by_memory_or_by_fraction(tmp_path: Path) -> None:
    pool = Where("simulated:1", tmp_path / "pool")
    for share in ({"memory": "20GiB"}, {"gpus": 0.5}):
        go_on = tmp_path / "go on"
        with PoolExecutor(pool=pool, **share) as executor:
            calls = [executor.submit(touch_and_wait, tmp_path, f"begun-{number}") for number in range(2)]
            until(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
            go_on.touch()
            assert len({call.result() for call in calls}) == 2
        for file in (go_on, *tmp_path.glob("begun-*")):
            file.unlink()


@pytest.mark.parametrize("gpus", [0, 1])
def test_no_more_calls_run_than_there_are_workers(pool: Where, tmp_path: Path, gpus: int) -> None:
    with PoolExecutor(gpus=gpus, max_workers=1, pool=pool) as executor:
        calls = [executor.submit(touch_and_wait, tmp_path, f"begun-{number}") for number in range(3)]
        until(lambda: list(tmp_path.glob("begun-*")))
        time.sleep(0.3)
        assert len(list(tmp_path.glob("begun-*"))) == 1
        (tmp_path / "go on").touch()
        assert len({call.result() for call in calls}) == 3


def test_without_devices_any_number_of_workers_may_run(pool: Where, tmp_path: Path) -> None:
    with PoolExecutor(gpus=0, max_workers=12, pool=pool) as executor:
        for number in range(12):
            executor.submit(touch_and_wait, tmp_path, f"begun-{number}")
        until(lambda: len(list(tmp_path.glob("begun-*"))) == 12)
        (tmp_path / "go on").touch()


@pytest.mark.parametrize("method", METHODS)
def test_large_arguments_and_values_arrive(pool: Where, method: Any) -> None:
    with PoolExecutor(pool=pool, start_method=method) as executor:
        data = os.urandom(16 * 2**20)
        assert executor.submit(bytes.__add__, data, data).result() == data + data
        assert list(executor.map(len, [data] * 3)) == [len(data)] * 3


# What programs define.

PROGRAM = """
import os, sys
from dataclasses import dataclass
from gpu_launcher import PoolExecutor
from gpu_launcher.jobs.where import Where

@dataclass
class Point:
    x: int

class Wrong(Exception):
    pass

def twice(point):
    return Point(2 * point.x)

def fail(point):
    raise Wrong(point)

def recurse(executor_method, depth):
    with PoolExecutor(gpus=0, max_workers=1, pool=Where("simulated:2"), start_method=executor_method) as executor:
        return depth if depth == 2 else executor.submit(recurse, executor_method, depth + 1).result()

if __name__ == "__main__":
    executor = PoolExecutor(pool=Where("simulated:2"), start_method=sys.argv[1])
    assert executor.submit(twice, Point(1)).result() == Point(2)

    def later(point):  # which the jobs do not know by name
        return twice(point).x

    @dataclass
    class Later:
        x: int

    assert executor.submit(later, Point(3)).result() == 6
    value = executor.submit(lambda point: Later(point.x), Later(4)).result()
    assert value == Later(4) and type(value) is Later
    error = executor.submit(fail, Point(5)).exception()
    assert type(error) is Wrong and error.args == (Point(5),), error
    line = fail.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in fail\\n    raise Wrong(point)\\n' in str(error.__cause__)
    assert executor.submit(recurse, sys.argv[1], 0).result() == 2
    executor.submit(print, "printed by a call").result()
    print("done", flush=True)
    executor.submit(os.system, "sleep 0.2; echo printed at the end")
"""


def run(program: str, tmp_path: Path, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "TMPDIR": tempfile.gettempdir()}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(script), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, **streams, **more)


@pytest.mark.parametrize("method", METHODS)
def test_whatever_a_program_defines_arrives_and_its_calls_print_where_it_does(tmp_path: Path, method: str) -> None:
    process = run(PROGRAM, tmp_path, method)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert out.splitlines() == ["printed by a call", "done", "printed at the end"]
    assert err == ""


# What goes wrong in a call.


class TwoArguments(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class HasALock(Exception):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.lock = threading.Lock()


class Breaks:
    """Cannot be unpickled in another process than `home`, or in `home`."""

    def __init__(self, home: int, there: bool) -> None:
        self.home = home
        self.there = there

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (os.getpid() == state["home"]) is not state["there"]:
            raise ValueError("it breaks")


def throw(error: BaseException) -> None:
    raise error


def chain() -> None:
    try:
        {}["missing"]
    except KeyError as error:
        raise ValueError("because of that") from error


def test_an_exception_is_that_of_the_call_with_its_traceback_as_cause(pool: Where, frame_of: Any) -> None:
    with PoolExecutor(pool=pool) as executor:
        error = executor.submit(chain).exception()
        assert (type(error), error.args) == (ValueError, ("because of that",))
        cause = str(error.__cause__)
        assert re.search(r"KeyError: 'missing'\n\nThe above exception was the direct cause", cause)
        assert frame_of(__file__, "chain", 'raise ValueError("because of that") from error') in cause
        assert "executors/calls.py" not in cause
        assert type(executor.submit(sys.exit, 3).exception()) is SystemExit


def test_an_exception_that_cannot_travel_as_a_whole_is_of_its_type_all_the_same(pool: Where) -> None:
    with PoolExecutor(pool=pool) as executor:

        def without_a_way() -> None:
            throw(TwoArguments("a", "b"))

        for function, kind, args in (
            (without_a_way, TwoArguments, ("a b",)),
            (lambda: throw(HasALock(1)), HasALock, (1,)),
        ):
            error = executor.submit(function).exception()
            assert (type(error), error.args) == (kind, args)
            assert f"{kind.__name__}: {error}" in str(error.__cause__)
            assert not hasattr(error, "lock"), "what cannot travel stays behind"


def die(signum: int) -> None:
    signal.raise_signal(signum)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (os._exit, (3,), "exit code 3"),
        (os._exit, (0,), "exit code 0"),
        (die, (signal.SIGABRT,), "SIGABRT"),
        (die, (signal.SIGSEGV,), "SIGSEGV"),
        (die, (signal.SIGKILL,), "SIGKILL"),
        (die, (signal.SIGTERM,), "SIGTERM"),
    ],
)
def test_a_process_that_dies_fails_its_own_call_only(
    pool: Where, tmp_path: Path, function: Callable[..., None], arguments: tuple[Any, ...], said: str
) -> None:
    with PoolExecutor(pool=pool) as executor:
        other = executor.submit(touch_and_wait, tmp_path)
        until((tmp_path / "begun").exists)
        error = executor.submit(function, *arguments).exception()
        assert type(error) is JobError
        assert re.search(rf"job 1 \({function.__name__}\) .*{said}.* on simulated GPU ", str(error))
        assert executor.submit(abs, -1).result() == 1
        (tmp_path / "go on").touch()
        assert other.result() != os.getpid()


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_pickled_is_named_with_the_remedy(pool: Where, method: Any) -> None:
    with PoolExecutor(pool=pool, start_method=method) as executor:
        lock = threading.Lock()
        error = executor.submit(len, lock).exception()
        assert isinstance(error, UnpicklableError)
        assert isinstance(error, pickle.PicklingError)
        assert re.search(
            r"len\(\) cannot be called in another process: TypeError: .*lock.*args\[0\]\)\. Remedy: pass", str(error)
        )
        assert isinstance(error.__cause__, TypeError)

        def uses_the_lock() -> None:
            lock.acquire()

        error = executor.submit(uses_the_lock).exception()
        assert isinstance(error, UnpicklableError)
        assert "uses_the_lock() cannot be called in another process" in str(error)
        assert "(found at lock, a variable that uses_the_lock() uses from around it)" in str(error)
        error = executor.submit(threading.Lock).exception()
        assert isinstance(error, UnpicklableError)
        assert re.search(r"returned what cannot be pickled: TypeError: .*lock.* Remedy: return", str(error))
        assert executor.submit(abs, -1).result() == 1


USES_A_GLOBAL_LOCK = """
import sys, threading
import gpu_launcher
lock = threading.Lock()

def locked():
    with lock:
        return 7

with gpu_launcher.PoolExecutor(gpus=0, start_method=sys.argv[1]) as executor:
    future = executor.submit(locked)
    print(future.exception() or future.result())
"""


def test_fork_is_named_where_it_makes_a_call_possible(tmp_path: Path) -> None:
    spawned, _ = run(USES_A_GLOBAL_LOCK, tmp_path, "spawn").communicate(timeout=500)
    assert "locked() cannot be called in another process" in spawned
    assert 'Or use start_method="fork": a forked call has the globals of this program already' in spawned
    forked, _ = run(USES_A_GLOBAL_LOCK, tmp_path, "fork").communicate(timeout=500)
    assert forked == "7\n"


def test_what_cannot_be_unpickled_fails_its_own_call_only(pool: Where) -> None:
    with PoolExecutor(pool=pool) as executor:
        error = executor.submit(id, Breaks(os.getpid(), there=True)).exception()
        assert type(error) is JobError
        assert "its function and arguments cannot be unpickled: ValueError: it breaks" in str(error)
        error = executor.submit(Breaks, os.getpid(), there=False).exception()
        assert type(error) is JobError
        assert "returned what cannot be unpickled in this process: ValueError: it breaks" in str(error)
        assert executor.submit(abs, -1).result() == 1


def no_large_files(size: int) -> bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return b"x" * size


def test_a_value_for_which_there_is_no_room_on_the_disk_fails_its_own_call_only(pool: Where) -> None:
    with PoolExecutor(pool=pool) as executor:
        for size in (2**22, 2**19):
            error = executor.submit(no_large_files, size).exception()
            assert type(error) is JobError
            assert re.search("returned a value that could not be handed over: .*File too large", str(error))
        assert executor.submit(abs, -1).result() == 1


def test_a_call_that_takes_too_long_is_ended(pool: Where) -> None:
    with PoolExecutor(pool=pool, timeout=3) as executor:
        error = executor.submit(time.sleep, 600).exception()
        assert type(error) is JobTimeoutError
        assert isinstance(error, TimeoutError)
        assert "job 0 (sleep) ran longer than its timeout of 3.0 s" in str(error)
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.number) == (JobTimeoutError, str(error), 0)
        assert executor.submit(abs, -1).result() == 1


# Futures, and the life of an executor.


def test_max_workers_that_leave_devices_idle_are_named(
    pool: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = "max_workers=1 leaves 1 of 2 devices idle: raise or remove it to use them"

    def is_said() -> bool:
        return said in [record.getMessage() for record in caplog.records]

    with PoolExecutor(max_workers=1, pool=pool) as executor:
        executor.submit(touch_and_wait, tmp_path)
        until((tmp_path / "begun").exists)
        assert not is_said(), "there is no work for the other device"
        executor.submit(abs, -1)
        until(is_said)
        (tmp_path / "go on").touch()


def test_a_call_that_runs_cannot_be_cancelled_and_one_that_was_cancelled_never_runs(
    pool: Where, tmp_path: Path
) -> None:
    with PoolExecutor(max_workers=1, pool=pool) as executor:
        running = executor.submit(touch_and_wait, tmp_path)
        until((tmp_path / "begun").exists)
        assert running.running()
        assert not running.cancel()
        later = [executor.submit(touch_and_wait, tmp_path, f"later-{number}") for number in range(20)]
        assert not any(future.running() for future in later)
        assert all(future.cancel() for future in later)
        assert all(future.cancelled() for future in as_completed(later, timeout=200))
        (tmp_path / "go on").touch()
    assert running.result() > 0
    assert not list(tmp_path.glob("later-*"))


def test_whenever_a_call_is_cancelled_it_either_runs_or_was_cancelled(pool: Where, tmp_path: Path) -> None:
    chance = random.Random(7)
    with PoolExecutor(pool=pool) as executor:
        futures = [executor.submit((tmp_path / f"ran-{number}").touch) for number in range(60)]
        for future in chance.sample(futures, 40):
            time.sleep(chance.random() * 0.02)
            future.cancel()
        executor.submit(abs, -1).result()
    cancelled = [future.cancelled() for future in futures]
    assert all(future.done() for future in futures)
    assert [(tmp_path / f"ran-{number}").exists() for number in range(60)] == [not was for was in cancelled]
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_calls_that_wait_for_devices_of_others_can_be_cancelled(tmp_path: Path) -> None:
    with Pool("simulated:1", tmp_path / "pool") as pool, PoolExecutor(pool=pool) as executor:
        with pool.lease():
            futures = [executor.submit((tmp_path / "ran").touch) for _ in range(5)]
            until(lambda: pool.snapshot().queue)
            assert [(future.running(), future.cancel()) for future in futures] == [(False, True)] * 5
            until(lambda: not pool.snapshot().queue)
        assert executor.submit(abs, -1).result(200) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("waiting", [False, True])
def test_shutting_down_does_not_wait_for_devices_of_others_to_cancel_calls(tmp_path: Path, waiting: bool) -> None:
    with Pool("simulated:1", tmp_path / "pool") as pool, pool.lease():
        executor = PoolExecutor(pool=pool)
        futures = [executor.submit(abs, -1) for _ in range(5)]
        if waiting:
            until(lambda: pool.snapshot().queue)
        executor.shutdown(cancel_futures=True)
        assert all(future.cancelled() for future in futures)


def test_shutting_down_lets_calls_that_have_begun_finish_and_cancels_the_others(pool: Where, tmp_path: Path) -> None:
    executor = PoolExecutor(pool=pool)
    futures = [executor.submit(touch_and_wait, tmp_path, f"begun-{number}") for number in range(5)]
    until(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
    executor.shutdown(wait=False, cancel_futures=True)
    assert len(list(as_completed(futures[2:], timeout=200))) == 3
    assert [future.cancelled() for future in futures] == [False, False, True, True, True]
    (tmp_path / "go on").touch()
    executor.shutdown()
    assert all(future.result() for future in futures[:2])


def test_tasks_that_wait_for_devices_are_cancelled_with_their_calls(pool: Where, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with PoolExecutor(max_workers=1, pool=pool) as executor:
            running = loop.run_in_executor(executor, touch_and_wait, tmp_path)
            others = [loop.run_in_executor(executor, (tmp_path / "ran").touch) for _ in range(3)]
            while not (tmp_path / "begun").exists():
                await asyncio.sleep(0.01)
            for other in others:
                other.cancel()
            (tmp_path / "go on").touch()
            await running

    asyncio.run(main())
    assert not (tmp_path / "ran").exists()


def test_values_come_as_they_are_ready_or_in_order(pool: Where, tmp_path: Path) -> None:
    with PoolExecutor(pool=pool) as executor:
        slow, fast = executor.submit(touch_and_wait, tmp_path), executor.submit(abs, -1)
        ready = as_completed([slow, fast])
        assert next(ready) is fast
        (tmp_path / "go on").touch()
        assert list(ready) == [slow]
        assert list(executor.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]


def test_a_chunk_is_one_call(pool: Where) -> None:
    with PoolExecutor(pool=pool) as executor:
        pids = list(executor.map(lambda _: os.getpid(), range(6), chunksize=3))
        assert len(set(pids[:3])) == len(set(pids[3:])) == 1
        assert pids[0] != pids[3]
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(abs, [1], chunksize=0)


def test_an_event_loop_can_wait_for_calls(pool: Where) -> None:
    async def gather() -> list[int]:
        loop = asyncio.get_running_loop()
        with PoolExecutor(pool=pool) as executor:
            return await asyncio.gather(*(loop.run_in_executor(executor, abs, -number) for number in range(5)))

    assert asyncio.run(gather()) == [0, 1, 2, 3, 4]


def test_a_call_may_be_submitted_by_the_callback_of_another_one_and_by_many_threads(pool: Where) -> None:
    with PoolExecutor(gpus=0, pool=pool) as executor:
        more: list[Any] = []
        first = executor.submit(abs, -1)
        first.add_done_callback(lambda future: more.append(executor.submit(abs, -2)))
        until(lambda: more)
        assert more[0].result() == 2
        threads = [threading.Thread(target=lambda: more.extend(executor.map(abs, range(5)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(more[1:]) == sorted(list(range(5)) * 4)


def test_after_shutdown_nothing_can_be_submitted_and_what_was_is_done(pool: Where) -> None:
    executor = PoolExecutor(pool=pool)
    futures = [executor.submit(abs, -number) for number in range(5)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    assert [future.result() for future in futures] == [0, 1, 2, 3, 4]
    executor.shutdown()
    PoolExecutor(pool=pool).shutdown()  # which was never used


def test_an_executor_that_nobody_has_any_more_finishes_and_ends(pool: Where) -> None:
    executor = PoolExecutor(pool=pool)
    futures = [executor.submit(abs, -number) for number in range(5)]
    del executor
    gc.collect()
    assert [future.result() for future in futures] == [0, 1, 2, 3, 4]
    # And the fixture sees that nothing is left.


def test_several_executors_share_the_pool_and_all_fork(pool: Where, caplog: pytest.LogCaptureFixture) -> None:
    with PoolExecutor(pool=pool) as one, PoolExecutor(pool=pool) as two:
        both = [executor.submit(abs, -number) for number in range(10) for executor in (one, two)]
        assert sorted(future.result() for future in both) == sorted(list(range(10)) * 2)
    assert "spawn" not in caplog.text


LOCK = threading.Lock()


def with_the_lock() -> str:
    with LOCK:
        return "had it"


def test_an_executor_that_is_started_during_the_callback_of_another_one_does_not_inherit_its_locks(
    pool: Where,
) -> None:
    holds, over = threading.Event(), threading.Event()

    def note(future: object) -> None:
        with LOCK:
            holds.set()
            over.wait(250)

    with PoolExecutor(pool=pool) as one, PoolExecutor(pool=pool) as two:
        one.submit(abs, -1).add_done_callback(note)
        holds.wait()
        try:
            assert two.submit(with_the_lock).result(timeout=200) == "had it"
        finally:
            over.set()


def test_a_forked_process_cannot_use_its_parents_executor(pool: Where) -> None:
    with PoolExecutor(gpus=0, pool=pool) as executor:
        executor.submit(abs, -1).result()
        ours, theirs = multiprocessing.get_context("fork").Pipe()

        def child() -> None:
            try:
                executor.submit(abs, -1)
            except RuntimeError as error:
                theirs.send(str(error))
            executor.shutdown()  # is nothing to it

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        assert "belongs to the process that this one was forked from" in ours.recv()
        process.join()
        assert process.exitcode == 0
        assert executor.submit(abs, -1).result() == 1


def test_devices_that_others_hold_are_waited_for_and_that_is_said(
    pool: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "gpu_launcher")
    monkeypatch.setattr(notice_log, "_last", -math.inf)  # nothing was said a moment ago
    with PoolExecutor(gpus=2, pool=pool) as holder, PoolExecutor(pool=pool) as executor:
        holder.submit(touch_and_wait, tmp_path)
        until((tmp_path / "begun").exists)
        waiting = executor.submit(abs, -1)
        assert not executor.submit(abs, -2).done()
        until(lambda: "waiting for devices: " in caplog.text)
        assert not waiting.done()
        (tmp_path / "go on").touch()
        assert waiting.result() == 1
    (record,) = [record for record in caplog.records if "waiting" in record.message]  # once for both
    assert (record.name, record.levelname) == ("gpu_launcher", "WARNING")
    assert re.search(r"simulated GPU 0, simulated GPU 1 held by .* #0 touch_and_wait", record.message)
    assert {record.levelname for record in caplog.records if "simulated: no real" in record.message} <= {"INFO"}


@pytest.mark.usefixtures("pause_after_ends")
def test_processes_that_a_call_left_behind_are_named_before_its_result(
    pool: Where, caplog: pytest.LogCaptureFixture
) -> None:
    with PoolExecutor(pool=pool) as executor:
        pid = executor.submit(os.spawnlp, os.P_NOWAIT, "sleep", "sleep", "300").result()
        assert caplog.text.count(f"left processes behind, which were ended: sleep 300 (pid {pid})") == 1


def test_a_wait_that_begins_soon_after_another_one_is_told_of_later_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice_log, "REPEAT_SECONDS", 3.0)  # in the process that is forked, too
    monkeypatch.setattr(notice_log, "_last", -math.inf)

    def told() -> int:
        return sum("waiting for devices: " in record.message for record in caplog.records)

    with Pool("simulated:1", tmp_path / "pool") as pool, PoolExecutor(pool=pool) as executor:
        with pool.lease():
            first = executor.submit(abs, -1)
            until(lambda: told() == 1)
        assert first.result() == 1
        with pool.lease():
            second = executor.submit(abs, -1)
            until(lambda: told() == 2)
            time.sleep(4)  # it has been said
            assert told() == 2
            assert not second.done()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": -1}, "gpus: -1"),
        ({"gpus": 1.5}, "gpus: 1.5"),
        ({"gpus": 0, "memory": "1GiB"}, "memory"),
        ({"memory": "much"}, "memory"),
        ({"timeout": 0}, "timeout"),
        ({"max_workers": 0}, "max_workers must be greater than 0"),
        ({"max_workers": "2"}, "max_workers: must be an integer >= 1, got '2'"),
        ({"start_method": "forkserver"}, "start_method: must be one of auto, fork, spawn, got 'forkserver'"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        PoolExecutor(**options)


def test_options_are_given_by_name_for_the_standard_executors_have_another_one_first() -> None:
    make: Any = PoolExecutor
    with pytest.raises(TypeError, match=r"PoolExecutor\(4\) .* PoolExecutor\(max_workers=4\).* PoolExecutor\(gpus=4\)"):
        make(4)


def test_what_the_pool_cannot_give_is_refused_at_the_first_call(tmp_path: Path) -> None:
    executor = PoolExecutor(gpus=3, pool=Where("simulated:2", tmp_path / "pool"))
    for _ in range(2):
        with pytest.raises(OptionError, match="gpus"):
            executor.submit(abs, 1)
    (tmp_path / "file").touch()
    with pytest.raises(PoolDirectoryError, match="file"):
        PoolExecutor(pool=Where("simulated:2", tmp_path / "file")).submit(abs, 1)


# Those who start the calls are killed.


def node() -> psutil.Process:
    (found,) = psutil.Process().children()
    return found


def test_without_its_node_an_executor_is_broken(pool: Where, tmp_path: Path) -> None:
    with PoolExecutor(max_workers=1, pool=pool) as executor:
        futures = [executor.submit(touch_and_wait, tmp_path) for _ in range(10)]
        until((tmp_path / "begun").exists)
        node().kill()
        errors = [future.exception() for future in futures]
        assert all(isinstance(error, BrokenExecutor) for error in errors)
        assert "touch_and_wait() was not finished: the process that starts jobs was killed" in str(errors[0])
        assert "touch_and_wait() was not called" in str(errors[-1])
        with pytest.raises(BrokenExecutor, match="was killed"):
            executor.submit(abs, 1)


def test_without_its_fork_server_an_executor_starts_another_one(pool: Where, tmp_path: Path) -> None:
    with PoolExecutor(max_workers=1, pool=pool) as executor:
        first = executor.submit(touch_and_wait, tmp_path)
        more = [executor.submit(abs, -number) for number in range(5)]
        until((tmp_path / "begun").exists)
        (guard,) = node().children()
        (server,) = guard.children()
        server.kill()
        with pytest.raises(JobError, match="was ended because the fork server was killed"):
            first.result()
        assert [future.result() for future in more] == [0, 1, 2, 3, 4]


# Ctrl-C.

CALL = """
import asyncio, os, signal, sys, time
from pathlib import Path
from gpu_launcher import PoolExecutor
from gpu_launcher.jobs import where
from gpu_launcher.jobs.where import Where

where.GRACE = 600.0  # calls end by themselves, or at a second Ctrl-C

def call(n, stubborn):
    if stubborn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Path(f"began-{n}").touch()
        time.sleep(600)
    except KeyboardInterrupt:
        Path(f"interrupted-{n}").touch()
        raise
"""
"""Notes that it began, and that it was interrupted."""

INTERRUPTED = (
    CALL
    + """
try:
    with PoolExecutor(pool=Where("simulated:2"), start_method=sys.argv[1]) as executor:
        futures = [executor.submit(call, n, sys.argv[2] == "stubborn" and n == 0) for n in range(6)]
        if sys.argv[2] != "leave":
            futures[0].result()
except KeyboardInterrupt:
    for future in futures:
        print("cancelled" if future.cancelled() else type(future.exception()).__name__)
"""
)


@pytest.mark.parametrize(("method", "where"), [("fork", "inside"), ("spawn", "inside"), ("fork", "leave")])
def test_ctrl_c_interrupts_the_calls_that_run_and_cancels_the_others(tmp_path: Path, method: str, where: str) -> None:
    process = run(INTERRUPTED, tmp_path, method, where)
    until(lambda: (tmp_path / "began-0").exists() and (tmp_path / "began-1").exists())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=500)
    assert err == ""
    said = out.split()
    assert said[:2] == ["JobError", "JobError"]
    assert set(said[2:]) <= {"cancelled", "JobError"}
    assert said[5] == "cancelled"
    assert {path.name for path in tmp_path.glob("interrupted-*")} == {"interrupted-0", "interrupted-1"}


def test_a_second_ctrl_c_kills_the_calls_that_did_not_heed_the_first(tmp_path: Path) -> None:
    process = run(INTERRUPTED, tmp_path, "fork", "stubborn")
    until(lambda: (tmp_path / "began-0").exists() and (tmp_path / "began-1").exists())
    process.send_signal(signal.SIGINT)
    until((tmp_path / "interrupted-1").exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=500)
    assert err == ""
    assert out.split()[:2] == ["JobError", "JobError"]


UNDER_ASYNCIO = (
    CALL
    + """
async def main():
    loop = asyncio.get_running_loop()
    with PoolExecutor(pool=Where("simulated:2")) as executor:
        stubborn = [sys.argv[1] == "stubborn" and n == 0 for n in range(6)]
        await asyncio.gather(*(loop.run_in_executor(executor, call, n, stubborn[n]) for n in range(6)))

async def limited():
    task = asyncio.ensure_future(main())
    while not (Path("began-0").exists() and Path("began-1").exists()):
        await asyncio.sleep(0.01)
    task.cancel()
    await task

try:
    asyncio.run(limited() if sys.argv[1] == "cancelled" else main())
except (KeyboardInterrupt, asyncio.CancelledError) as error:
    print(type(error).__name__)
"""
)


@pytest.mark.parametrize("how", ["interrupted", "stubborn", "cancelled"])
def test_under_asyncio_ctrl_c_and_cancellation_interrupt_the_calls_that_run(tmp_path: Path, how: str) -> None:
    process = run(UNDER_ASYNCIO, tmp_path, how)
    until(lambda: (tmp_path / "began-0").exists() and (tmp_path / "began-1").exists())
    if how != "cancelled":
        process.send_signal(signal.SIGINT)
    until((tmp_path / "interrupted-1").exists)
    if how == "stubborn":
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=500)
    assert (out, err) == ("CancelledError\n" if how == "cancelled" else "KeyboardInterrupt\n", "")
    assert (tmp_path / "interrupted-0").exists() == (how != "stubborn")
    assert not (tmp_path / "began-2").exists()


def test_a_handler_of_the_event_loop_does_not_keep_a_call_from_being_ended(
    pool: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, "GRACE", 600.0)  # it ends by itself

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: None)
        try:
            with PoolExecutor(pool=pool, timeout=0.3) as executor, pytest.raises(JobTimeoutError):
                await loop.run_in_executor(executor, time.sleep, 600)
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    asyncio.run(main())
