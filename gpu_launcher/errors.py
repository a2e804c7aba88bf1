"""The errors that users may see. Each names the object, the likely cause and the next step.

    GpuLauncherError
    ├── OptionError (ValueError)               an argument or option is invalid
    │   └── UsageError                         the same, about no single option
    ├── RequestError                           no pool like this one can grant the request
    ├── LeaseTimeout (TimeoutError)            the devices did not become available in time
    ├── ApplyError (RuntimeError)              a lease comes too late to choose this process's devices
    ├── DeviceError                            the devices of the machine cannot be read
    ├── PoolDirectoryError                     the pool directory cannot be used
    ├── UnpicklableError (PicklingError)       something cannot be sent to another process
    ├── UnsupportedVersionError (ImportError)  a library is missing or too old
    │
    ├── JobError                               a job ended without a value and without an exception
    │   └── JobTimeoutError (TimeoutError)     it ran for too long
    ├── RecordError                            a record of parallel_map has no result
    ├── WorkerDiedError                        a worker of parallel_map ended
    ├── UnreadableError                        a record or result cannot be unpickled
    ├── SetupError                             the setup function of parallel_map raised
    ├── NodeDiedError                          the process that runs the jobs was killed
    ├── NodeStartError                         no node can be started
    ├── ServerDiedError                        the fork server was killed; the job loop starts another one
    ├── BrokenPoolExecutor (BrokenExecutor)    in executors/executor_thread.py, as concurrent.futures is slow to import
    │
    ├── StorageError                           a study's storage cannot be used
    ├── StudyError                             a study does not fit this sweep
    ├── SearchSpaceError (ValueError)          an override makes no search space
    ├── CompositionError                       Hydra cannot compose the config of a trial
    │
    ├── CommandError                           the command of `gpu-launcher run` cannot be executed
    ├── MapError                               a `gpu-launcher map` cannot continue
    ├── ManifestError                          a sweep's directory cannot be resumed or read
    ├── SteeringError                          a sweep cannot be steered, or refuses a request
    ├── WebError                               the pages of `gpu-launcher web` cannot be served
    └── ReportError                            a job's report cannot be read

All of them survive pickling with their fields, because a job's error is raised in one process and read in another. The
plugins also define errors in Hydra's hierarchy. Exceptions that only steer control flow are defined where they are
raised.
"""

from __future__ import annotations

from collections.abc import Callable
from pickle import PicklingError
from typing import Any

from gpu_launcher.text import short_repr


class GpuLauncherError(Exception):
    """Base of every error that gpu-launcher raises. `str(error)` is one message for the person at the terminal."""


class OptionError(GpuLauncherError, ValueError):
    """An argument or option is invalid. The message names it and says what to do.

    `option` is its name, such as `devices` in a function call. Code that reads `--devices` or
    `hydra.launcher.devices` raises the error `renamed` to that.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(option, problem)
        self.option = option
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.option}: {self.problem}"

    def renamed(self, spell: Callable[[str], str]) -> OptionError:
        """The same error, with the option's name changed by `spell`."""
        return OptionError(spell(self.option), self.problem)


class UsageError(OptionError):
    """Invalid input that does not concern a single option. Nothing was run."""

    def __init__(self, problem: str) -> None:
        super().__init__("", problem)

    def __reduce__(self) -> tuple[type[UsageError], tuple[str]]:
        return UsageError, (self.problem,)

    def __str__(self) -> str:
        return self.problem

    def renamed(self, spell: object) -> OptionError:
        """Return the same error, which names no option."""
        return self


class DeviceError(GpuLauncherError):
    """The machine's devices cannot be read, for example because the driver does not answer."""


class PoolDirectoryError(GpuLauncherError):
    """The pool directory cannot be used (read-only, full, on a network file system, wrong owner)."""

    def __init__(self, directory: str, problem: str) -> None:
        super().__init__(directory, problem)
        self.directory = directory
        self.problem = problem

    def __str__(self) -> str:
        return f"pool directory {self.directory}: {self.problem}"


class StorageError(GpuLauncherError):
    """A study's storage cannot be used (not a database, wrong URL, missing driver, network file system).

    `storage` is the URL or path as the user wrote it, without its password.
    """

    def __init__(self, storage: str, problem: str) -> None:
        super().__init__(storage, problem)
        self.storage = storage
        self.problem = problem

    def __str__(self) -> str:
        return f"storage {self.storage}: {self.problem}"


class RequestError(GpuLauncherError):
    """The pool can never grant a request, for example for more devices than it has."""


class LeaseTimeout(GpuLauncherError, TimeoutError):
    """A lease was not granted within the time to wait. The place in the queue is lost.

    `wanted` is the request in words, such as `2 GPUs`; `seconds` is how long the caller waited; `reason` says who holds
    the devices or waits earlier for them.
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
    """A lease cannot be applied, because the devices of this process are already chosen."""


class JobError(GpuLauncherError):
    """A job returned no value and raised no exception: it was killed, crashed or exited.

    `problem` is a predicate such as `was killed by SIGKILL`; `log` is the path of the job's output, if it has any.
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
    """A job exceeded its time limit and was ended."""

    def __init__(self, number: int, label: str, problem: str, log: str | None) -> None:
        super().__init__(number, label, problem, log)
        self.args = (number, label, problem, log)
        self.errno = self.strerror = self.filename = None  # OSError takes these from the arguments

    def __reduce__(self) -> tuple[type[JobTimeoutError], tuple[object, ...]]:
        return type(self), (self.number, self.label, self.problem, self.log)


class UnpicklableError(GpuLauncherError, PicklingError):
    """A function, argument or value cannot be sent to another process. The message says what to do."""


class UnsupportedVersionError(GpuLauncherError, ImportError):
    """A distribution is missing or has an unsupported version. The message says what to do."""

    def __init__(self, distribution: str, version: str | None, supported: str) -> None:
        super().__init__(distribution, version, supported)
        self.distribution = distribution
        self.version = version
        self.supported = supported

    def __str__(self) -> str:
        found = f"{self.version} is not supported" if self.version else "is not installed"
        return f"{self.distribution} {found}: `pip install '{self.distribution}{self.supported}'`"


class RecordError(GpuLauncherError):
    """A record has no result. The message says why.

    With `parallel_map(..., on_error="return")`, it is among the results. With `on_error="raise"`, it is the `__cause__`
    of the exception that is raised.
    """

    def __init__(self, index: int, record: Any, exception: BaseException, traceback: str, where: str = "") -> None:
        super().__init__(index, record, exception, traceback, where)
        self.index = index
        """The number of the record, counted from 0."""
        self.record = record
        self.exception = exception
        """The exception that the function raised, or a WorkerDiedError."""
        self.traceback = traceback
        """The worker's traceback as text; may be empty."""
        self.where = where
        """The worker's devices, such as `GPU 1`; may be empty."""

    def __str__(self) -> str:
        where = f" on {self.where}" if self.where else ""
        what = f"record {self.index} ({_show(self.record)}) failed{where}"
        if self.traceback:
            return f"{what}:\n\n{self.traceback.rstrip()}"
        return f"{what}: {type(self.exception).__name__}: {self.exception}"


class WorkerDiedError(GpuLauncherError):
    """A worker's process ended: by a signal, by `os._exit`, or because the host ran out of memory."""


class UnreadableError(GpuLauncherError):
    """A result could not be unpickled in this process, or a record in its worker."""


class SetupError(GpuLauncherError):
    """`setup` raised in a worker. This is the `__cause__` of the raised exception, with the worker's traceback."""


class NodeDiedError(GpuLauncherError):
    """The node was killed, and its jobs ended with it."""


class NodeStartError(GpuLauncherError):
    """No node can be started, so no job can run."""


class ServerDiedError(GpuLauncherError):
    """The fork server was killed. Its jobs end by themselves; another fork server can be started."""


class StudyError(GpuLauncherError):
    """This sweep cannot use its study. The message says why, and what to do."""


class SearchSpaceError(GpuLauncherError, ValueError):
    """An override, or a value for a parameter, is not a valid search space. `override` is as the user wrote it."""

    def __init__(self, override: str, problem: str) -> None:
        super().__init__(override, problem)
        self.override = override
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.override}: {self.problem}"


class CompositionError(GpuLauncherError):
    """Hydra cannot compose the config of a trial. The message includes Hydra's."""


class CommandError(GpuLauncherError):
    """A command cannot be executed. `code` is the exit code that a shell would use: 126 or 127."""

    def __init__(self, command: str, problem: str, code: int) -> None:
        super().__init__(command, problem, code)
        self.command = command
        self.problem = problem
        self.code = code

    def __str__(self) -> str:
        return f"{self.command}: {self.problem}"


class MapError(GpuLauncherError):
    """A map cannot continue. The message names the cause and the next step."""


class ManifestError(GpuLauncherError):
    """A sweep's directory cannot be resumed or read. The message says what to do."""


class SteeringError(GpuLauncherError):
    """A sweep cannot be steered, or refuses a request. The message says what to do."""


class WebError(GpuLauncherError):
    """The pages of `gpu-launcher web` cannot be served. The message says why."""


class ReportError(GpuLauncherError):
    """A report cannot be read or must not be unpickled. The message names the file and the reason."""


def _show(record: object) -> str:
    try:
        return short_repr(record, 120)
    except Exception:  # the user's __repr__ may raise anything
        return f"of type {type(record).__name__}"
