"""The head's side of `nodes.outputs`: writes the outputs of jobs that nodes send, and says what became of them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from gpu_launcher.errors import ReportError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.failures import set_aside
from gpu_launcher.jobs.job import Cause, JobResult
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.nodes.agent_messages import (
    OutputData,
    OutputDirectory,
    OutputFile,
    OutputLink,
    OutputPiece,
    OutputsBegin,
    OutputsEnd,
)
from gpu_launcher.nodes.outputs import is_confined, reason_of
from gpu_launcher.safe_files import make_directories
from gpu_launcher.sizes import show_memory
from gpu_launcher.wording import job_name

STAGING = "outputs-"
"""Beginning of the names of directories with outputs that have not arrived completely."""


@dataclass(slots=True)
class _Receiving:
    """The outputs of a job, as far as they have arrived."""

    begin: OutputsBegin
    staging: Path
    file: int = -1
    problem: str | None = None
    left_out: int = 0
    stored: bool = False
    """Whether everything is in its place."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of a job's outputs."""

    problem: str | None
    """Why they are not here. None if they are."""
    left_out: int
    """How many links and special files were left out."""
    log: str | None = None
    """The job's log, if it is here. On the node, its path may have been spelled differently."""


def with_fetched(result: JobResult, fetched: Fetched, reports: ReportFiles) -> tuple[JobResult, str | None]:
    """Return the result of a job with what its report says, if its outputs are here. Otherwise it has failed.

    The second value is what the user should know of outputs that were left out. None if none were.
    """
    result = replace(result, log=fetched.log or result.log)
    problem = fetched.problem
    if result.outcome in (Outcome.COMPLETED, Outcome.PRUNED):
        if problem is None:
            try:
                result = replace(result, payload=read_report(reports.path(result.number)).payload)
            except (FileNotFoundError, ReportError) as error:
                # A job that was ended because it is pruned leaves no report.
                if result.outcome is Outcome.COMPLETED or isinstance(error, ReportError):
                    problem = str(error)
        if problem is not None:
            message = f"{result.outcome.value}, but its outputs could not be fetched: {problem}"
            result = replace(result, outcome=Outcome.FAILED, cause=Cause.EXCEPTION, message=message, payload=None)
    elif problem is not None and result.duration is not None:
        message = f"{result.message or 'ended'}; its outputs could not be fetched: {problem}"
        result = replace(result, message=message)
    if not fetched.left_out:
        return result, None
    left_out = f"{fetched.left_out} of its outputs are links that lead elsewhere, or special files"
    return result, f"{job_name(result.number, result.label)}: {left_out}, and were not fetched"


class OutputReceiver:
    """Writes the outputs that a node sends. See `nodes.outputs` for what is believed of a node."""

    def __init__(self, sweep: Path, reports: ReportFiles, logs: Sequence[str] = ()) -> None:
        """Write outputs below the directory of the `sweep`, and their `reports`.

        Files of earlier attempts with the names of logs are renamed and kept: of a job's own log, and of `logs`.
        """
        self._sweep = sweep
        self._reports = reports
        self._logs = logs
        self._home = sweep / DIRECTORY / f"{STAGING}{uuid4().hex[:12]}"
        self._receiving: dict[int, _Receiving] = {}

    def take(self, piece: OutputPiece) -> bool:
        """Write a piece. Returns False if no more of this job's outputs are wanted, because they cannot be written."""
        if isinstance(piece, OutputsBegin):
            self._receiving[piece.number] = _Receiving(piece, self._home / str(piece.number))
        receiving = self._receiving.get(piece.number)
        if receiving is None or receiving.problem is not None or receiving.stored:
            return True
        try:
            self._write(receiving, piece)
        except (OSError, ValueError) as error:
            receiving.problem = reason_of(error)
            self._drop(receiving)
            return False
        return True

    def finish(self, number: int) -> Fetched:
        """Forget the outputs of a job, and say what became of them. Called once its result has arrived."""
        receiving = self._receiving.pop(number, None)
        if receiving is None:
            return Fetched("its node did not send them", 0)
        if not receiving.stored and receiving.problem is None:
            receiving.problem = "its node did not send all of them"
        self._drop(receiving)
        begin, log = receiving.begin, None
        if receiving.stored and begin.directory is not None and (name := Path(begin.log).name):
            log = str(self._sweep / begin.directory / name)
        return Fetched(receiving.problem, receiving.left_out, log)

    def discard(self) -> None:
        """Remove what has not arrived completely. Idempotent."""
        for receiving in self._receiving.values():
            self._drop(receiving)
        self._receiving.clear()
        shutil.rmtree(self._home, ignore_errors=True)

    def _write(self, receiving: _Receiving, piece: OutputPiece) -> None:
        if not isinstance(piece, OutputData):
            self._close(receiving)
        match piece:
            case OutputsBegin(directory=directory, size=size):
                if directory not in (None, ".") and _check_path(directory)[0] == DIRECTORY:
                    raise ValueError(f"{directory!r} is not the directory of a job")
                total, _, free = shutil.disk_usage(self._sweep)
                if total and size > free:  # some file systems do not know their size
                    raise ValueError(f"they are {show_memory(size)}, and {self._sweep} has {show_memory(free)} left")
                shutil.rmtree(receiving.staging, ignore_errors=True)
                self._home.mkdir(0o700, exist_ok=True)
                receiving.staging.mkdir(0o755)
                (receiving.staging / "files").mkdir(0o755)
            case OutputDirectory(path=path):
                with _opened_parent(receiving.staging / "files", path) as (parent, name):
                    os.mkdir(name, 0o755, dir_fd=parent)
            case OutputLink(path=path, target=target):
                if not is_confined(Path(target)) or "\0" in target:
                    raise ValueError(f"{path!r} is a link to {target!r}, which leads out of the job's directory")
                with _opened_parent(receiving.staging / "files", path) as (parent, name):
                    os.symlink(target, name, dir_fd=parent)
            case OutputFile(path=path, mode=mode):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                if path is None:
                    receiving.file = os.open(receiving.staging / "report", flags, 0o644)
                else:
                    with _opened_parent(receiving.staging / "files", path) as (parent, name):
                        receiving.file = os.open(name, flags, mode & 0o755 | 0o600, dir_fd=parent)
            case OutputData(data=data):
                if receiving.file < 0:
                    raise ValueError("they are not in order")
                view = memoryview(data)
                while view:
                    view = view[os.write(receiving.file, view) :]
            case OutputsEnd(problem=problem, left_out=left_out):
                receiving.left_out = left_out
                if problem is not None:
                    raise ValueError(problem)
                self._store(receiving)

    def _store(self, receiving: _Receiving) -> None:
        """Move everything to its place, the report last."""
        begin, files, report = receiving.begin, receiving.staging / "files", receiving.staging / "report"
        if begin.directory is not None:
            target = self._sweep / begin.directory
            if target != self._sweep and not target.parent.resolve().is_relative_to(self._sweep.resolve()):
                raise ValueError(f"{target.parent} leads out of the sweep's directory")
            make_directories(target.parent)
            for name in {Path(begin.log).name, *self._logs} - {""}:
                if os.path.lexists(target / name):  # of an earlier attempt
                    set_aside(str(target / name), max(1, begin.attempt - 1))
            _merge(files, target)
        if report.exists():
            report.replace(self._reports.path(begin.number))
        receiving.stored = True

    def _close(self, receiving: _Receiving) -> None:
        descriptor, receiving.file = receiving.file, -1
        if descriptor >= 0:
            os.close(descriptor)  # may raise, as on a full disk

    def _drop(self, receiving: _Receiving) -> None:
        with contextlib.suppress(OSError):
            self._close(receiving)
        shutil.rmtree(receiving.staging, ignore_errors=True)


def remove_leftovers(sweep: Path) -> None:
    """Remove what heads that were killed have received in part. Called while the sweep's directory is locked."""
    for left in (sweep / DIRECTORY).glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def _merge(source: Path, target: Path) -> None:
    """Move a directory, or what it contains if there is one at its place. Raises OSError."""
    if not os.path.lexists(target):
        source.rename(target)
        return
    if target.is_symlink() or not target.is_dir():
        raise OSError(errno.EEXIST, "something else is at its place", str(target))
    for entry in list(os.scandir(source)):
        if entry.is_dir(follow_symlinks=False):
            _merge(Path(entry.path), target / entry.name)
        else:
            Path(entry.path).replace(target / entry.name)


def _check_path(path: str) -> list[str]:
    """Return the parts of a path that can only lead down. Raises ValueError for any other."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{path!r} is not a path in the job's directory")
    return parts


@contextlib.contextmanager
def _opened_parent(root: Path, path: str) -> Iterator[tuple[int, str]]:
    """Open the directory that contains a path below `root`, without following links."""
    *above, name = _check_path(path)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    parent = os.open(root, flags)
    try:
        for part in above:
            below = os.open(part, flags, dir_fd=parent)
            os.close(parent)
            parent = below
        yield parent, name
    finally:
        os.close(parent)
