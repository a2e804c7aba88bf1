"""`parallel_map` with real workers on simulated devices: what comes out, in which order, and what goes wrong how."""

from __future__ import annotations

import collections
import gc
import itertools
import logging
import operator
import os
import pickle
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.errors import OptionError, RecordError, UnreadableError
from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.jobs.where import Where
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from tests.waiting import until

TREE = Path(__file__).parents[2]


def square(record: int) -> int:
    return record * record


def leased(pool: Where) -> int:
    """How many leases and tickets there are."""
    with FileLedger(resolve_pool_directory(str(pool.pool_dir))) as ledger:
        view = ledger.snapshot()
        return len(view.leases) + len(view.tickets)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def meet(directory: Path, workers: int) -> None:
    """Wait until so many workers have a record."""
    (directory / f"works-{os.getpid()}").touch()
    until(lambda: len(list(directory.glob("works-*"))) >= workers)


# What comes out


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_each_worker_sets_itself_up_once_on_its_own_devices(pool: Where, tmp_path: Path, start_method: Any) -> None:
    def setup() -> tuple[str, list[int]]:
        (tmp_path / f"setup-{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return os.environ["CUDA_VISIBLE_DEVICES"], []

    def work(record: int, device: str, seen: list[int]) -> tuple[int, str, int, int]:
        if not seen:
            meet(tmp_path, 2)
        time.sleep(0.002)
        seen.append(record)
        return record, device, os.getpid(), len(seen)

    results = list(parallel_map(range(300), setup, work, pool=pool, start_method=start_method))
    assert [result[0] for result in results] == list(range(300))
    pids = {result[2] for result in results}
    assert len(list(tmp_path.glob("setup-*"))) == len(pids) == 2
    assert {(result[1], result[2]) for result in results} == {
        ((tmp_path / f"setup-{pid}").read_text(), pid) for pid in pids
    }
    assert {result[1] for result in results} == {"0", "1"}
    for pid in pids:
        assert sorted(result[3] for result in results if result[2] == pid)[-1] == sum(r[2] == pid for r in results)


Pair = collections.namedtuple("Pair", "model metric")


@pytest.mark.parametrize(
    ("made", "arguments"),
    [
        (None, ()),
        ("model", ("model",)),
        (("model", "metric"), ("model", "metric")),
        (["model", "metric"], (["model", "metric"],)),
        (Pair("model", "metric"), (Pair("model", "metric"),)),
    ],
)
def test_a_tuple_is_several_objects_and_anything_else_one(pool: Where, made: object, arguments: Any) -> None:
    results = parallel_map([7], lambda: made, lambda record, *rest: (record, rest), pool=pool)
    assert list(results) == [(7, arguments)]


def test_without_setup_there_is_only_the_record(pool: Where) -> None:
    assert list(parallel_map("abc", function=str.upper, pool=pool)) == ["A", "B", "C"]


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
@pytest.mark.parametrize("ordered", [True, False])
def test_every_record_has_exactly_one_result(pool: Where, count: int, ordered: bool) -> None:
    results = list(parallel_map((n for n in range(count)), function=square, ordered=ordered, pool=pool))
    if not ordered:
        results.sort()
    assert results == [n * n for n in range(count)]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_can_run_maps_of_their_own(pool: Where, start_method: Any) -> None:
    def squares(record: int) -> list[int]:
        return list(parallel_map(range(record), function=square, pool=pool, start_method=start_method))  # type: ignore[arg-type]

    outer = parallel_map([2, 3], function=squares, gpus=0, num_workers=2, start_method=start_method)
    assert list(outer) == [[0, 1], [0, 1, 4]]


def test_unordered_results_come_as_they_are_ready(pool: Where, tmp_path: Path) -> None:
    def work(record: int) -> int:
        while record == 0 and not (tmp_path / "go").exists():
            time.sleep(0.01)
        return record

    results = parallel_map(range(50), function=work, ordered=False, pool=pool)
    first = list(itertools.islice(results, 49))
    assert sorted(first) == list(range(1, 50))
    (tmp_path / "go").touch()
    assert list(results) == [0]


def test_slow_records_are_dealt_one_by_one_to_who_is_free(pool: Where, tmp_path: Path) -> None:
    def work(record: int) -> int:
        if record == 0:
            until((tmp_path / "last").exists)
        else:
            time.sleep(0.12)
        if record == 5:
            (tmp_path / "last").touch()
        return os.getpid()

    pids = list(parallel_map(range(6), function=work, pool=pool))
    assert pids.count(pids[0]) == 1


def test_more_workers_than_records_are_not_started(pool: Where, tmp_path: Path) -> None:
    def setup() -> None:
        (tmp_path / f"setup-{os.getpid()}").touch()

    def work(record: int) -> int:
        time.sleep(0.05)
        return record

    assert list(parallel_map(iter([1]), setup, work, pool=pool)) == [1]
    assert len(list(tmp_path.glob("setup-*"))) == 1


def test_fractions_of_devices_make_more_workers(pool: Where, tmp_path: Path) -> None:
    def setup() -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]

    def work(record: int, device: str) -> tuple[str, int]:
        meet(tmp_path, 4)
        return device, os.getpid()

    results = set(parallel_map(range(12), setup, work, gpus=0.5, pool=pool))
    assert sorted(device for device, _ in results) == ["0", "0", "1", "1"]


def test_many_workers_without_devices_wait_together(pool: Where, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    everybody = tmp_path / "everybody"

    def work(record: int) -> str:
        (tmp_path / "here" / str(os.getpid())).touch()
        if len(list((tmp_path / "here").iterdir())) == 64:  # only once, because all 64 look
            everybody.touch()
        until(everybody.exists)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    assert set(parallel_map(range(64), function=work, num_workers=64, gpus=0, pool=pool)) == {""}


def test_what_main_and_closures_have_is_there(pool: Where) -> None:
    lock = threading.Lock()  # which cannot be pickled

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    def work(record: Local) -> Local:
        with lock:
            return Local(record.value + 1)

    results = list(parallel_map([Local(1), Local(2)], function=work, pool=pool, start_method="fork"))
    assert [result.value for result in results] == [2, 3]


# Bounded read-ahead


class Counted:
    """Records that know how many were read."""

    def __init__(self, count: int) -> None:
        self.read = 0
        self._count = count

    def __iter__(self) -> Iterator[int]:
        for number in range(self._count):
            self.read = number + 1
            yield number


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("read_ahead", "most"), [(1, 1), (10, 10), (None, 1000)])
def test_records_are_read_only_so_far_ahead(pool: Where, ordered: bool, read_ahead: int | None, most: int) -> None:
    def work(record: int) -> int:
        time.sleep(0.001 if record else 0.5)
        return record

    records = Counted(3000)
    results = parallel_map(records, function=work, ordered=ordered, read_ahead=read_ahead, pool=pool)
    for taken, _ in enumerate(results):  # of which `taken` came out before this one
        assert records.read - taken <= most
        if taken == 200:
            break
    results.close()


MILLION = """
import resource, sys
from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.jobs.where import Where

def text(record):
    return f"record number {record}, which nobody keeps"

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

if __name__ == "__main__":
    where = Where(devices="simulated:2", pool_dir=sys.argv[1])
    for ordered in (True, False):
        results = iter(parallel_map(map(text, range(1_000_000)), function=str, ordered=ordered, pool=where))
        next(results)
        before = peak()
        assert sum(1 for result in results) == 999_999
        print(peak() - before)
"""


def test_a_million_records_take_constant_memory(tmp_path: Path) -> None:
    (tmp_path / "million.py").write_text(MILLION)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "million.py"), str(tmp_path / "pool")],
        env={**os.environ, "PYTHONPATH": str(TREE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 30, "MB; all records and results would be 200"


def test_nothing_is_read_before_a_result_is_asked_for(pool: Where) -> None:
    records = Counted(10)
    with parallel_map(records, function=square, pool=pool):
        time.sleep(0.2)
        assert records.read == 0
        assert leased(pool) == 0


def test_results_come_while_records_are_slow_in_coming(pool: Where) -> None:
    came: list[int] = []
    deadline = time.monotonic() + 200

    def slowly() -> Iterator[int]:
        for number in itertools.count():
            if came:
                break
            assert time.monotonic() < deadline, "nothing comes out before all is read"
            yield number
            time.sleep(0.15)

    for result in parallel_map(slowly(), function=square, pool=pool):
        came.append(result)
    assert came == [n * n for n in range(len(came))]


def test_workers_go_on_while_results_are_worked_on(pool: Where, tmp_path: Path) -> None:
    def work(record: int) -> int:
        time.sleep(0.02)  # quicker ones are dealt together
        until(lambda: record < 20 or (tmp_path / "worked on").exists())
        (tmp_path / f"ended-{record}").touch()
        return record

    for number in parallel_map(range(60), function=work, pool=pool):
        if number == 19:
            (tmp_path / "worked on").touch()
            until(lambda: any((tmp_path / f"ended-{later}").exists() for later in range(20, 60)))


# What goes wrong


class OwnError(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(f"number {number} is bad")
        self.number = number

    def __reduce__(self) -> Any:
        return OwnError, (self.number,)


def fail_at_13(record: int) -> int:
    if record == 13:
        raise OwnError(record)
    return record


def test_an_error_ends_the_iteration_with_the_original_exception(pool: Where, frame_of: Any) -> None:
    results = parallel_map(range(1000), function=fail_at_13, pool=pool)
    assert list(itertools.islice(results, 13)) == list(range(13))
    with pytest.raises(OwnError, match="number 13 is bad") as caught:
        next(results)
    assert caught.value.number == 13
    cause = caught.value.__cause__
    assert isinstance(cause, RecordError)
    assert (cause.index, cause.record) == (13, 13)
    assert frame_of(__file__, "fail_at_13", "raise OwnError(record)") in str(cause)
    assert "record 13 (13) failed on simulated GPU" in str(cause)
    assert "record_worker.py" not in str(cause)
    assert list(results) == []
    assert leased(pool) == 0


def test_errors_are_results_if_that_is_wanted(pool: Where, frame_of: Any) -> None:
    results = list(parallel_map(range(1000), function=fail_at_13, on_error="return", pool=pool))
    error = results[13]
    assert isinstance(error, RecordError)
    assert isinstance(error.exception, OwnError)
    assert (error.index, error.record, error.exception.number) == (13, 13, 13)
    assert frame_of(__file__, "fail_at_13", "raise OwnError(record)") in error.traceback
    assert [result for result in results if result is not error] == [n for n in range(1000) if n != 13]
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_record_fails_in_the_file_and_line_of_the_function(pool: Where, frame_of: Any, start_method: Any) -> None:
    def divide(record: int) -> float:
        return 1 / record

    with pytest.raises(ZeroDivisionError) as caught:
        list(parallel_map([0], function=divide, pool=pool, start_method=start_method))
    assert frame_of(__file__, "divide", "return 1 / record") in str(caught.value.__cause__)


def test_a_call_of_exit_is_an_error_of_its_record(pool: Where) -> None:
    def work(record: int) -> int:
        if record == 1:
            sys.exit(3)
        return record

    with pytest.raises(RecordError, match=r"(?s)record 1 .*SystemExit: 3"):
        list(parallel_map(range(3), function=work, pool=pool))


def test_what_setup_raises_is_raised_with_its_traceback(pool: Where, frame_of: Any) -> None:
    def setup() -> None:
        raise OwnError(5)

    with pytest.raises(OwnError, match="number 5 is bad") as caught:
        list(parallel_map(range(3), setup, square, pool=pool))
    assert frame_of(__file__, "setup", "raise OwnError(5)") in str(caught.value.__cause__)
    assert leased(pool) == 0


def test_what_the_records_raise_comes_after_the_results_of_those_before(pool: Where) -> None:
    def records() -> Iterator[int]:
        yield from range(57)
        raise OwnError(57)

    results = parallel_map(records(), function=square, pool=pool)
    assert list(itertools.islice(results, 57)) == [n * n for n in range(57)]
    with pytest.raises(OwnError, match="number 57"):
        next(results)


def test_a_record_that_cannot_be_sent_is_named(pool: Where) -> None:
    records: list[Any] = [*range(20), threading.Lock(), *range(20)]
    results = parallel_map(records, function=lambda record: record, pool=pool)
    assert list(itertools.islice(results, 20)) == list(range(20))
    with pytest.raises(OptionError, match=r"records\[20\]: cannot be sent to a worker: TypeError: .*Remedy"):
        next(results)
    found = list(parallel_map(records, function=lambda record: record, on_error="return", pool=pool))
    assert [type(one) for one in found] == [*[int] * 20, RecordError, *[int] * 20]


def test_a_result_that_cannot_be_sent_is_an_error_of_its_record(pool: Where) -> None:
    def work(record: int) -> Any:
        return threading.Lock() if record == 500 else record

    found = list(parallel_map(range(1000), function=work, on_error="return", pool=pool))
    assert [number for number, one in enumerate(found) if isinstance(one, RecordError)] == [500]
    assert "cannot pickle" in str(found[500])


class Unloadable:
    """Can be pickled, and read only in the process that made it."""

    def __init__(self, pid: int | None = None) -> None:
        if pid is not None and pid != os.getpid():
            raise OwnError(1)

    def __reduce__(self) -> Any:
        return Unloadable, (os.getpid(),)


def test_a_result_that_cannot_be_read_is_an_error_of_its_record(pool: Where) -> None:
    def work(record: int) -> Any:
        return Unloadable() if record == 500 else record

    found = list(parallel_map(range(600), function=work, on_error="return", pool=pool))
    assert [number for number, one in enumerate(found) if isinstance(one, RecordError)] == [500]
    assert isinstance(found[500].exception, UnreadableError)


def test_a_record_that_cannot_be_read_is_an_error_of_its_own(pool: Where) -> None:
    records: list[Any] = [*range(300), Unloadable(), *range(300)]
    found = list(parallel_map(records, function=lambda record: record, on_error="return", pool=pool))
    assert [number for number, one in enumerate(found) if isinstance(one, RecordError)] == [300]
    assert "records[300] cannot be unpickled in a worker: OwnError" in str(found[300].exception)


class NeedsTwo(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_an_exception_that_pickle_does_not_bring_through_is_the_same_here(pool: Where) -> None:
    def work(record: int) -> None:
        raise NeedsTwo(1, 2)

    with pytest.raises(NeedsTwo, match=r"^1 and 2$"):
        list(parallel_map([0], function=work, pool=pool))


@pytest.mark.parametrize("which", ["setup", "function"])
def test_with_spawn_what_cannot_be_pickled_is_named(pool: Where, which: str) -> None:
    lock = threading.Lock()

    def refers(*arguments: object) -> None:
        with lock:
            pass

    arguments: dict[str, Any] = {"setup": None, "function": square, which: refers}
    with pytest.raises(OptionError, match=rf"{which}: workers start in fresh interpreters.*Remedy.*fork"):
        parallel_map([1], pool=pool, start_method="spawn", **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": None}, "function: is missing"),
        ({"function": 3}, "function: 3 cannot be called"),
        ({"setup": 3}, "setup: 3 cannot be called"),
        ({"num_workers": 0}, "num_workers: must be an integer from 1 to 4096, got 0"),
        ({"num_workers": 100_000}, "num_workers: must be an integer from 1 to 4096, got 100000"),
        ({"read_ahead": True}, "read_ahead: must be an integer >= 1, got True"),
        ({"on_error": "ignore"}, "on_error: must be one of raise, return, got 'ignore'"),
        ({"gpus": 1.5}, "gpus: 1.5 is neither"),
        ({"gpus": 3}, "gpus: .*3"),
        ({"gpus": 0, "memory": "1GiB"}, "memory: "),
        ({"memory": "many"}, "memory: "),
        ({"pool": Where(devices="simulated:none")}, "devices: "),
    ],
)
def test_bad_options_are_named_before_anything_starts(pool: Where, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parallel_map([1], **{"function": square, "pool": pool, **options})


# Ends


def pid_slowly(record: int) -> int:
    time.sleep(0.05 if record < 4 else 600)
    return os.getpid()


@pytest.mark.parametrize("how", ["break", "close", "context", "raise"])
def test_who_leaves_ends_the_workers_at_once(pool: Where, how: str) -> None:
    pids: set[int] = set()

    def leave() -> None:
        if how == "context":
            with parallel_map(itertools.count(), function=pid_slowly, pool=pool) as results:
                pids.update(itertools.islice(results, 4))
        elif how == "close":
            results = parallel_map(itertools.count(), function=pid_slowly, pool=pool)
            pids.update(itertools.islice(results, 4))
            results.close()
            results.close()
            assert list(results) == []
        else:
            for number, pid in enumerate(parallel_map(itertools.count(), function=pid_slowly, pool=pool)):
                pids.add(pid)
                if number == 3:
                    if how == "raise":
                        raise OwnError(3)
                    break

    if how == "raise":
        with pytest.raises(OwnError):
            leave()
    else:
        leave()
    assert pids
    assert all(map(gone, pids))
    assert leased(pool) == 0


def test_one_that_is_never_iterated_over_leaves_nothing(pool: Where) -> None:
    before = set(psutil.Process().children())
    results = parallel_map(range(3), function=square, pool=pool)
    assert set(psutil.Process().children()) - before
    del results
    gc.collect()
    assert not set(psutil.Process().children()) - before


# The pool


def test_more_workers_than_the_pool_has_devices_for_are_not_promised(
    pool: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(record: int) -> int:
        meet(tmp_path, 2)
        time.sleep(0.02)
        return os.getpid()

    with caplog.at_level(logging.INFO, "gpu_launcher"):
        pids = set(parallel_map(range(20), function=work, num_workers=5, pool=pool))
    assert len(pids) == 2
    (text,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert text == (
        "num_workers=5, but all devices of the pool (2 simulated GPUs) are enough for 2 such workers: "
        "there will be no more"
    )
    assert [record.levelname for record in caplog.records if "no real GPU is reserved" in record.getMessage()] == [
        "INFO"
    ]


@pytest.mark.usefixtures("pause_after_ends")
def test_processes_that_the_last_workers_left_behind_are_named(pool: Where, caplog: pytest.LogCaptureFixture) -> None:
    def work(record: int) -> int:
        return os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "300")

    # A line names three processes, and one worker may get all records.
    pids = list(parallel_map(range(3), function=work, num_workers=2, pool=pool))
    assert "worker) left processes behind, which were ended: sleep 300 (pid " in caplog.text
    for pid in pids:
        assert caplog.text.count(f"sleep 300 (pid {pid})") == 1


@pytest.mark.parametrize(("records", "said"), [(4, ["num_workers=1"]), (1, [])])
def test_a_cap_is_named_where_devices_and_records_are_enough_for_more_workers(
    pool: Where, caplog: pytest.LogCaptureFixture, records: int, said: list[str]
) -> None:
    assert list(parallel_map(iter(range(records)), function=abs, num_workers=1, pool=pool)) == list(range(records))
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    rest = ", but all devices of the pool (2 simulated GPUs) are enough for 2 such workers: "
    assert texts == [f"{cap}{rest}raise or remove it to use them" for cap in said]


HOLDER = """
import os, sys
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from gpu_launcher.model import Owner, Request

with FileLedger(resolve_pool_directory(sys.argv[1])) as ledger:
    ticket = ledger.enqueue(Request(1), simulated_devices(2)[:1], Owner(os.getpid(), "test", "another program"))
    lease = ledger.claim(ticket)
    print("held", flush=True)
    sys.stdin.readline()  # not its end: what the other program forks has the pipe, too
"""


def test_workers_begin_with_what_is_free_and_others_join(pool: Where) -> None:
    def work(record: int) -> str:
        time.sleep(0.01)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(pool.pool_dir)],
        env={**os.environ, "PYTHONPATH": str(TREE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        results = parallel_map(itertools.count(), function=work, read_ahead=50, pool=pool)
        assert set(itertools.islice(results, 60)) == {"1"}
        other.communicate(b"go\n")
        end = time.monotonic() + 200
        assert any(device == "0" or time.monotonic() > end for device in results)
        assert time.monotonic() < end
        results.close()


def test_devices_are_given_back_as_soon_as_nothing_is_left_for_them(pool: Where, tmp_path: Path) -> None:
    def work(record: int) -> int:
        while record == 0 and not (tmp_path / "go").exists():
            time.sleep(0.01)
        return record

    results = parallel_map(range(2), function=work, ordered=False, pool=pool)
    assert next(results) == 1
    checks = iter(range(20_000))

    def look() -> None:
        for _ in checks:
            if leased(pool) == 1:
                break
            time.sleep(0.01)
        (tmp_path / "go").touch()

    looker = threading.Thread(target=look)
    looker.start()
    assert list(results) == [0]
    looker.join()
    assert next(checks, None) is not None, "two devices were held by one worker that works"


# The bar

SCRIPT = """
import sys
from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.jobs.where import Where

def work(record):
    if record == 7:
        raise ValueError
    return record

if __name__ == "__main__":
    results = list(parallel_map(range(300), function=work, on_error="return", gpus=0, pool=Where(pool_dir=sys.argv[1])))
    print(len(results), "results")
"""


def script(tmp_path: Path, **streams: Any) -> subprocess.Popen[bytes]:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(TREE), "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pool")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, **streams)


def test_a_bar_is_shown_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = script(tmp_path, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            if not (data := os.read(ours, 65536)):
                break
        except OSError:  # EIO: nobody has the other end any more
            break
        shown += data
    os.close(ours)
    assert process.communicate(timeout=500)[0] == b"300 results\n"
    assert process.returncode == 0
    assert b"300/300" in shown, shown
    assert b"1 error" in shown
    assert b"/s" in shown


def test_nothing_is_shown_in_a_pipe(tmp_path: Path) -> None:
    process = script(tmp_path, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=500)
    assert out == b"300 results\n"
    assert err == b""  # nor which devices there are: it needs none


def test_functions_of_the_standard_library_do_in_fresh_interpreters(pool: Where) -> None:
    records = [(n, n) for n in range(50)]
    results = parallel_map(records, function=operator.itemgetter(0), pool=pool, start_method="spawn")
    assert list(results) == list(range(50))


def test_records_and_results_do_not_cross_the_node(pool: Where) -> None:
    with parallel_map(itertools.count(), function=abs, gpus=0, num_workers=1, pool=pool) as results:
        assert next(results) == 0
        node = results._engine._loop._pid
        assert node is not None
        os.kill(node, signal.SIGSTOP)
        try:
            assert [next(results) for _ in range(20_000)] == list(range(1, 20_001))
        finally:
            os.kill(node, signal.SIGCONT)
