"""The log of gpu-launcher's decisions, which `GPU_LAUNCHER_LOG=debug` turns on.

Its loggers are children of `gpu_launcher.decisions`. The logger `gpu_launcher` is an ordinary one, for messages to
users. All processes of a sweep append to one file. Each line is one write to a descriptor that was opened with
O_APPEND, so lines of different processes never mix:

    2026-11-29T08:31:05.123 DEBUG node1 fork server[4711] processes.fork_server: supervisor 3 has process id 4715

The file is `gpu-launcher.log` in the sweep's directory. Without such a directory (calls, records, `optimize`,
`gpu-launcher run`), lines go to the program's standard error. `GPU_LAUNCHER_LOG=debug:PATH` names a file for both
cases.

The user's logging is not affected. Records do not propagate to the root logger, so they do not appear in a job's log or
on the console. Configuring `logging` does not disable our loggers. Without the variable nothing is logged, and a log
call costs one comparison of two numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import sys
from collections.abc import Mapping
from pathlib import Path

from gpu_launcher.descriptors import has_room
from gpu_launcher.safe_files import open_regular
from gpu_launcher.text import one_line

VARIABLE = "GPU_LAUNCHER_LOG"
FILE = "gpu-launcher.log"
"""Name of the log in a sweep's directory."""

_ROOT = "gpu_launcher.decisions"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_OFF = logging.CRITICAL + 1


class _Logger(logging.Logger):
    """A logger that stays enabled. Hydra uses `logging.config`, which disables all loggers that it does not know."""

    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        """Ignored: only the level turns the logger off."""


class _Handler(logging.Handler):
    """Appends each record to a descriptor as one line, with one write."""

    def __init__(self, descriptor: int, path: Path | None) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._file = self._identity()
        self.path = path
        """Absolute path of the file; None for standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        at = self._TIME.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        where = f"{os.uname().nodename} {_role}[{os.getpid()}]"
        area = record.name.removeprefix(f"{_ROOT}.")
        text = f"{at}.{int(record.msecs):03d} {record.levelname} {where} {area}: {record.getMessage()}"
        # The log never makes a program fail or wait, even with a full disk, or a terminal or pipe without a reader.
        with contextlib.suppress(OSError):
            if has_room(self.descriptor) and self._identity() == self._file:  # the program may have closed it
                os.write(self.descriptor, one_line(text).encode()[: select.PIPE_BUF - 1] + b"\n")

    def _identity(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    _TIME = logging.Formatter()


_role = "head"


def get_logger(area: str) -> logging.Logger:
    """Return the logger for a part of gpu-launcher, such as `jobs.loop`."""
    return _made(f"{_ROOT}.{area}")


def _made(name: str) -> logging.Logger:
    before = logging.getLoggerClass()
    logging.setLoggerClass(_Logger)
    try:
        return logging.getLogger(name)
    finally:
        logging.setLoggerClass(before)


def set_role(role: str) -> None:
    """Set the name of this process in its log lines: `guard`, `fork server`, `supervisor`, `job 3`."""
    global _role
    _role = role


def log_into(directory: Path) -> None:
    """Write the log into a sweep's `directory` from now on, in this process and those that it starts.

    Has no effect if the log is off or if the user named a file.
    """
    # CRITICAL is enabled exactly if the log is on: its level when off, _OFF, is above CRITICAL.
    if _named is None and _root.isEnabledFor(logging.CRITICAL):
        _open(directory / FILE)


def environment() -> dict[str, str]:
    """The variables that make a fresh interpreter log to the same file. Empty if the log is off.

    If this process logs to standard error, the interpreter does not log, because its standard error may be a job's.
    """
    handler = next((one for one in _root.handlers if isinstance(one, _Handler)), None)
    if handler is None:
        return {}
    if handler.path is None:
        return {VARIABLE: ""}
    return {VARIABLE: f"{logging.getLevelName(_root.level).lower()}:{handler.path}"}


def read_variable(value: str) -> tuple[int, Path | None]:
    """Parse a value of the variable; return the level, and the file if it names one. Raises ValueError."""
    level, _, path = value.partition(":")
    if level.strip().lower() not in _LEVELS:
        raise ValueError(f"{VARIABLE}={value!r} is invalid: must be debug, info, warning or error, or one with :PATH")
    return _LEVELS[level.strip().lower()], Path(path).expanduser().absolute() if path else None


def configure(variables: Mapping[str, str]) -> None:
    """Set up the log from environment variables. An invalid value is reported on standard error and turns it off."""
    global _named
    _root.propagate = False
    _root.setLevel(_OFF)
    _named = None
    if not (value := variables.get(VARIABLE)):
        return
    try:
        level, _named = read_variable(value)
    except ValueError as error:
        print(f"gpu-launcher: {one_line(str(error))}. Nothing is logged", file=sys.stderr)
        return
    _root.setLevel(level)
    if _named is None:
        # A copy: in a job, descriptor 2 becomes the job's own log.
        with contextlib.suppress(OSError):  # standard error is closed
            _use(_Handler(fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3), None))
    else:
        _open(_named)


def _open(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = open_regular(path, flags)
    except OSError as error:
        print(f"gpu-launcher: cannot write the log {path}: {error.strerror}", file=sys.stderr)
        return
    _use(_Handler(descriptor, path))


def _use(handler: _Handler) -> None:
    for other in [one for one in _root.handlers if isinstance(one, _Handler)]:
        _root.removeHandler(other)
        os.close(other.descriptor)
    _root.addHandler(handler)


_named: Path | None = None
"""The file that the variable names, if any."""
_root = _made(_ROOT)
configure(os.environ)
