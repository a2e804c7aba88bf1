"""Which directory is the pool's, and what is said when it cannot be."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import FileLedger, choose_pool_directory, resolve_pool_directory
from gpu_launcher.leases.pool_directory import file_system_of
from gpu_launcher.model import Request
from tests.small_disk import mounted_tmpfs


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_LAUNCHER_POOL_DIR", raising=False)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs of its own with the given options."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    with ExitStack() as mounted:

        def do(options: str) -> Path:
            mounted.enter_context(mounted_tmpfs(tmp_path / "mounted", options))
            return tmp_path / "mounted"

        yield do


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that other users can reach, which those of pytest's are not."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as several users")
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        yield Path(parent)


def test_the_option_comes_before_the_environment_and_that_before_the_machines_own(tmp_path, monkeypatch):
    administrators, everybodys = tmp_path / "var-lib", tmp_path / "var-tmp"
    places = {"administrators": administrators, "everybodys": everybodys}
    assert resolve_pool_directory(None, **places) == everybodys
    administrators.mkdir()
    assert resolve_pool_directory(None, **places) == administrators
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", "")
    assert resolve_pool_directory(None, **places) == administrators
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(tmp_path / "environment"))
    assert resolve_pool_directory(None, **places) == tmp_path / "environment"
    assert resolve_pool_directory(str(tmp_path / "option"), **places) == tmp_path / "option"


def test_why_it_is_this_directory_is_told_without_making_it(tmp_path, monkeypatch):
    administrators, everybodys = tmp_path / "var-lib", tmp_path / "var-tmp"
    places = {"administrators": administrators, "everybodys": everybodys}
    assert choose_pool_directory(None, **places) == (everybodys, "the default")
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(tmp_path / "named"))
    assert choose_pool_directory(None, **places) == (tmp_path / "named", "named by GPU_LAUNCHER_POOL_DIR")
    assert choose_pool_directory("~", **places)[1] == "named by an option"
    assert list(tmp_path.iterdir()) == []


def test_a_relative_name_and_a_home_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_pool_directory("pool") == resolve_pool_directory("~/pool") == tmp_path / "pool"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_a_new_directory_is_open_to_everybody_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        directory = resolve_pool_directory(str(tmp_path / "pool"))
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert mode(directory) == mode(directory / "queue") == 0o1777
    assert list((directory / "queue").iterdir()) == []


def test_a_directory_that_exists_keeps_its_mode_and_gives_it_to_its_queue(tmp_path):
    (tmp_path / "private").mkdir(mode=0o700)
    directory = resolve_pool_directory(str(tmp_path / "private"))
    assert mode(directory) == mode(directory / "queue") == 0o700


@pytest.mark.root
def test_an_administrators_group_directory_works_for_its_members_alone(reachable):
    pool = reachable / "pool"
    pool.mkdir()
    os.chown(pool, 0, 60010)
    pool.chmod(0o2775)
    os.setegid(60010)
    try:
        with acting_as(60001):
            resolve_pool_directory(str(pool))
    finally:
        os.setegid(0)
    assert (pool / "queue").stat().st_gid == 60010
    assert mode(pool / "queue") == 0o2775
    with acting_as(60002), pytest.raises(PoolDirectoryError, match="cannot be written by user 60002: ask its owner"):
        resolve_pool_directory(str(pool))


@pytest.mark.root
def test_a_directory_that_is_closed_to_this_user_is_an_error_not_a_reason_to_go_elsewhere(reachable):
    (reachable / "pool").mkdir(mode=0o755)
    places = {"administrators": reachable / "pool", "everybodys": reachable / "other"}
    with acting_as(60001), pytest.raises(PoolDirectoryError, match="cannot be written by user 60001"):
        resolve_pool_directory(None, **places)
    assert not (reachable / "other").exists()


@pytest.mark.root
def test_two_users_can_use_the_common_directory_whoever_made_it(reachable):
    reachable.chmod(0o1777)
    for user in (60001, 60002):
        with acting_as(user):
            resolve_pool_directory(None, administrators=reachable / "none", everybodys=reachable / "common")


def test_a_file_in_its_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PoolDirectoryError, match=r"file: is not a directory: remove what is there$"):
        resolve_pool_directory(str(tmp_path / "file"))


def test_a_link_in_the_place_of_the_common_directory_is_not_followed(tmp_path):
    (tmp_path / "common").symlink_to(tmp_path)
    with pytest.raises(PoolDirectoryError, match="symbolic link"):
        resolve_pool_directory(None, administrators=tmp_path / "none", everybodys=tmp_path / "common")


def test_parents_are_not_made(tmp_path):
    with pytest.raises(PoolDirectoryError, match="neither does its parent"):
        resolve_pool_directory(str(tmp_path / "no" / "pool"))
    with pytest.raises(PoolDirectoryError, match="empty"):
        resolve_pool_directory("")


@pytest.mark.root
def test_a_read_only_file_system_is_named(mount):
    with pytest.raises(PoolDirectoryError, match="read-only file system"):
        resolve_pool_directory(str(mount("ro") / "pool"))


@pytest.mark.root
def test_a_full_disk_is_named_and_nothing_is_left(mount, devices, owner):
    point = mount("size=64k")
    pool = resolve_pool_directory(str(point / "pool"))
    with FileLedger(pool) as ledger:
        ticket = ledger.enqueue(Request(1), devices, owner)
        filler = point / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(b"x" * 100_000)
        with pytest.raises(PoolDirectoryError, match="disk is full") as error:
            resolve_pool_directory(str(pool))
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        with pytest.raises(PoolDirectoryError, match="disk is full"):
            ledger.enqueue(Request(1), devices, owner)
        with pytest.raises(PoolDirectoryError, match="disk is full"):
            ledger.claim(ticket)
        assert len(list((pool / "queue").iterdir())) == 1
        assert ledger.snapshot().leases == ()
        filler.unlink()
        assert ledger.claim(ticket) is not None


MOUNTS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
40 27 0:50 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
41 40 0:51 / /home/local\040disk rw,relatime - xfs /dev/vdb rw
42 27 0:52 / /scratch rw - lustre mgs:/scratch rw
43 27 0:53 / /data rw - autofs systemd-1 rw
44 27 0:54 / /data rw - fuse.sshfs server:/data rw
garbage
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/var/tmp/gpu-launcher", "ext4"),
        ("/homework", "ext4"),
        ("/home", "nfs4"),
        ("/home/ada/pool", "nfs4"),
        ("/home/local disk/pool", "xfs"),
        ("/scratch/pool", "lustre"),
        ("/data/pool", "fuse.sshfs"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_and_latest_mount(tmp_path, directory, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system_of(Path(directory), mounts) == kind
    assert file_system_of(Path(directory), tmp_path / "none") is None


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "afs", "fuse.sshfs"])
def test_a_network_file_system_is_refused_before_anything_is_made(tmp_path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {tmp_path} rw - {kind} server:/ rw\n")
    with pytest.raises(PoolDirectoryError, match=rf"network file system \({kind}\).*pool_dir"):
        resolve_pool_directory(str(tmp_path / "pool"), mountinfo=mounts)
    assert not (tmp_path / "pool").exists()


def test_a_file_system_without_working_locks_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda descriptor, operation: None)
        with pytest.raises(PoolDirectoryError, match="no effect"):
            resolve_pool_directory(str(tmp_path / "pool"))

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(PoolDirectoryError, match="has no file locks"):
            resolve_pool_directory(str(tmp_path / "pool"))
    assert list((tmp_path / "pool" / "queue").iterdir()) == []


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_pool_that_vanishes_under_a_ledger_is_an_error_not_a_second_pool(tmp_path, devices, owner, readable, how):
    pool = resolve_pool_directory(str(tmp_path / "pool"))
    with FileLedger(pool) as ledger:
        lease = ledger.claim(ledger.enqueue(Request(1), devices, owner))
        ticket = ledger.enqueue(Request(4), devices, owner)
        ledger.drain()
        (pool / "queue").rename(tmp_path / "elsewhere")
        if how == "replaced":
            (pool / "queue").mkdir()
        assert readable(ledger)
        for refused in (lambda: ledger.claim(ticket), lambda: ledger.enqueue(Request(1), devices, owner)):
            with pytest.raises(PoolDirectoryError, match="removed or replaced while in use"):
                refused()
        ledger.release(lease)


def test_without_inotify_a_ledger_polls_more_often(tmp_path, devices, owner, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "too many instances")

    monkeypatch.setattr("gpu_launcher.leases.inotify.Inotify", refuse)
    with FileLedger(resolve_pool_directory(str(tmp_path / "pool"))) as ledger:
        assert ledger.fileno() is None
        ledger.claim(ledger.enqueue(Request(4), devices, owner))
        ticket = ledger.enqueue(Request(1), devices, owner)
        for _ in range(10):
            assert ledger.claim(ticket) is None
        ledger.drain()
        assert ledger.poll_interval == 0.02


def test_systemd_tmpfiles_finds_the_directory_locked_while_a_ledger_is_open(tmp_path):
    pool = resolve_pool_directory(str(tmp_path / "pool"))
    cleaner = os.open(pool, os.O_RDONLY)
    with FileLedger(pool), FileLedger(pool), pytest.raises(BlockingIOError):
        fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(cleaner)


def test_a_pool_that_a_stopped_program_keeps_locked_is_still_found(tmp_path):
    directory = resolve_pool_directory(str(tmp_path / "pool"))
    held = os.open(directory / "queue", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert resolve_pool_directory(str(directory)) == directory
    finally:
        os.close(held)


def test_only_root_and_the_owner_of_the_pool_directory_go_before_others(reachable, devices, owner):
    directory = reachable / "pool"
    resolve_pool_directory(str(directory))
    os.chown(directory, 54321, 54321)
    said: list[str] = []
    places = []
    for user in (0, 54321, 54322):
        with acting_as(user), FileLedger(directory, warn=said.append) as ledger:
            for priority in (5, 7, -3):
                ledger.enqueue(Request(1, priority=priority), devices, owner)
            places.append([view.priority for view in ledger.snapshot().tickets])
    assert places == [[7, 5, -3], [7, 5, -3], [0, 0, -3]]
    assert said == [f"priority 5 counts as 0: above 0 is for root and for uid 54321, the owner of {directory}"]
