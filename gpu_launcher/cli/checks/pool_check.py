"""Checks the pool directory: its location, file system, owner, permissions and contents."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_launcher.cli.checks.finding import Finding, Level, halves, ok, problem, warning
from gpu_launcher.cli.checks.gpus import in_container
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import FileLedger, PoolView, choose_pool_directory
from gpu_launcher.leases.mutex import blame
from gpu_launcher.leases.pool_directory import (
    EVERYBODYS,
    NETWORK_FILE_SYSTEMS,
    QUEUE,
    administrators,
    check_file_system,
    check_usable,
    explained,
    file_system_of,
    make_roots,
    open_directory,
    open_queue,
)
from gpu_launcher.users import user_name
from gpu_launcher.wording import count

CHECK = "pool"
MUTEX_PATIENCE = 1.0
"""Seconds to wait for the mutex, which is normally held for milliseconds."""
_STICKY_AND_OPEN = stat.S_ISVTX | stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO


def examine_pool(pool_dir: str | None) -> Iterator[Finding]:
    try:
        directory, why = choose_pool_directory(pool_dir)
        check_file_system(directory)
    except PoolDirectoryError as error:
        yield _failed(error)
        return
    yield from _place(directory, why)
    try:
        status = (directory / QUEUE).lstat()
    except FileNotFoundError:
        yield _not_there(directory)
        return
    except OSError as error:
        yield _failed(explained(directory, error))
        return
    yield from _access(directory, status)
    mutex = _examine_queue(directory, _lock)
    yield mutex
    if mutex.level is Level.OK:  # the trial takes the mutex, and would block if it is held
        yield _examine_queue(directory, lambda queue: _try_files(queue, directory))
    yield from _content(directory)


def _examine_queue(directory: Path, examine: Callable[[int], Finding]) -> Finding:
    try:
        with _opened(directory) as (_, queue):
            return examine(queue)
    except OSError as error:
        return _failed(explained(directory, error))
    except PoolDirectoryError as error:
        return _failed(error)


def _try_files(queue: int, directory: Path) -> Finding:
    check_usable(queue, directory)
    return ok(CHECK, "files can be made, locked and removed in it")


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[tuple[int, int]]:
    """Open the pool directory and its queue."""
    pool = open_directory(directory)
    try:
        queue = open_queue(pool, directory, make=False)
        try:
            yield pool, queue
        finally:
            os.close(queue)
    finally:
        os.close(pool)


def _failed(error: PoolDirectoryError) -> Finding:
    text, remedy = halves(error.problem)
    return problem(CHECK, f"pool directory {error.directory}: {text}", remedy)


def _place(directory: Path, why: str) -> Iterator[Finding]:
    kind = file_system_of(directory)
    where = f"{directory} ({why}), on {kind or 'a file system of unknown type'}"
    if kind in NETWORK_FILE_SYSTEMS:
        return  # `check_file_system` raises for these
    if kind == "overlay" and in_container():
        yield warning(
            CHECK,
            f"{where}: a container's own, in which programs outside it are not seen, and give the same GPUs away",
            f"mount the machine's directory into the container: -v {EVERYBODYS}:{directory}",
        )
    elif directory.is_relative_to("/dev/shm") or directory.is_relative_to("/run/user"):
        yield warning(CHECK, f"{where}: a logout can clear it", "choose a directory on a disk, such as the default")
    else:
        yield ok(CHECK, where)
    if directory.is_relative_to("/var/tmp") and shutil.which("systemd-tmpfiles"):
        yield ok(CHECK, "systemd-tmpfiles clears old files there, but (since systemd 242) nothing of a pool in use")


def _not_there(directory: Path) -> Finding:
    there = directory if directory.exists() else directory.parent
    if not there.is_dir():
        return _failed(explained(directory, FileNotFoundError(2, "No such file or directory")))
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(CHECK, f"{directory} is not there, and this user may not make it", "ask for its parent's owner")
    return ok(CHECK, "it is not there yet: the first sweep makes it, open to every user")


def _access(directory: Path, queue: os.stat_result) -> Iterator[Finding]:
    status = directory.stat()
    mode = stat.S_IMODE(status.st_mode)
    shown = f"mode {mode:04o}, owner {user_name(status.st_uid)}, group {_group(status.st_gid)}"
    remedy = f"`chmod 1777 {directory} {directory / QUEUE}` opens it to everybody"
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield warning(CHECK, f"{shown}: every user can remove others' files, and with them their leases", remedy)
    elif mode & stat.S_IWOTH:
        yield ok(CHECK, f"{shown}: every user of the machine takes part")
    elif mode & stat.S_IWGRP:
        yield ok(CHECK, f"{shown}: the members of {_group(status.st_gid)} take part; others get an error")
    else:
        yield warning(CHECK, f"{shown}: only {user_name(status.st_uid)} takes part; others get an error", remedy)
    if stat.S_IMODE(queue.st_mode) & _STICKY_AND_OPEN != mode & _STICKY_AND_OPEN:
        yield warning(
            CHECK,
            f"{directory / QUEUE} has mode {stat.S_IMODE(queue.st_mode):04o}, unlike the directory it is in",
            f"`chmod {mode & _STICKY_AND_OPEN:04o} {directory / QUEUE}`",
        )
    yield from _owners(
        directory, status.st_uid, queue.st_uid, open_to_others=bool(mode & (stat.S_IWOTH | stat.S_IWGRP))
    )


def _owners(directory: Path, owner: int, of_queue: int, *, open_to_others: bool) -> Iterator[Finding]:
    """Check which users could stop the pool, and which may use a priority above 0."""
    if open_to_others and of_queue not in (0, owner):
        yield warning(
            CHECK,
            f"{directory / QUEUE} belongs to {user_name(of_queue)}, who can remove what others put there",
            f"as root: {make_roots(directory)}",
        )
    with _opened(directory) as (pool, _):
        first = administrators(pool)
    if owner in first:
        others = "" if owner == 0 else f" and {user_name(owner)}, whom root gave it"
        yield ok(CHECK, f"priority above 0 is for root{others}")
    elif open_to_others:
        yield warning(
            CHECK,
            f"no administrator made it, but {user_name(owner)}, who can remove what others put there; priority above 0 "
            "is for root alone",
            f"as root: {make_roots(directory)}",
        )
    else:
        yield ok(CHECK, "no administrator made it: priority above 0 is for root alone")


def _lock(queue: int) -> Finding:
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=queue)
    try:
        until = time.monotonic() + MUTEX_PATIENCE
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return ok(CHECK, "no program keeps it locked")
            if time.monotonic() >= until:
                found = blame(descriptor)
                break
            time.sleep(0.01)
    finally:
        os.close(descriptor)
    return problem(CHECK, f"nothing is granted, because it is kept locked by {found}", found.remedy)


def _content(directory: Path) -> Iterator[Finding]:
    try:
        with FileLedger(directory) as ledger:
            view = ledger.snapshot(thorough=True)
            hears = ledger.fileno() is not None
    except PoolDirectoryError as error:
        yield _failed(error)
        return
    facts = [f"{len(view.leases)} leases and {len(view.tickets)} tickets live in it"]
    if view.stale:
        facts.append(f"{view.stale} left by programs that died do no harm, and are removed")
    yield ok(CHECK, "; ".join(facts))
    for entry in view.unreadable:
        what = f"{directory / QUEUE / entry.name}, which {entry.user} keeps locked, cannot be read"
        if entry.lease:
            yield problem(
                CHECK,
                f"{what}, so that every device counts as held until the program ends that locks it: {entry.problem}",
                f"ask {entry.user}; if another version of gpu-launcher wrote it, use one version for all",
            )
        else:
            yield warning(CHECK, f"{what} and has no place in the queue: {entry.problem}", f"ask {entry.user}")
    for user in view.excessive:
        yield warning(CHECK, f"{user} has more files in it than count", f"ask {user}, or as root remove them")
    yield from _suspended(view)
    lost = [lease for lease in view.leases if lease.id.startswith("lost-")]
    if lost:
        yield warning(
            CHECK,
            f"{len(lost)} devices are held by leases whose files were removed or moved away",
            "nothing: they are free when the programs that hold them end",
        )
    if view.elsewhere:
        yield warning(
            CHECK,
            f"files of other machines lie in it ({', '.join(view.elsewhere)})",
            "give each machine a directory of its own; if this one was copied, remove the files",
        )
    if not hears:
        yield warning(
            CHECK,
            "no inotify instance is available, so waiting programs check every 20 ms",
            "raise `sysctl fs.inotify.max_user_instances`",
        )


def _suspended(view: PoolView) -> Iterator[Finding]:
    known = [*(lease.owner for lease in view.leases), *(ticket.owner for ticket in view.tickets)]
    owners = {owner for owner in known if owner is not None and owner.suspended}
    for pid, user in sorted({(owner.pid, owner.user) for owner in owners}):
        held = sum(lease.owner is not None and lease.owner.pid == pid for lease in view.leases)
        commands = sorted(owner.command.partition(" #")[0] for owner in owners if owner.pid == pid)
        has = f"has {count(held, 'lease')}" if held else "waits for devices"
        yield warning(
            CHECK,
            f"process {pid} of {user} ({commands[0]}) is suspended and {has}; jobs of a sweep that run keep running",
            f"continue it (`fg`, or kill -CONT {pid}), or end it (kill -CONT {pid}; kill {pid})",
        )


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
