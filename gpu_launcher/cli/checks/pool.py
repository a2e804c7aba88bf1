"""The pool directory: which, whose, on what, and what lies in it."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_launcher.cli.checks.finding import Finding, Level, halves, ok, problem, warning
from gpu_launcher.cli.checks.gpus import in_container
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import FileLedger, choose_pool_directory
from gpu_launcher.leases.directory import (
    EVERYBODYS,
    NETWORK_FILE_SYSTEMS,
    QUEUE,
    check_file_system,
    check_usable,
    explained,
    file_system_of,
)
from gpu_launcher.leases.mutex import holder_of
from gpu_launcher.users import user_name

CHECK = "pool"
MUTEX_PATIENCE = 1.0
"""Seconds; it is held for milliseconds."""
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
        status = (directory / QUEUE).stat()
    except FileNotFoundError:
        yield _not_there(directory)
        return
    except OSError as error:
        yield _failed(explained(directory, error))
        return
    yield from _access(directory, status)
    mutex = _mutex(directory / QUEUE)
    yield mutex
    if mutex.level is Level.OK:  # trying it out takes the mutex, and would wait for it
        yield _tried(directory)
    yield from _content(directory)


def _tried(directory: Path) -> Finding:
    try:
        check_usable(directory / QUEUE)
    except OSError as error:
        return _failed(explained(directory, error))
    except PoolDirectoryError as error:
        return _failed(error)
    return ok(CHECK, "files can be made, locked and removed in it")


def _failed(error: PoolDirectoryError) -> Finding:
    text, remedy = halves(error.problem)
    return problem(CHECK, f"pool directory {error.directory}: {text}", remedy)


def _place(directory: Path, why: str) -> Iterator[Finding]:
    kind = file_system_of(directory)
    where = f"{directory} ({why}), on {kind or 'a file system of unknown type'}"
    if kind in NETWORK_FILE_SYSTEMS:
        return  # `check_file_system` has raised
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


def _mutex(queue: Path) -> Finding:
    try:
        descriptor = os.open(queue, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return _failed(explained(queue.parent, error))
    try:
        until = time.monotonic() + MUTEX_PATIENCE
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return ok(CHECK, "nobody keeps it locked")
            if time.monotonic() >= until:
                holder = holder_of(descriptor)
                break
            time.sleep(0.01)
    finally:
        os.close(descriptor)
    who = str(holder) if holder else "a process that cannot be seen from here (another container's?)"
    remedy = f"continue it (`kill -CONT {holder.pid}`) or end it" if holder else "find it on the host, and end it"
    return problem(CHECK, f"nothing is granted, because {who} keeps it locked", remedy)


def _content(directory: Path) -> Iterator[Finding]:
    try:
        with FileLedger(directory) as ledger:
            view = ledger.snapshot()
            hears = ledger.fileno() is not None
    except PoolDirectoryError as error:
        yield _failed(error)
        return
    facts = [f"{len(view.leases)} leases and {len(view.tickets)} tickets live in it"]
    if view.stale:
        facts.append(f"{view.stale} left by programs that died do no harm, and are removed")
    yield ok(CHECK, "; ".join(facts))
    if any(lease.shares is None for lease in view.leases):
        yield problem(
            CHECK,
            "a lease in it cannot be read, so that every device counts as held",
            "let the other version of gpu-launcher that wrote it finish, or use one version for all",
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
            "no inotify instance is to be had, so that waiting programs look every 20 ms instead of being told",
            "raise `sysctl fs.inotify.max_user_instances`",
        )


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
