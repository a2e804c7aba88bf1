"""Reads the reports that jobs leave in files (`processes.messages.Report`).

A sweep's directory may belong to another user, or be writable by others, and unpickling a payload runs any code that
it contains. So a payload is read only if the job itself announced the file's digest, over a channel that no other
process has, or if only this user or root can have written the file. Commands that only show a job read the header.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gpu_launcher.errors import ReportError
from gpu_launcher.processes.messages import Report
from gpu_launcher.safe_files import open_regular, read_all, why_untrusted

MAX_HEADER = 2**20
MAX_REPORT = 2**36
"""Maximum size of a report in bytes: more than any job returns. Larger files, such as sparse ones, are not read."""


def read_report(path: Path, digest: bytes | None = None) -> Report:
    """Read a report with its payload. `digest` is the SHA-256 of the file, if the job announced it.

    Raises FileNotFoundError, and ReportError if the file cannot be read or another user may have written it.
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
    """Read a report without its payload. Returns None if it cannot be read."""
    try:
        descriptor = open_regular(path)
        try:
            return Report.load_header(os.read(descriptor, MAX_HEADER))
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return None
