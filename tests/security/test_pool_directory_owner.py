"""What the owner of a pool directory can do to those who use it, and what keeps the pool locked."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import FileLedger, choose_pool_directory, describe_wait, mutex, resolve_pool_directory
from gpu_launcher.leases.pool_directory import EVERYBODYS, explained
from gpu_launcher.model import Device, DeviceKind, Owner, Request
from gpu_launcher.users import user_name
from tests.security.accounts import ADA, GRACE, MALLORY, acting_as
from tests.waiting import until

OWNER = Owner(os.getpid(), "", "train.py")


def devices(uuids: str) -> list[Device]:
    return [Device(uuid, 0, "simulated", DeviceKind.SIMULATED) for uuid in uuids]


@pytest.fixture
def mallorys(parent: Path) -> Path:
    """A pool directory that a program of an unprivileged user has made."""
    parent.chmod(0o1777)
    with acting_as(MALLORY):
        return resolve_pool_directory(str(parent / "pool"))


def lease(directory: Path, uuids: str = "A") -> tuple[object, object]:
    ledger = FileLedger(directory)
    held = ledger.claim(ledger.enqueue(Request(len(uuids)), devices(uuids), Owner(os.getpid(), "", "ada.py")))
    assert held is not None
    return ledger, held


# Symbolic links, and root.


@pytest.mark.root
@pytest.mark.usefixtures("protected")
@pytest.mark.parametrize("target", ["a directory", "nothing"])
def test_a_link_in_place_of_the_queue_is_not_followed_even_by_root(parent, mallorys, target):
    (parent / "roots").mkdir()
    (parent / "roots" / f"lease-{'0' * 32}").touch()
    (mallorys / "queue").rmdir()
    with acting_as(MALLORY):
        (mallorys / "queue").symlink_to(parent / ("roots" if target == "a directory" else "none"))
    for use in (resolve_pool_directory, lambda path: FileLedger(Path(path))):
        with pytest.raises(PoolDirectoryError, match=f"symbolic link, which uid {MALLORY} put there") as error:
            use(str(mallorys))
        assert "pool_dir" not in str(error.value)
    assert len(list((parent / "roots").iterdir())) == 1
    assert not (parent / "none").exists()


@pytest.mark.root
@pytest.mark.usefixtures("protected")
def test_a_link_to_a_pool_is_followed_if_its_user_or_root_made_it(parent):
    directory = resolve_pool_directory(str(parent / "pool"))
    parent.chmod(0o1777)
    for maker, user, followed in ((0, ADA, True), (ADA, ADA, True), (MALLORY, ADA, False), (MALLORY, 0, False)):
        link = parent / f"link-{maker}-{user}"
        with acting_as(maker):
            link.symlink_to(directory)
        with acting_as(user):
            if followed:
                resolve_pool_directory(str(link))
            else:
                with pytest.raises(PoolDirectoryError):
                    resolve_pool_directory(str(link))


@pytest.mark.root
def test_root_uses_another_users_directory_only_if_it_is_named(mallorys, monkeypatch):
    monkeypatch.delenv("GPU_LAUNCHER_POOL_DIR", raising=False)
    places = {"administrators": mallorys / "none", "everybodys": mallorys}
    with pytest.raises(PoolDirectoryError, match=f"belongs to uid {MALLORY}.*chown -h root: {mallorys} .*or name it"):
        resolve_pool_directory(None, **places)
    assert resolve_pool_directory(str(mallorys)) == mallorys
    with acting_as(ADA):
        assert choose_pool_directory(None, **places)[0] == mallorys
    os.chown(mallorys, 0, 0)
    assert resolve_pool_directory(None, **places) == mallorys
    assert (mallorys / "queue").stat().st_uid == 0, "root makes the queue in its own directory its own"


@pytest.mark.root
def test_who_made_the_directory_may_not_go_before_others_in_it(mallorys):
    said: list[str] = []
    with acting_as(MALLORY), FileLedger(mallorys, warn=said.append) as ledger:
        ledger.enqueue(Request(1, priority=5), devices("A"), OWNER)
        assert [view.priority for view in ledger.snapshot().tickets] == [0]
    assert said == [f"priority 5 counts as 0: above 0 is for root: {mallorys} has no other administrator"]
    with FileLedger(mallorys) as ledger:
        ledger.enqueue(Request(1, priority=5), devices("A"), OWNER)
        assert [view.priority for view in ledger.snapshot().tickets] == [5]


def test_no_error_of_a_directory_in_use_advises_another():
    for number in errno.errorcode:
        problem = explained(EVERYBODYS, OSError(number, os.strerror(number))).problem
        if "file locks" not in problem:  # then no program can use it
            assert "choose another" not in problem


# No second grant.


def moved_queue(pool: Path) -> None:
    (pool / "queue").rename(pool / "old")


def replaced_queue(pool: Path) -> None:
    moved_queue(pool)
    (pool / "queue").mkdir()
    (pool / "queue").chmod(0o1777)


def copied_queue(pool: Path) -> None:
    moved_queue(pool)
    shutil.copytree(pool / "old", pool / "queue")
    (pool / "queue").chmod(0o1777)


def moved_pool(pool: Path) -> None:
    pool.rename(pool.with_name("gone"))
    resolve_pool_directory(str(pool))


def removed_names(pool: Path) -> None:
    for path in (pool / "queue").iterdir():
        path.unlink()


def renamed_files(pool: Path) -> None:
    for number, path in enumerate((pool / "queue").iterdir()):
        path.rename(path.with_name(f"file{number}"))


TRICKS = [moved_queue, replaced_queue, copied_queue, moved_pool, removed_names, renamed_files]


@pytest.mark.root
@pytest.mark.parametrize("trick", TRICKS, ids=[trick.__name__ for trick in TRICKS])
def test_a_device_is_not_given_away_while_its_holder_lives(mallorys, start, trick: Callable[[Path], None]):
    ada = start(ADA, lambda: lease(mallorys))
    with acting_as(MALLORY):
        trick(mallorys)
    with acting_as(GRACE), FileLedger(mallorys) as ledger:
        ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
        assert ledger.claim(ticket) is None
        view = ledger.snapshot()
        assert describe_wait(view, view.tickets[0], str) == f"waits for 1 more of A; held by {user_name(ADA)}"
        assert ledger.claim(ledger.enqueue(Request(1), devices("AB"), OWNER)).uuids == ("B",)
        ada.kill()
        assert ledger.claim(ticket) is not None


@pytest.mark.root
def test_a_job_that_outlives_its_program_keeps_a_device_without_a_file(mallorys, start):
    def program() -> None:
        kept = lease(mallorys)
        if os.fork():
            removed_names(mallorys)  # its own files, which its user may remove
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(said, str(os.getpid()).encode())
        while kept:
            signal.pause()

    heard, said = os.pipe()
    process = os.fork()
    if not process:
        os.setresgid(ADA, ADA, ADA)
        os.setresuid(ADA, ADA, ADA)
        program()
    job = int(os.read(heard, 20))
    os.waitpid(process, 0)
    try:
        with acting_as(GRACE), FileLedger(mallorys) as ledger:
            ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
            assert ledger.claim(ticket) is None
    finally:
        os.kill(job, signal.SIGKILL)
    with acting_as(GRACE), FileLedger(mallorys) as ledger:
        ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
        until(lambda: ledger.claim(ticket), "the device is not free")


@pytest.mark.parametrize("prefix", ["lease-", "twin-"])
def test_a_holder_gives_a_lost_name_back_to_its_file(tmp_path, prefix):
    directory = resolve_pool_directory(str(tmp_path / "pool"))
    ledger, held = lease(directory)
    before = sorted((directory / "queue").iterdir())
    (name,) = (directory / "queue").glob(f"{prefix}*")
    name.unlink()
    ledger.drain()
    assert sorted((directory / "queue").iterdir()) == before
    assert os.fstat(held.fileno()).st_nlink == 2
    ledger.close()


@pytest.mark.parametrize("trick", [removed_names, moved_queue, replaced_queue], ids=["removed", "moved", "replaced"])
def test_a_holder_whose_files_are_gone_says_so_once(tmp_path, trick):
    directory = resolve_pool_directory(str(tmp_path / "pool"))
    said: list[str] = []
    with FileLedger(directory, warn=said.append) as ledger:
        assert ledger.claim(ledger.enqueue(Request(1), devices("A"), OWNER))
        trick(directory)
        ledger.drain()
        ledger.drain()
        (sentence,) = said
        assert "were removed or moved away" in sentence
        assert "A." in sentence


# Blame.


def locked(queue: Path, mode: int) -> int:
    descriptor = os.open(queue, os.O_RDONLY)
    fcntl.flock(descriptor, mode)
    return descriptor


def child_of_a_dead_process(queue: Path, mode: int) -> int:
    """The process that takes the lock ends; what it has forked holds it. Returns the pid of that one."""
    heard, said = os.pipe()
    if not os.fork():
        descriptor = locked(queue, mode)
        if not os.fork():
            os.write(said, str(os.getpid()).encode())
            signal.pause()
        os._exit(descriptor and 0)
    os.wait()
    return int(os.read(heard, 20))


@pytest.fixture
def common(parent: Path) -> Path:
    return resolve_pool_directory(str(parent / "pool"))


def said_of(directory: Path, user: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mutex, "NAMED_AFTER_SECONDS", 0.0)
    said: list[str] = []
    with acting_as(user), FileLedger(directory, warn=said.append) as ledger:
        ledger.enqueue(Request(1), devices("A"), OWNER)
    (sentence,) = said
    return sentence


@pytest.mark.root
@pytest.mark.parametrize("mode", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["exclusive", "shared"])
def test_root_is_told_for_certain_who_keeps_the_pool_locked(common, start, monkeypatch, mode):
    mallory = start(MALLORY, lambda: locked(common / "queue", mode))
    sentence = said_of(common, 0, monkeypatch)
    assert f"by process {mallory.pid} ({user_name(MALLORY)}, " in sentence
    assert sentence.endswith(f": end it (kill {mallory.pid})")


@pytest.mark.root
@pytest.mark.parametrize("mode", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["exclusive", "shared"])
def test_nobody_is_told_to_signal_a_process_that_may_not_hold_the_lock(common, start, monkeypatch, mode):
    mallory = start(MALLORY, lambda: locked(common / "queue", mode))
    sentence = said_of(common, ADA, monkeypatch)
    assert f"by process {mallory.pid} ({user_name(MALLORY)}, " in sentence
    assert "or by a process that it has started" in sentence
    assert "kill" not in sentence
    assert "run by root" in sentence


@pytest.mark.root
@pytest.mark.parametrize("mode", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["exclusive", "shared"])
def test_a_dead_process_is_not_blamed_for_the_lock_its_child_holds(common, start, monkeypatch, mode):
    note = common / "pid"
    start(MALLORY, lambda: note.write_text(str(child_of_a_dead_process(common / "queue", mode))))
    child = int(note.read_text())
    try:
        assert said_of(common, 0, monkeypatch).endswith(f": end it (kill {child})")
        sentence = said_of(common, ADA, monkeypatch)
        assert "a process that this user may not look at" in sentence
        assert "which took the lock, has ended" in sentence
        assert "kill" not in sentence
    finally:
        os.kill(child, signal.SIGKILL)


IN_A_CONTAINER = """
import sys
from pathlib import Path
from gpu_launcher.leases import FileLedger, mutex
from gpu_launcher.model import Device, DeviceKind, Owner, Request
mutex.NAMED_AFTER_SECONDS = 0.0
with FileLedger(Path(sys.argv[1]), warn=print) as ledger:
    ledger.enqueue(Request(1), [Device("A", 0, "", DeviceKind.CPU)], Owner(1, "", ""))
"""


@pytest.mark.root
def test_a_lock_from_another_container_is_blamed_on_nobody(common, start):
    start(MALLORY, lambda: locked(common / "queue", fcntl.LOCK_EX))
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", IN_A_CONTAINER, str(common)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    if "unshare" in done.stderr:
        pytest.skip(f"no namespace of process ids to be had: {done.stderr.strip()}")
    assert "by a process that cannot be seen from here" in done.stdout, done
    assert "kill" not in done.stdout


@pytest.mark.root
def test_a_lease_without_a_file_is_seen_from_another_container(common, start):
    start(ADA, lambda: lease(common))
    removed_names(common)
    program = (
        IN_A_CONTAINER.replace("    ledger.enqueue", "    ticket = ledger.enqueue")
        + "    print(ledger.claim(ticket))\n"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program, str(common)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    if "unshare" in done.stderr:
        pytest.skip(f"no namespace of process ids to be had: {done.stderr.strip()}")
    assert done.stdout == "None\n", done
