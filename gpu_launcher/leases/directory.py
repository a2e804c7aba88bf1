"""Where the pool is: choosing and checking the pool directory.

All processes that share devices must agree on it, so a directory that cannot be used is an error, never a reason to
take another one: two pools on one machine would grant every device twice.

    <pool directory>/         made by an administrator, or with mode 1777
    <pool directory>/queue/   all files, and the mutex; same mode
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import uuid
from pathlib import Path

from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases.records import unpublished_name

ENVIRONMENT_VARIABLE = "GPU_LAUNCHER_POOL_DIR"
ADMINISTRATORS = Path("/var/lib/gpu-launcher")
EVERYBODYS = Path("/var/tmp/gpu-launcher")
MOUNTINFO = Path("/proc/self/mountinfo")
QUEUE = "queue"
ANOTHER = (
    f"choose another with the option `pool_dir` (`--pool-dir`) or {ENVIRONMENT_VARIABLE}, the same for every program"
)

NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncp", "ncpfs"}
    | {"nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "fuse.ceph", "fuse.davfs2"}
    | {"fuse.gcsfuse", "fuse.glusterfs", "fuse.mfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "fuse.vmhgfs-fuse"}
)


def resolve_pool_directory(
    explicit: str | None = None,
    *,
    administrators: Path = ADMINISTRATORS,
    everybodys: Path = EVERYBODYS,
    mountinfo: Path = MOUNTINFO,
) -> Path:
    """Return the pool directory, absolute, made if need be, and proven usable by writing to it.

    Which one that is, `choose_pool_directory` says. Raises PoolDirectoryError, with the remedy, if it is read-only, not
    writable for this user, full, no directory, or on a file system that cannot hold locks or is shared with other
    machines. The keyword arguments are for tests.
    """
    directory, _ = choose_pool_directory(explicit, administrators=administrators, everybodys=everybodys)
    check_file_system(directory, mountinfo)
    try:
        make_directory(directory, 0o1777)
        check_usable(make_queue(directory))
    except OSError as error:
        raise explained(directory, error) from error
    return directory


def choose_pool_directory(
    explicit: str | None = None, *, administrators: Path = ADMINISTRATORS, everybodys: Path = EVERYBODYS
) -> tuple[Path, str]:
    """Return the name of the pool directory, absolute, and why it is that one. Makes nothing.

    `explicit`, else the environment variable GPU_LAUNCHER_POOL_DIR, else `administrators` where it exists, else
    `everybodys`. The keyword arguments are for tests. Raises PoolDirectoryError for a name that cannot be meant.
    """
    if explicit is not None:
        if not explicit:
            raise PoolDirectoryError("''", "the name is empty: name a directory, or leave the option out")
        return Path(explicit).expanduser().absolute(), "named by an option"
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser().absolute(), f"named by {ENVIRONMENT_VARIABLE}"
    if administrators.exists():
        return administrators, "made by an administrator"
    if everybodys.is_symlink():
        raise PoolDirectoryError(str(everybodys), f"is a symbolic link that somebody made: remove it, or {ANOTHER}")
    return everybodys, "the default"


def make_directory(directory: Path, mode: int) -> None:
    """Make the directory with exactly this mode, in one step; one that exists is left as it is.

    Made with less at first and widened afterwards, another user's program would find it closed in between.
    """
    umask = os.umask(0)
    try:
        directory.mkdir(mode)
    except FileExistsError:
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None
    finally:
        os.umask(umask)


def make_queue(directory: Path) -> Path:
    """Return the directory inside the pool directory that holds its files, made if need be.

    mkdir(2) hands on the group and the setgid bit of an administrator's directory.
    """
    queue = directory / QUEUE
    make_directory(queue, stat.S_IMODE(directory.stat().st_mode) & 0o1777)
    return queue


def check_usable(queue: Path) -> None:
    """Try everything a ledger needs. Raises OSError, or PoolDirectoryError where locks have no effect."""
    mutex = os.open(queue, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Others remove, under the mutex, what they find unpublished and unlocked: at first these files are both.
        if _locked_soon(mutex):
            _try_locks_and_links(queue)
    finally:
        os.close(mutex)


def _locked_soon(mutex: int) -> bool:
    """Take the mutex; False if somebody keeps it, who by that shows that locks work, and whom a ledger will name."""
    deadline = time.monotonic() + 1.0
    while True:
        try:
            fcntl.flock(mutex, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        else:
            return True


def _try_locks_and_links(queue: Path) -> None:
    name = queue / unpublished_name(uuid.uuid4().hex)
    twin = queue / unpublished_name(uuid.uuid4().hex)
    first = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    second = -1
    try:
        os.fchmod(first, 0o644)
        os.write(first, b"x" * 4096)
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            raise PoolDirectoryError(
                str(queue.parent), f"file locks (flock) have no effect on its file system: {ANOTHER}"
            )
        twin.hardlink_to(name)
        twin.unlink()
    finally:
        name.unlink()
        os.close(first)
        if second >= 0:
            os.close(second)


def check_file_system(directory: Path, mountinfo: Path = MOUNTINFO) -> None:
    """Raise PoolDirectoryError if the directory is, or would be, on a file system shared between machines.

    There, flock is emulated, forwarded or local, depending on server and mount options (flock(2), nfs(5)). Where
    `mountinfo` cannot be read (see proc_pid_mountinfo(5)), nothing is known and nothing raised.
    """
    kind = file_system_of(directory, mountinfo)
    if kind in NETWORK_FILE_SYSTEMS:
        raise PoolDirectoryError(
            str(directory),
            f"is on a network file system ({kind}), where locks are not reliable and other machines' programs would "
            f"meet: {ANOTHER}, on a local disk",
        )


def file_system_of(directory: Path, mountinfo: Path = MOUNTINFO) -> str | None:
    """Return the type of the file system that `directory` is on, such as `ext4`; None if it cannot be told."""
    real = directory.resolve()
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    found, depth = None, -1
    for line in lines:
        fields, separator, rest = line.partition(" - ")
        columns = fields.split(" ")
        if not separator or len(columns) < 5 or not rest:
            continue
        point = Path(_unescaped(columns[4]))
        # A later mount on the same point hides an earlier one.
        if real.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = rest.split(" ")[0], len(point.parts)
    return found


def _unescaped(point: str) -> str:
    for escaped, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        point = point.replace(escaped, character)
    return point


def explained(directory: Path, error: OSError) -> PoolDirectoryError:
    """Return what the error means for the person who chose the directory."""
    user = f"user {os.geteuid()}"
    problems = {
        errno.EROFS: f"is on a read-only file system: {ANOTHER}",
        errno.ENOSPC: f"the disk is full (space or inodes): free some, or {ANOTHER}",
        errno.EDQUOT: f"your disk quota is used up: free some space, or {ANOTHER}",
        errno.ENOTDIR: f"is not a directory: remove what is there, or {ANOTHER}",
        errno.ENOENT: f"does not exist, and neither does its parent: make it, or {ANOTHER}",
        errno.EACCES: f"cannot be written by {user}: ask its owner to `chmod 1777` it and its {QUEUE}/, or {ANOTHER}",
        errno.ENOLCK: f"its file system has no file locks (flock): {ANOTHER}",
        errno.EOPNOTSUPP: f"its file system has no file locks (flock) or hard links: {ANOTHER}",
        errno.EMFILE: "this process has too many open files: raise `ulimit -n`",
        errno.ESTALE: "was removed or replaced while in use: end the programs that use it, then start again",
    }
    problems[errno.EPERM] = problems[errno.EACCES]
    problems[errno.ENOSYS] = problems[errno.EOPNOTSUPP]
    problem = problems.get(error.errno or 0, f"cannot be used ({error.strerror or error}): {ANOTHER}")
    return PoolDirectoryError(str(directory), problem)
