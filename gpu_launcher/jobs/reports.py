"""Reading the reports that jobs leave in files (`processes.messages.Report`).

A sweep's directory may be another user's, or writable for others, and unpickling a payload runs whatever it says. So a
payload is read only if the job itself announced the file's digest, over a channel that nobody else has, or if only
this user or root can have written the file. What only shows a job reads the header of its report.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.errors import ReportError
from gpu_launcher.processes.messages import Report
from gpu_launcher.safe_files import open_regular, read_all, why_untrusted

MAX_HEADER = 2**20
MAX_REPORT = 2**36
"""Bytes. More than any job returns; a sparse file of an exabyte is refused before it is read."""


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where the jobs of one launch leave their reports."""

    directory: Path
    launch: str = ""
    """The id of the launch, where several have the directory one after another."""

    def path(self, number: int) -> Path:
        """The file of one job."""
        return self.directory / (f"{number}.{self.launch}.report" if self.launch else f"{number}.report")


def read_report(path: Path, digest: bytes | None = None) -> Report:
    """Read a report with its payload; `digest` is the SHA-256 of the file, if the job announced one.

    Raises FileNotFoundError, and ReportError if it cannot be read or was possibly written by somebody else.
    """
    try:
        descriptor = open_regular(path)
        try:
            if os.fstat(descriptor).st_size > MAX_REPORT:
                raise ReportError(f"{path} is larger than {MAX_REPORT} bytes")
            why = why_untrusted(descriptor)
            if why is not None and digest is None:
                raise ReportError(f"{path} {why}, so its content is not loaded")
            data = read_all(descriptor, MAX_REPORT)
        finally:
            os.close(descriptor)
        if why is not None and hashlib.sha256(data).digest() != digest:
            raise ReportError(f"{path} {why}, and is not what the job wrote")
        return Report.load(data)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: {error}") from error


def read_header(path: Path) -> Report | None:
    """Read what a report says of its job, without the payload; None if that cannot be read."""
    try:
        descriptor = open_regular(path)
        try:
            return Report.load_header(os.read(descriptor, MAX_HEADER))
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return None
