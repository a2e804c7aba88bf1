"""Chooses, opens and checks the pool directory.

All processes that share devices must agree on the directory. So a directory that cannot be used is an error, never a
reason to use another one: two pools on one machine would grant every device twice. No message suggests another
directory unless no program at all can use this one.

    <pool directory>/         created by an administrator, or by the first program that needs it, with mode 1777
    <pool directory>/queue/   all files, and the mutex; same mode

The owners of the directory and of the queue in it can remove and rename other users' files there, and can move the
whole queue away. The possible effects:

- Granting a device twice: impossible, see `gpu_launcher.leases.lock_marks`.
- Sending others elsewhere: impossible. The queue is opened relative to the pool directory. Symbolic links are not
  followed, except a link to the pool directory that root or this user made.
- Stopping the pool: possible. So root does not use another user's directory at the default place unless an option or
  variable names it.
- Going before others with `priority`: only if root made the owner the pool's administrator. That is the case if only
  root can write to the parent directory, such as /var/lib, where a user's program cannot have created the directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import uuid
from pathlib import Path

from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases.file_format import unpublished_name
from gpu_launcher.users import user_name

ENVIRONMENT_VARIABLE = "GPU_LAUNCHER_POOL_DIR"
ADMINISTRATORS = Path("/var/lib/gpu-launcher")
EVERYBODYS = Path("/var/tmp/gpu-launcher")
MOUNTINFO = Path("/proc/self/mountinfo")
QUEUE = "queue"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
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
    """Return the absolute path of the pool directory, after creating it if necessary and trying to write to it.

    `choose_pool_directory` chooses it. Raises PoolDirectoryError, with the remedy, if it is read-only, not writable for
    this user, full, not a directory, or on a file system that does not support locks or is shared with other machines.
    The keyword arguments are for tests.
    """
    directory, _ = choose_pool_directory(explicit, administrators=administrators, everybodys=everybodys)
    check_file_system(directory, mountinfo)
    with contextlib.ExitStack() as opened:
        try:
            make_directory(directory)
            pool = open_directory(directory)
            opened.callback(os.close, pool)
            queue = open_queue(pool, directory, make=True)
            opened.callback(os.close, queue)
            if os.geteuid() == 0 == os.fstat(pool).st_uid != os.fstat(queue).st_uid:
                os.fchown(queue, 0, -1)  # the first user in root's directory must not own the queue
            check_usable(queue, directory)
        except OSError as error:
            raise explained(directory, error) from error
    return directory


def choose_pool_directory(
    explicit: str | None = None, *, administrators: Path = ADMINISTRATORS, everybodys: Path = EVERYBODYS
) -> tuple[Path, str]:
    """Return the absolute path of the pool directory and the reason for the choice. Creates nothing.

    The choice is `explicit`, else the environment variable GPU_LAUNCHER_POOL_DIR, else `administrators` if it exists,
    else `everybodys`. The keyword arguments are for tests. Raises PoolDirectoryError if the name is invalid, or if the
    default directory cannot be trusted.
    """
    if explicit is not None:
        if not explicit:
            raise PoolDirectoryError("''", "the name is empty: name a directory, or leave the option out")
        return Path(explicit).expanduser().absolute(), "named by an option"
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser().absolute(), f"named by {ENVIRONMENT_VARIABLE}"
    if administrators.exists():
        return administrators, "made by an administrator"
    with contextlib.suppress(OSError):
        status = everybodys.lstat()
        user = user_name(status.st_uid)
        if stat.S_ISLNK(status.st_mode):
            raise PoolDirectoryError(
                str(everybodys), f"is a symbolic link that {user} made: {user} or root must remove it"
            )
        if os.geteuid() == 0 != status.st_uid:
            raise PoolDirectoryError(
                str(everybodys),
                f"belongs to {user}, who could stop what root runs, so root does not use it unasked: "
                f"{make_roots(everybodys)}, or name it: --pool-dir {everybodys}",
            )
    return everybodys, "the default"


def make_roots(directory: Path) -> str:
    """The commands by which root takes over the directory: the outer one first, so its owner cannot swap the inner."""
    return f"`chown -h root: {directory} && chown -h root: {directory / QUEUE}`"


def make_directory(directory: Path) -> None:
    """Create the pool directory with access for all users, in one step. An existing directory is not changed.

    If access were granted in a second step, another user's program could fail in between.
    """
    _make(directory, 0o1777)


def _make(name: Path | str, mode: int, within: int | None = None) -> None:
    umask = os.umask(0)
    try:
        os.mkdir(name, mode, dir_fd=within)
    except FileExistsError:
        pass
    finally:
        os.umask(umask)


def open_directory(directory: Path) -> int:
    """Open the pool directory. A symbolic link to it is followed only if root or this user made the link."""
    try:
        return os.open(directory, _DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
    status = directory.lstat()
    if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
        raise PoolDirectoryError(
            str(directory), f"is a symbolic link that {user_name(status.st_uid)} made: name the directory itself"
        )
    return os.open(directory, _DIRECTORY)


def open_queue(pool: int, directory: Path, *, make: bool) -> int:
    """Open the queue directory inside the pool directory, which is open as `pool`. Does not follow links.

    A new queue gets the group and the setgid bit of an administrator's directory by mkdir(2).
    """
    try:
        return os.open(QUEUE, _DIRECTORY | os.O_NOFOLLOW, dir_fd=pool)
    except FileNotFoundError:
        if not make:
            raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _not_a_queue(pool, directory) from error
        raise
    _make(QUEUE, stat.S_IMODE(os.fstat(pool).st_mode) & 0o1777, within=pool)
    return open_queue(pool, directory, make=False)


def _not_a_queue(pool: int, directory: Path) -> PoolDirectoryError:
    status = os.stat(QUEUE, dir_fd=pool, follow_symlinks=False)
    what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a directory"
    user = user_name(status.st_uid)
    return PoolDirectoryError(
        str(directory), f"{directory / QUEUE} is {what}, which {user} put there: {user} or root must remove it"
    )


def administrators(pool: int) -> frozenset[int]:
    """Return the users that may use a priority above 0 in the directory open as `pool`: root and its administrator."""
    status, parent = os.fstat(pool), os.stat("..", dir_fd=pool)
    given = parent.st_uid == 0 and not parent.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return frozenset({0, status.st_uid} if given else {0})


def check_usable(queue: int, directory: Path) -> None:
    """Try every operation that a ledger needs. Raises OSError, or PoolDirectoryError if locks have no effect."""
    mutex = os.open(".", _DIRECTORY, dir_fd=queue)
    try:
        # The files below are unpublished and not locked at first. Other processes remove such files under the mutex, so
        # it is needed here.
        if _locked_soon(mutex):
            _try_locks_and_links(queue, directory)
    finally:
        os.close(mutex)


def _locked_soon(mutex: int) -> bool:
    """Take the mutex. Return False if another process keeps it: then locks work, and a ledger names that process."""
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


def _try_locks_and_links(queue: int, directory: Path) -> None:
    name, link = unpublished_name(uuid.uuid4().hex), unpublished_name(uuid.uuid4().hex)
    first = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=queue)
    second = -1
    try:
        os.fchmod(first, 0o644)
        os.write(first, b"x" * 4096)
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = os.open(name, os.O_RDONLY, dir_fd=queue)
        try:
            fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            raise PoolDirectoryError(str(directory), f"file locks (flock) have no effect on its file system: {ANOTHER}")
        os.link(name, link, src_dir_fd=queue, dst_dir_fd=queue)
        os.unlink(link, dir_fd=queue)
    finally:
        os.unlink(name, dir_fd=queue)
        os.close(first)
        if second >= 0:
            os.close(second)


def check_file_system(directory: Path, mountinfo: Path = MOUNTINFO) -> None:
    """Raise PoolDirectoryError if the directory is, or would be, on a file system shared between machines.

    There, flock is emulated, forwarded or local, depending on server and mount options (flock(2), nfs(5)). If
    `mountinfo` cannot be read (see proc_pid_mountinfo(5)), the type is unknown and nothing is raised.
    """
    kind = file_system_of(directory, mountinfo)
    if kind in NETWORK_FILE_SYSTEMS:
        raise PoolDirectoryError(
            str(directory),
            f"is on a network file system ({kind}), where locks are not reliable and other machines' programs would "
            f"meet: {ANOTHER}, on a local disk",
        )


def file_system_of(directory: Path, mountinfo: Path = MOUNTINFO) -> str | None:
    """Return the type of the file system of `directory`, such as `ext4`; None if unknown."""
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
        # A later mount at the same point hides an earlier one.
        if real.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = rest.split(" ")[0], len(point.parts)
    return found


def _unescaped(point: str) -> str:
    for escaped, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        point = point.replace(escaped, character)
    return point


def explained(directory: Path, error: OSError) -> PoolDirectoryError:
    """Convert an OSError into an error that says what to do about the directory."""
    user = f"user {os.geteuid()}"
    problems = {
        errno.EROFS: "is on a read-only file system: mount it so that programs can write to it",
        errno.ENOSPC: "the disk is full (space or inodes): free some",
        errno.EDQUOT: "your disk quota is used up: free some space",
        errno.ENOTDIR: "is not a directory: remove what is there",
        errno.ENOENT: "does not exist, and neither does its parent: make it",
        errno.EACCES: f"cannot be written by {user}: ask its owner to `chmod 1777` it and its {QUEUE}/",
        errno.ENOLCK: f"its file system has no file locks (flock): {ANOTHER}",
        errno.EOPNOTSUPP: f"its file system has no file locks (flock) or hard links: {ANOTHER}",
        errno.EMFILE: "this process has too many open files: raise `ulimit -n`",
        errno.ESTALE: "was removed or replaced while in use: end the programs that use it, then start again",
    }
    problems[errno.EPERM] = problems[errno.EACCES]
    problems[errno.ENOSYS] = problems[errno.EOPNOTSUPP]
    problem = problems.get(
        error.errno or 0,
        f"cannot be used ({error.strerror or error}): `gpu-launcher doctor` may say more; with another directory, "
        "devices that are in use here would be given away again",
    )
    return PoolDirectoryError(str(directory), problem)
