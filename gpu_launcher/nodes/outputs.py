"""Brings the outputs of jobs back from nodes that do not share the sweep's directory (`outputs=fetch`).

Theory of operation. On such a node, the agent makes a directory at the same path (`PrivateDirectory`), so that a job
sees the paths at which its files will be. When a job has ended, the agent holds its `Ended` back and sends the job's
directory and report in small pieces (`OutputSender`). It sends the next piece only while little waits to be sent, so
messages of other jobs pass, and neither side keeps more than a few pieces in memory.

The head writes the pieces below `.gpu_launcher` (`output_receiver`). When all have arrived, it moves the directory to
its place, and then the report. So a report is there only if the whole directory is, and what a node leaves half sent
is never taken for a result.

What a node sends is data. Paths are confined to the job's directory, no link is followed, and of links only those are
made that name something below them in the job's directory. Other links and special files are left out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.node_messages import Ended
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.nodes.agent_messages import (
    OutputData,
    OutputDirectory,
    OutputFile,
    OutputLink,
    OutputPiece,
    OutputsBegin,
    OutputsEnd,
)
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.safe_files import make_directories, open_regular

PIECE_BYTES = 64 * 1024
"""Maximum number of bytes of a file that are sent together."""
MAX_PENDING = 256 * 1024
"""Number of unsent bytes at which no more pieces are sent."""
PIECES_AT_ONCE = 16
"""Maximum number of pieces that are sent before anything else is done."""
MAX_JOBS_IN_TURN = 4
"""Maximum number of jobs whose outputs are sent at the same time. Both sides keep files of each open."""
MARKER = "node"
"""Name of the file that says which sweep a private directory is for. Its agents have it locked."""


class PrivateDirectory:
    """The sweep's directory on a machine that does not share it. It is made for the sweep, and removed afterwards.

    Several agents of one sweep may have it in common: they are on one machine, or share a file system without the head.
    The last one removes it.
    """

    def __init__(self, path: Path, sweep: bytes) -> None:
        """Make the directory for a `sweep`. One that dead agents left is emptied. Raises OSError."""
        self.path = path
        self._above = next(above for above in path.parents if above.exists())
        """The part of the path that was there before."""
        marker = path / DIRECTORY / MARKER
        while True:
            make_directories(marker.parent)
            try:
                self._descriptor = open_regular(marker, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                continue  # its last agent removed the directory in this moment
            try:
                if self._take(sweep):
                    return
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # its last agent removed it in this moment

    def _take(self, sweep: bytes) -> bool:
        """Lock the marker. Returns whether it is still there."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        else:
            if os.fstat(self._descriptor).st_nlink:
                self._empty()
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, sweep, 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        if not os.fstat(self._descriptor).st_nlink:
            return False
        if os.pread(self._descriptor, len(sweep) + 1, 0) != sweep:
            raise OSError(errno.EBUSY, "another sweep uses it", str(self.path))
        return True

    def _empty(self) -> None:
        """Remove what agents left that were killed. Raises OSError if anything else is there."""
        ours = {entry.name for entry in os.scandir(self.path / DIRECTORY)} == {MARKER}
        left = [entry for entry in os.scandir(self.path) if entry.name != DIRECTORY]
        if not ours or (left and not os.fstat(self._descriptor).st_size):
            if not os.fstat(self._descriptor).st_size:
                (self.path / DIRECTORY / MARKER).unlink()
            raise OSError(errno.ENOTEMPTY, "other files are there", str(self.path))
        for entry in left:
            _remove(Path(entry.path))

    def remove(self) -> None:
        """Remove the directory, unless another agent uses it. Idempotent."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.path, ignore_errors=True)
            for above in self.path.parents:
                if above == self._above:
                    break
                above.rmdir()
        os.close(self._descriptor)
        self._descriptor = -1


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# The node's side.


@dataclass(slots=True)
class _Sending:
    """The outputs of a job that has ended."""

    ended: Ended
    pieces: Iterator[OutputPiece | None]


class OutputSender:
    """Sends the outputs of jobs that have ended, and then their results."""

    def __init__(self, stream: FrameStream, sweep: Path, reports: ReportFiles) -> None:
        """Send what is in the directory of the `sweep`, and `reports`."""
        self._stream = stream
        self._sweep = sweep
        self._reports = reports
        self._queue: deque[_Sending] = deque()

    @property
    def busy(self) -> bool:
        """Whether anything is left to send."""
        return bool(self._queue)

    @property
    def ready(self) -> bool:
        """Whether `send` can continue."""
        return self.busy and self._stream.pending < MAX_PENDING

    def add(self, ended: Ended) -> None:
        """Send the outputs of a job, and then its result."""
        result = ended.result
        ran = result.duration is not None or (result.outcome is Outcome.FAILED and not result.refused)
        directory = Path(result.log).parent if result.log is not None and ran else None
        report = self._reports.path(result.number)
        has_report = report.exists()
        if directory is None and not has_report:
            self._stream.send(ended)
            return
        if has_report and result.outcome in (Outcome.COMPLETED, Outcome.PRUNED):
            ended = Ended(replace(result, payload=None))  # it is in the report, and may be large
        self._queue.append(_Sending(ended, self._pieces_of(result, directory, report if has_report else None)))

    def stop(self, number: int) -> None:
        """Send no more outputs of a job, because the head cannot keep them."""
        for sending in self._queue:
            if sending.ended.result.number == number:
                sending.pieces = iter(())

    def give_up(self) -> None:
        """Send all results at once, without the outputs that have not been sent."""
        while self._queue:
            self._stream.send(self._queue.popleft().ended)

    def send(self) -> None:
        """Send pieces while there is room, of the jobs that ended first in turn."""
        for _ in range(PIECES_AT_ONCE):
            if not self.ready:
                return
            sending = self._queue.popleft()
            try:
                piece = next(sending.pieces)
            except StopIteration:
                self._stream.send(sending.ended)
                with contextlib.suppress(OSError):
                    self._reports.path(sending.ended.result.number).unlink()
                continue
            if piece is not None:
                self._stream.send(piece)
            self._queue.insert(min(len(self._queue), MAX_JOBS_IN_TURN - 1), sending)

    def _pieces_of(
        self, result: JobResult, directory: Path | None, report: Path | None
    ) -> Iterator[OutputPiece | None]:
        """Yield all pieces of a job's outputs. None is yielded where only time has passed."""
        number, left_out, problem = result.number, 0, None
        where = None if directory is None else _below(directory, self._sweep)
        only = None
        if directory is not None and where is None:
            problem = f"its directory {directory} is not below that of the sweep, {self._sweep}"
        elif where == ".":  # it has other jobs' files, too
            assert result.log is not None
            only = Path(result.log).name
        size = 0
        try:
            if directory is not None and problem is None:
                for _, status in _walk(directory, only):
                    size += status.st_size if stat.S_ISREG(status.st_mode) else 0
                    yield None
        except OSError as error:
            problem = reason_of(error)
        log = "" if result.log is None else Path(result.log).name
        yield OutputsBegin(number, where, size, log, result.attempts)
        try:
            if directory is not None and problem is None:
                for path, status in _walk(directory, only):
                    if (pieces := _pieces(number, directory, path, status)) is None:
                        left_out += 1
                    else:
                        yield from pieces
            if report is not None and problem is None:
                yield OutputFile(number, None, 0o644)
                yield from _content(number, report)
        except OSError as error:
            problem = reason_of(error)
        yield OutputsEnd(number, problem, left_out)


def _below(directory: Path, sweep: Path) -> str | None:
    """The path of a job's directory in that of the sweep. None if it is elsewhere.

    The two may be spelled differently: if the working directory is a link on this machine, a job sees where it leads.
    """
    for below, above in ((directory, sweep), (Path(os.path.realpath(directory)), Path(os.path.realpath(sweep)))):
        if below.is_relative_to(above) and ".." not in (relative := below.relative_to(above)).parts:
            return str(relative)
    return None


def _walk(directory: Path, only: str | None) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the paths below a directory, each directory before what it contains. Links are not followed."""
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if only is not None and entry.name != only:
                    continue
                status = entry.stat(follow_symlinks=False)
                path = Path(entry.path)
                yield path, status
                if stat.S_ISDIR(status.st_mode):
                    pending.append(path)


def _pieces(number: int, directory: Path, path: Path, status: os.stat_result) -> Iterator[OutputPiece] | None:
    """Return the pieces of a file, link or directory. None if it is left out."""
    name = str(path.relative_to(directory))
    if stat.S_ISDIR(status.st_mode):
        return iter([OutputDirectory(number, name)])
    if stat.S_ISREG(status.st_mode):
        return _file(number, name, path, status)
    if stat.S_ISLNK(status.st_mode) and is_confined(target := path.readlink()):
        return iter([OutputLink(number, name, str(target))])
    return None


def _file(number: int, name: str, path: Path, status: os.stat_result) -> Iterator[OutputPiece]:
    yield OutputFile(number, name, stat.S_IMODE(status.st_mode))
    yield from _content(number, path)


def _content(number: int, path: Path) -> Iterator[OutputPiece]:
    with open(open_regular(path), "rb", buffering=0) as file:
        while data := file.read(PIECE_BYTES):
            yield OutputData(number, data)


def is_confined(path: Path) -> bool:
    """Whether a path can only lead down, even if parts of it are links of which the same holds."""
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def reason_of(error: Exception) -> str:
    """Return why outputs could not be read or written."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.strerror}: {os.fsdecode(error.filename)}"
    return str(error)
