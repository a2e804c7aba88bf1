"""`gpu_launcher.Pool`: leases for threads, tasks, forks and subprocesses of real programs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import pytest

import gpu_launcher
from gpu_launcher import LeaseTimeout, Pool, RequestError
from gpu_launcher.allocation import lease as lease_module
from gpu_launcher.allocation import request_queue
from gpu_launcher.errors import ApplyError, GpuLauncherError, OptionError, PoolDirectoryError
from gpu_launcher.leases import FileLedger
from gpu_launcher.processes.forking import internal_fork
from tests.descriptors import open_descriptors
from tests.waiting import until

SOON = 100.0
"""Seconds after which something does not happen any more, on a machine that is busy with other things."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def pool(directory: Path) -> Iterator[Pool]:
    with Pool("simulated:4", directory) as pool:
        yield pool


class Program:
    """Another program, which runs `code` with `pool` on the same pool, and talks over its stdin and stdout."""

    def __init__(self, directory: Path, code: str, *, name: str = "other.py") -> None:
        script = directory.parent / name
        preamble = f"import sys, gpu_launcher\npool = gpu_launcher.Pool('simulated:4', {str(directory)!r})\n"
        script.write_text(preamble + code)
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


HOLD = """
lease = pool.lease(gpus={gpus})
print("held", flush=True)
sys.stdin.readline()
lease.release()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def program(directory: Path) -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def start(code: str, **options: str) -> Program:
        started.append(Program(directory, code, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


# What a lease is


def test_a_lease_has_the_devices_that_were_asked_for_until_its_block_ends(pool: Pool) -> None:
    with pool.lease(gpus=2) as lease:
        assert len(lease.devices) == 2
        assert set(lease.devices) < set(pool.devices)
        (held,) = pool.snapshot().leases
        assert held.devices == lease.devices
        assert held.owner is not None
        assert held.owner.pid == os.getpid()
    assert lease.released
    assert pool.snapshot().leases == ()
    lease.release()


def test_one_device_is_asked_for_by_default_and_by_memory_a_share_of_one(pool: Pool) -> None:
    with pool.lease() as whole, pool.lease(memory="20GiB") as first, pool.lease(0.25) as second:
        assert [len(lease.devices) for lease in (whole, first, second)] == [1, 1, 1]
        assert first.devices == second.devices != whole.devices
        assert first.environment()["GPU_LAUNCHER_MEMORY_FRACTION"] == "0.25"


def test_its_environment_is_this_process_s_own_with_the_devices(pool: Pool) -> None:
    with pool.lease(gpus=2) as lease:
        assert lease.environment()["PATH"] == os.environ["PATH"]
        assert lease.environment({}) == {
            "CUDA_VISIBLE_DEVICES": ",".join(str(device.index) for device in lease.devices),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "GPU_LAUNCHER_MEMORY_FRACTION": "1",
        }


def test_what_was_released_can_no_longer_be_used(pool: Pool) -> None:
    lease = pool.lease()
    lease.release()
    for use in (lease.environment, lease.apply, lease.fileno, lambda: lease.pass_fds, lease.__enter__):
        with pytest.raises(ValueError, match="has been released"):
            use()


def test_a_lease_of_nothing_is_granted_at_once(pool: Pool) -> None:
    with pool.lease(gpus=4), pool.lease(gpus=0, timeout=0) as nothing:
        assert nothing.devices == ()
        assert nothing.pass_fds == ()
        assert nothing.environment()["CUDA_VISIBLE_DEVICES"] == ""
        with pytest.raises(ValueError, match="no descriptor"):
            nothing.fileno()


def test_a_child_that_has_the_descriptor_keeps_the_devices(pool: Pool) -> None:
    lease = pool.lease(gpus=4)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=lease.pass_fds)
    lease.release()
    with pytest.raises(LeaseTimeout):
        pool.lease(timeout=0)
    child.communicate()
    pool.lease(timeout=SOON).release()


# What is refused


def test_what_can_never_be_granted_is_refused_at_once(pool: Pool) -> None:
    with pytest.raises(RequestError, match=r"for 5 devices, but the pool has 4.*ask for fewer or allow more devices"):
        pool.lease(gpus=5)
    with pytest.raises(RequestError, match=r"for 90 GiB.*ask for less"):
        pool.lease(memory="90GiB")
    with pytest.raises(RequestError):
        asyncio.run(asyncio.wait_for(pool.alease(gpus=5), SOON))
    assert pool.snapshot().queue == ()


@pytest.mark.parametrize(
    ("option", "value"), [("gpus", 1.5), ("gpus", -1), ("memory", "much"), ("priority", 0.5), ("timeout", "soon")]
)
def test_what_is_no_request_is_named(pool: Pool, option: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"^{option}: "):
        pool.lease(**{option: value})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=f"^{option}: "):
        pool.alease(**{option: value})  # type: ignore[arg-type]


def test_what_is_no_pool_is_named_when_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^devices: "):
        Pool("simulated:none", tmp_path)
    with pytest.raises(OptionError, match=r"^busy_memory: "):
        Pool("simulated:1", tmp_path, busy_memory="much")
    (tmp_path / "file").touch()
    with Pool("simulated:1", tmp_path / "file") as pool, pytest.raises(PoolDirectoryError, match="not a directory"):
        pool.lease()


def test_a_pool_that_nobody_uses_opens_nothing(directory: Path) -> None:
    before = open_descriptors()
    pool = Pool("simulated:4", directory)
    assert len(pool.devices) == 4
    assert not directory.exists()
    assert open_descriptors() <= before
    assert len(pickle.loads(pickle.dumps(pool)).devices) == 4


# Waiting


def test_who_waits_in_vain_is_told_who_holds_what(pool: Pool, program: Callable[..., Program]) -> None:
    other = program(HOLD.format(gpus=3), name="train.py")
    assert other.line() == "held"
    began = time.monotonic()
    with pool.lease(), pytest.raises(LeaseTimeout) as raised:
        pool.lease(gpus=2, timeout=0.3)
    assert 0.3 <= time.monotonic() - began < SOON
    message = str(raised.value)
    assert message.startswith("timed out after 0.3 s waiting for 2 GPUs: ")
    assert "simulated GPU 0-2 held by " in message
    assert "(train.py)" in message
    assert "simulated GPU 3 held by" in message
    assert isinstance(raised.value, (TimeoutError, GpuLauncherError))
    assert pool.snapshot().queue == ()


def test_a_timeout_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(LeaseTimeout("2 GPUs", 3.0, "GPU 0 held by anna (train.py #3)")))
    assert (error.wanted, error.seconds, error.reason) == ("2 GPUs", 3.0, "GPU 0 held by anna (train.py #3)")
    assert str(error) == "timed out after 3 s waiting for 2 GPUs: GPU 0 held by anna (train.py #3)"
    assert isinstance(error, TimeoutError)
    assert error.errno is None


def test_a_timeout_of_nothing_tries_once(pool: Pool) -> None:
    with pool.lease(gpus=4):
        with pytest.raises(LeaseTimeout, match="1 GPU not available now"):
            pool.lease(timeout=0)
        with pytest.raises(LeaseTimeout, match="1 GPU not available now"):
            asyncio.run(asyncio.wait_for(pool.alease(timeout=0), SOON))
    pool.lease(timeout=0).release()
    asyncio.run(asyncio.wait_for(pool.alease(timeout="0s"), SOON)).release()


def test_a_task_that_waits_in_vain_is_told_so(pool: Pool) -> None:
    async def main() -> None:
        with pytest.raises(LeaseTimeout, match=r"timed out after 0.2 s waiting for 1 GPU: simulated GPU 0.* held by "):
            await pool.alease(timeout=0.2)

    with pool.lease(gpus=4):
        asyncio.run(main())
        assert pool.snapshot().queue == ()


def test_a_release_in_another_process_wakes_who_waits(pool: Pool, program: Callable[..., Program]) -> None:
    other = program(HOLD.format(gpus=4))
    assert other.line() == "held"
    released = threading.Timer(0.2, other.tell)
    released.start()
    pool.lease(gpus=4, timeout=SOON).release()
    released.join()


def test_a_thread_that_waits_gets_the_devices_of_a_holder_that_is_killed(
    pool: Pool, program: Callable[..., Program]
) -> None:
    other = program(HOLD.format(gpus=4))
    assert other.line() == "held"
    began: list[float] = []

    def kill() -> None:
        began.append(time.monotonic())
        other.process.kill()

    killer = threading.Timer(0.5, kill)
    killer.start()
    pool.lease(gpus=4, timeout=SOON).release()
    assert time.monotonic() - began[0] < SOON
    killer.join()


def test_a_task_that_waits_gets_the_devices_of_a_holder_that_is_killed(
    pool: Pool, program: Callable[..., Program]
) -> None:
    other = program(HOLD.format(gpus=4))
    assert other.line() == "held"

    async def main() -> float:
        waiting = asyncio.ensure_future(pool.alease(gpus=4, timeout=SOON).__aenter__())
        await asyncio.sleep(0.5)
        began = time.monotonic()
        other.process.kill()
        (await waiting).release()
        return time.monotonic() - began

    assert asyncio.run(main()) < SOON


def test_devices_pass_from_thread_to_thread_without_polling(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileLedger, "poll_interval", 600.0)  # longer than a test may take
    monkeypatch.setattr(request_queue, "EXPLAIN_SECONDS", 600.0)
    for _ in range(15):
        lease = pool.lease(gpus=4)

        def wait() -> None:
            pool.lease(gpus=4).release()

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: pool.snapshot().queue)
        lease.release()
        thread.join()


def test_it_is_said_once_for_whom_somebody_waits(
    pool: Pool, program: Callable[..., Program], caplog: pytest.LogCaptureFixture
) -> None:
    other = program(HOLD.format(gpus=4), name="train.py")
    assert other.line() == "held"
    with caplog.at_level(logging.WARNING, "gpu_launcher"):
        assert len(pool.devices) == 4
        with pytest.raises(LeaseTimeout):
            pool.lease(timeout=0.3)
        assert caplog.messages == [], "a moment is not worth a word"
        thread = threading.Thread(target=lambda: pool.lease().release())
        thread.start()
        until(lambda: caplog.messages, "nothing is said")
        other.tell()
        thread.join()
    (message,) = caplog.messages
    assert message.startswith("waiting for 1 GPU: simulated GPU 0-3 held by ")
    assert re.search(r"\(train\.py\) since \d\d:\d\d$", message)


def test_who_waits_for_this_program_alone_is_not_told(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gpu_launcher"), pool.lease(gpus=4):
        caplog.clear()
        with pytest.raises(LeaseTimeout):
            pool.lease(timeout=2.5)
    assert caplog.messages == []


# Many


class Book:
    """Who has which device, to see that nobody has one twice."""

    def __init__(self) -> None:
        self.grants = 0
        self._held: set[str] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def entry(self, lease: gpu_launcher.Lease) -> Iterator[None]:
        uuids = {device.uuid for device in lease.devices}
        with self._lock:
            assert not uuids & self._held, "a device was granted twice"
            self._held |= uuids
            self.grants += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= uuids


def nothing_is_left(pool: Pool) -> bool:
    seen = pool.snapshot()
    return seen.leases == () and seen.queue == ()


def test_threads_share_a_pool(pool: Pool) -> None:
    book, failures = Book(), []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                with pool.lease(gpus=1 + (number + turn) % 3, timeout=60) as lease, book.entry(lease):
                    time.sleep(0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert book.grants == 60
    assert nothing_is_left(pool)


def test_processes_share_a_pool(pool: Pool, directory: Path, program: Callable[..., Program]) -> None:
    code = """
import os, random, time
from pathlib import Path
marks = Path({marks!r})
for turn in range(15):
    with pool.lease(gpus=random.choice((1, 1, 2, 3))) as lease:
        for device in lease.devices:
            (marks / device.uuid).touch(exist_ok=False)
        time.sleep(random.random() / 500)
        for device in lease.devices:
            (marks / device.uuid).unlink()
pool.close()
print("done", flush=True)
"""
    marks = directory.parent / "marks"
    marks.mkdir()
    others = [program(code.format(marks=str(marks)), name=f"other{number}.py") for number in range(4)]
    assert [other.line() for other in others] == ["done"] * 4
    assert nothing_is_left(pool)


def test_a_storm_of_cancellations_loses_nothing(pool: Pool) -> None:
    book = Book()
    chance = random.Random(7)

    async def one() -> None:
        async with pool.alease(gpus=1) as lease:
            with book.entry(lease):
                await asyncio.sleep(0)

    async def main() -> None:
        async with pool.alease(gpus=4):
            tasks = [asyncio.create_task(one()) for _ in range(300)]
            await asyncio.sleep(0)
            assert len(pool.snapshot().queue) == 300
            cancelled = set(chance.sample(tasks, 100))
            for task in cancelled:
                task.cancel()
            await asyncio.wait(cancelled)
            assert len(pool.snapshot().queue) == 200, "their places were given back at once"
        late = chance.sample([task for task in tasks if task not in cancelled], 50)
        while late:
            await asyncio.sleep(0.001)
            late.pop().cancel()  # some of them have been granted just now
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert [
            result for result in results if result not in (None,) and not isinstance(result, asyncio.CancelledError)
        ] == []
        assert book.grants >= results.count(None) >= 150

    asyncio.run(main())
    assert nothing_is_left(pool)


def test_event_loops_and_threads_share_a_pool(pool: Pool) -> None:
    book, failures = Book(), []

    async def one() -> None:
        async with pool.alease(gpus=1, timeout=60) as lease:
            with book.entry(lease):
                await asyncio.sleep(0.001)

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(20)))

    def loop() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)

    def thread() -> None:
        try:
            for _ in range(10):
                with pool.lease(gpus=2, timeout=60) as lease, book.entry(lease):
                    time.sleep(0.001)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=target) for target in (loop, loop, loop, thread, thread, thread)]
    for one_thread in threads:
        one_thread.start()
    for one_thread in threads:
        one_thread.join()
    assert failures == []
    assert book.grants == 90
    assert nothing_is_left(pool)


def test_an_event_loop_that_is_stuck_keeps_nobody_else_waiting(pool: Pool, program: Callable[..., Program]) -> None:
    other = program(HOLD.format(gpus=4))
    assert other.line() == "held"
    stuck, over = threading.Event(), threading.Event()

    async def main() -> None:
        waiting = asyncio.ensure_future(pool.alease(gpus=1).__aenter__())
        await asyncio.sleep(0)
        stuck.set()
        over.wait()
        (await waiting).release()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    stuck.wait()
    other.tell()
    pool.lease(gpus=2, timeout=SOON).release()
    over.set()
    thread.join()
    assert nothing_is_left(pool)


def test_the_end_of_the_thread_that_attends_leaves_another_to_do_so(
    pool: Pool, program: Callable[..., Program]
) -> None:
    other = program(HOLD.format(gpus=4))
    assert other.line() == "held"
    ended: list[str] = []

    def impatient() -> None:
        with pytest.raises(LeaseTimeout):
            pool.lease(timeout=0.5)
        ended.append("impatient")

    def patient() -> None:
        pool.lease(timeout=3 * SOON).release()
        ended.append("patient")

    first = threading.Thread(target=impatient)
    first.start()
    until(lambda: pool.snapshot().queue)
    second = threading.Thread(target=patient)
    second.start()
    first.join()
    assert ended == ["impatient"]
    other.tell()
    second.join(SOON)
    assert ended == ["impatient", "patient"]


def test_a_lease_that_is_granted_to_a_closed_event_loop_is_given_back(pool: Pool) -> None:
    loop = asyncio.new_event_loop()
    with pool.lease(gpus=4):
        task = loop.create_task(pool.alease(gpus=4).__aenter__())
        loop.run_until_complete(asyncio.sleep(0))
        assert len(pool.snapshot().queue) == 1
        loop.close()
    pool.lease(gpus=4, timeout=SOON).release()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task, loop
    gc.collect()
    assert nothing_is_left(pool)


def test_signals_that_raise_leave_no_ticket_and_no_lease(pool: Pool, program: Callable[..., Program]) -> None:
    code = """
import random, signal, threading
class Now(Exception): pass
def handler(number, frame): raise Now
signal.signal(signal.SIGALRM, handler)
def compete():
    while not over.is_set():
        with pool.lease(gpus=2):
            over.wait(0.001)
over = threading.Event()
other = threading.Thread(target=compete, daemon=True)
other.start()
raised = 0
for turn in range(200):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + random.random() * 0.006)
        with pool.lease(gpus=3):
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Now:
        raised += 1
signal.setitimer(signal.ITIMER_REAL, 0)
over.set()
other.join()
print(raised > 20, len(pool.snapshot().queue), len(pool.snapshot().leases), flush=True)
sys.stdin.readline()
"""
    assert program(code).line() == "True 0 0"


def test_ctrl_c_ends_a_wait_and_gives_the_place_back(pool: Pool, program: Callable[..., Program]) -> None:
    code = """
try:
    pool.lease()
except KeyboardInterrupt:
    print("interrupted", len(pool.snapshot().queue), flush=True)
sys.stdin.readline()
"""
    with pool.lease(gpus=4):
        other = program(code)
        until(lambda: pool.snapshot().queue)
        other.process.send_signal(signal.SIGINT)
        assert other.line() == "interrupted 0"
        assert pool.snapshot().queue == ()


def test_more_than_the_limit_of_open_files_cannot_wait_and_do_not_hinder_the_others(
    program: Callable[..., Program],
) -> None:
    code = """
import asyncio, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
async def one():
    async with pool.alease():
        await asyncio.sleep(0.001)
async def main():
    async with pool.alease(gpus=4):
        tasks = [asyncio.create_task(one()) for _ in range(120)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if result is not None]
    print(len(refused) < 80, {str(error).partition(":")[0] for error in refused}, flush=True)
asyncio.run(main())
pool.close()
"""
    assert program(code).line() == "True {'too much waits for leases at once'}"


# Forks


def in_child(work: Callable[[], object]) -> int:
    """The pid of a fork that does `work`, and ends with status 0 if that raises nothing."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # whatever becomes of its parent
            work()
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_uses_the_pool_as_a_process_of_its_own(pool: Pool) -> None:
    def work() -> None:
        with pool.lease(timeout=SOON) as mine:
            assert mine.devices != lease.devices
            owners = [held.owner.pid for held in pool.snapshot().leases if held.owner]
            assert owners == [os.getppid(), os.getpid()]
        with pytest.raises(LeaseTimeout):
            pool.lease(gpus=4, timeout=0)

    with pool.lease() as lease:
        assert status_of(in_child(work)) == 0
        assert len(pool.snapshot().leases) == 1
    pool.lease(gpus=4, timeout=0).release()


def test_a_forked_child_holds_what_its_parent_held(pool: Pool) -> None:
    reader, writer = os.pipe()
    go_on, on = os.pipe()

    def work() -> None:
        assert not lease.released
        lease.fileno()
        os.read(go_on, 1)
        lease.release()
        assert lease.released
        os.write(writer, b"!")
        os.read(go_on, 1)

    lease = pool.lease(gpus=4)
    child = in_child(work)
    lease.release()
    with pytest.raises(LeaseTimeout):
        pool.lease(timeout=0.1)
    os.write(on, b"!")
    assert os.read(reader, 1) == b"!"
    pool.lease(gpus=4, timeout=SOON).release()
    os.write(on, b"!")
    assert status_of(child) == 0
    for descriptor in (reader, writer, go_on, on):
        os.close(descriptor)


def test_a_fork_that_serves_the_program_holds_nothing(pool: Pool) -> None:
    go_on, on = os.pipe()
    lease = pool.lease(gpus=4)
    with internal_fork():
        child = in_child(lambda: (os.read(go_on, 1), pool.lease(timeout=SOON).release()))
    assert not lease.released
    lease.release()
    pool.lease(gpus=4, timeout=SOON).release()
    os.write(on, b"!")
    assert status_of(child) == 0
    os.close(go_on)
    os.close(on)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forks_at_any_moment_keep_no_tickets_and_break_no_locks(pool: Pool) -> None:
    over = threading.Event()

    def compete() -> None:
        while not over.is_set():
            with contextlib.suppress(LeaseTimeout), pool.lease(gpus=3, timeout=0.01):
                over.wait(0.0005)

    threads = [threading.Thread(target=compete) for _ in range(3)]
    go_on, on = os.pipe()
    for thread in threads:
        thread.start()
    try:
        children = [in_child(lambda: (pool.snapshot(), os.read(go_on, 1))) for _ in range(8)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert pool.snapshot().queue == (), "no child has a ticket"
    os.write(on, b"!" * len(children))
    assert [status_of(child) for child in children] == [0] * len(children)
    assert nothing_is_left(pool)
    os.close(go_on)
    os.close(on)


def test_a_forked_child_does_not_wait_in_the_place_of_its_parent(pool: Pool, program: Callable[..., Program]) -> None:
    code = """
import os, threading, time
threading.Thread(target=pool.lease, daemon=True).start()
while not pool.snapshot().queue:
    time.sleep(0.005)
child = os.fork()
if child == 0:
    sys.stdout.close()
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
sys.stdin.readline()
"""
    with pool.lease(gpus=4):
        other = program(code)
        child = int(other.line())
        assert len(pool.snapshot().queue) == 1
        other.process.kill()
        other.process.wait()
        try:
            until(lambda: not pool.snapshot().queue)
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


# Using the devices in this process


@pytest.fixture
def _mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is taken away again, whatever the test leaves
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")


@pytest.mark.usefixtures("_mask")
def test_apply_lasts_until_the_lease_is_released(pool: Pool) -> None:
    with pool.lease(gpus=2) as lease:
        lease.apply()
        lease.apply()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


@pytest.mark.usefixtures("_mask")
def test_apply_leaves_alone_what_somebody_else_has_set_meanwhile(pool: Pool) -> None:
    with pool.lease() as lease:
        lease.apply()
        os.environ["CUDA_VISIBLE_DEVICES"] = "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.usefixtures("_mask")
def test_apply_refuses_other_devices_while_a_lease_is_applied(pool: Pool) -> None:
    with pool.lease() as first, pool.lease() as second:
        first.apply()
        with pytest.raises(ApplyError, match="uses simulated GPU 0, whose lease was applied"):
            second.apply()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        first.release()
        second.apply()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.usefixtures("_mask")
def test_apply_allows_two_leases_of_the_same_device(pool: Pool) -> None:
    with pool.lease(0.5) as first, pool.lease(0.25) as second:
        assert first.devices == second.devices
        first.apply()
        second.apply()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.usefixtures("_mask")
def test_apply_refuses_when_cuda_is_initialised(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no driver here that could open /dev/nvidia-uvm; that it is seen, a test on a GPU shows.
    monkeypatch.setattr(lease_module, "cuda_in_use", lambda: "CUDA is already initialised in this program")
    with pool.lease() as lease:
        with pytest.raises(ApplyError, match=r"already initialised.*call apply\(\) before.*env=lease.environment\(\)"):
            lease.apply()
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


# Copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, cloudpickle.dumps])
def test_a_lease_cannot_be_copied(pool: Pool, copied: Callable[[object], object]) -> None:
    for lease in (pool.lease(), pool.lease(gpus=0)):
        with lease:
            with pytest.raises(TypeError, match=r"neither copied nor pickled.*Remedy: .*pass_fds=lease.pass_fds"):
                copied(lease)
            with pytest.raises(TypeError, match="copied or pickled" if lease.devices else "copied nor pickled"):
                copied(lease._held or lease)
            assert not lease.released


def test_a_lease_cannot_be_given_to_a_call(pool: Pool) -> None:
    with pool.lease() as lease, gpu_launcher.PoolExecutor(gpus=0, pool=pool) as executor:
        error = executor.submit(id, lease).exception(SOON)
        assert isinstance(error, gpu_launcher.UnpicklableError)
        assert "neither copied nor pickled" in str(error)


# Ends


def test_a_lease_that_is_forgotten_is_given_back_with_a_warning(pool: Pool) -> None:
    lease = pool.lease(gpus=4)
    with pytest.warns(ResourceWarning, match="unreleased lease of simulated GPU 0-3"):
        del lease
    pool.lease(gpus=4, timeout=0).release()


def test_a_pool_that_is_forgotten_is_closed_with_a_warning(directory: Path) -> None:
    before = open_descriptors()
    pool = Pool("simulated:1", directory)
    pool.lease().release()
    with pytest.warns(ResourceWarning, match="unclosed Pool"):
        del pool
    assert open_descriptors() <= before


def test_a_lease_keeps_its_pool(directory: Path) -> None:
    lease = Pool("simulated:1", directory).lease()
    assert not lease.released
    lease.release()
    with pytest.warns(ResourceWarning, match="unclosed Pool"):
        del lease


def test_what_is_forgotten_in_a_cycle_is_given_back(pool: Pool) -> None:
    cycle: list[object] = [pool.lease(gpus=4)]
    cycle.append(cycle)
    del cycle
    with pytest.warns(ResourceWarning, match="unreleased"):
        gc.collect()
    pool.lease(gpus=4, timeout=0).release()


def test_closing_gives_everything_back_and_tells_who_waits(directory: Path) -> None:
    pool = Pool("simulated:1", directory)
    lease = pool.lease()
    told: list[BaseException] = []

    async def wait() -> None:
        async with pool.alease():
            pass

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except GpuLauncherError as error:
            told.append(error)

    threads = [
        threading.Thread(target=run, args=(work,)) for work in (pool.lease, pool.lease, lambda: asyncio.run(wait()))
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(pool.snapshot().queue) == 3)
    pool.close()
    pool.close()
    for thread in threads:
        thread.join()
    assert len(told) == 3
    assert "was closed while this waited" in str(told[0])
    assert lease.released
    lease.release()
    for use in (pool.lease, pool.snapshot, lambda: pool.lease(gpus=0), lambda: asyncio.run(wait())):
        with pytest.raises(ValueError, match="this pool is closed"):
            use()
    with Pool("simulated:1", directory) as another:
        another.lease(timeout=0).release()


# Seeing


def test_a_snapshot_says_who_has_and_who_waits(pool: Pool, program: Callable[..., Program]) -> None:
    other = program(HOLD.format(gpus=2), name="train.py")
    assert other.line() == "held"
    waiting = program(HOLD.format(gpus=3), name="later.py")
    until(lambda: pool.snapshot().queue)
    seen = pool.snapshot()
    assert [device.device for device in seen.devices] == list(pool.devices)
    assert [device.state.value for device in seen.devices] == ["held", "held", "free", "free"]
    (lease,) = seen.leases
    assert lease.owner is not None
    assert (lease.owner.pid, lease.owner.command) == (other.process.pid, "train.py")
    assert lease.devices == pool.devices[:2]
    assert lease.since is not None
    assert abs(lease.since - seen.time) < SOON
    (wait,) = seen.queue
    assert wait.owner is not None
    assert (wait.owner.pid, wait.owner.command) == (waiting.process.pid, "later.py")
    assert wait.request is not None
    assert wait.request.gpus == 3
    assert "held by" in wait.reason
    with pytest.raises(AttributeError):
        seen.queue = ()  # type: ignore[misc]


def test_a_pool_directory_that_is_made_anew_can_be_used_again(directory: Path, tmp_path: Path) -> None:
    with Pool("simulated:1", directory) as pool:
        pool.lease().release()
        directory.rename(tmp_path / "gone")
        with pytest.raises(PoolDirectoryError):
            pool.lease()
        pool.lease(timeout=0).release()
