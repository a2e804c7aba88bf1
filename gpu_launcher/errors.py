"""Errors that name the object, the likely cause and the next step.

All of them survive pickling with their fields: a job's error is raised in one process and read in another.
"""

from __future__ import annotations

from collections.abc import Callable
from pickle import PicklingError


class GpuLauncherError(Exception):
    """Base of every error that gpu-launcher raises. `str(error)` is one message for the person at the terminal."""


class OptionError(GpuLauncherError, ValueError):
    """A value the user gave cannot be used. The message names the option and the remedy.

    `option` is its name: `devices` in a function call; where users write more, as in `--devices` or
    `hydra.launcher.devices`, whoever reads what they wrote raises it `written` so.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(option, problem)
        self.option = option
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.option}: {self.problem}"

    def renamed(self, spell: Callable[[str], str]) -> OptionError:
        """The same, with the option's name as `spell` makes it of this one."""
        return OptionError(spell(self.option), self.problem)


class DeviceError(GpuLauncherError):
    """The machine's devices cannot be read, such as a driver that does not answer."""


class PoolDirectoryError(GpuLauncherError):
    """The pool directory cannot be used (read-only, full, on a network file system, wrong owner)."""

    def __init__(self, directory: str, problem: str) -> None:
        super().__init__(directory, problem)
        self.directory = directory
        self.problem = problem

    def __str__(self) -> str:
        return f"pool directory {self.directory}: {self.problem}"


class StorageError(GpuLauncherError):
    """The place where a study is kept cannot be used (no database, wrong URL, missing driver, network file system).

    `storage` is the URL or path as the user wrote it, without its password.
    """

    def __init__(self, storage: str, problem: str) -> None:
        super().__init__(storage, problem)
        self.storage = storage
        self.problem = problem

    def __str__(self) -> str:
        return f"storage {self.storage}: {self.problem}"


class RequestError(GpuLauncherError):
    """A request that the pool can never grant, such as more devices than it has."""


class LeaseTimeout(GpuLauncherError, TimeoutError):
    """A lease was not granted in the time that its caller would wait. The place in the queue is given up.

    `wanted` is what was requested, such as `2 GPUs`; `seconds` is how long the caller waited; `reason` says who holds
    the devices, or waits in front.
    """

    def __init__(self, wanted: str, seconds: float, reason: str) -> None:
        problem = f"timed out after {seconds:g} s waiting for {wanted}" if seconds else f"{wanted} not available now"
        super().__init__(f"{problem}: {reason}")
        self.wanted = wanted
        self.seconds = seconds
        self.reason = reason

    def __reduce__(self) -> tuple[type[LeaseTimeout], tuple[str, float, str]]:
        return type(self), (self.wanted, self.seconds, self.reason)


class ApplyError(GpuLauncherError, RuntimeError):
    """A lease cannot decide which devices this process uses: that is decided already."""


class JobError(GpuLauncherError):
    """A job that did not return a value, for a reason that is not an exception of its own: killed, crashed, exited.

    `problem` is a sentence without its subject, `log` the path of the job's output if it has any.
    """

    def __init__(self, number: int, label: str, problem: str, log: str | None) -> None:
        super().__init__(number, label, problem, log)
        self.number = number
        self.label = label
        self.problem = problem
        self.log = log

    def __str__(self) -> str:
        name = f"job {self.number} ({self.label})" if self.label else f"job {self.number}"
        return f"{name} {self.problem}" + (f"; see {self.log}" if self.log else "")


class JobTimeoutError(JobError, TimeoutError):
    """A job that ran longer than it may, and was ended."""

    def __init__(self, number: int, label: str, problem: str, log: str | None) -> None:
        super().__init__(number, label, problem, log)
        self.args = (number, label, problem, log)
        self.errno = self.strerror = self.filename = None  # which OSError reads into the arguments

    def __reduce__(self) -> tuple[type[JobTimeoutError], tuple[object, ...]]:
        return type(self), (self.number, self.label, self.problem, self.log)


class UnpicklableError(GpuLauncherError, PicklingError):
    """A function, an argument or a value that cannot be sent to another process. The message says what to do."""


class UnsupportedVersionError(GpuLauncherError, ImportError):
    """A distribution that is missing, or installed in a version that does not work. The message says what to do."""

    def __init__(self, distribution: str, version: str | None, supported: str) -> None:
        super().__init__(distribution, version, supported)
        self.distribution = distribution
        self.version = version
        self.supported = supported

    def __str__(self) -> str:
        found = f"{self.version} is not supported" if self.version else "is not installed"
        return f"{self.distribution} {found}: `pip install '{self.distribution}{self.supported}'`"
