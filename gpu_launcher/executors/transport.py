"""The form in which calls and values travel between the program and the process that makes the call.

A large object goes into a file, so it does not pass through the processes in between. If the process runs on another
machine, it travels in a message.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Coroutine, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import describe
from gpu_launcher.processes.unpicklable import found_at

LARGE = 1024 * 1024
"""Maximum bytes of an object that travels in a message. A larger one travels in a file."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A pickled object."""

    data: bytes
    path: str | None = None
    """The file that contains the object instead of `data`, if it is large."""

    def unpack(self, *, on_cpu: bool = False) -> Any:
        """Unpickle the object. `on_cpu` is as in `pickling.load`.

        Raises whatever the user's objects raise when they are unpickled, and OSError.
        """
        if self.path is None:
            return pickling.load(self.data, on_cpu=on_cpu)
        with open(self.path, "rb") as file:
            Path(self.path).unlink()  # no other process reads it, and the open file vanishes with this process
            return pickling.load_from(file, on_cpu=on_cpu)

    def without_file(self) -> Payload:
        """Return the payload with its data instead of the file, which is removed. Raises OSError."""
        if self.path is None:
            return self
        data = Path(self.path).read_bytes()
        Path(self.path).unlink()
        return Payload(data)


def pack(thing: object, path: Path | None, known: Mapping[str, object]) -> Payload:
    """Pickle an object, into the file `path` if it is large and there is one. `known` is as in `pickling.dump`.

    Raises whatever the user's objects raise when they are pickled, and OSError if the file cannot be written.
    """
    with _Spilling(path) as file:
        pickling.dump_to(file, thing, known)
        return file.packed()


class _Spilling:
    """A file that is kept in memory until it becomes large."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._memory = io.BytesIO()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Spilling:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        finally:
            if kind is not None and self._path is not None:
                with contextlib.suppress(OSError):  # the first error of the disk is already raised
                    self._path.unlink()

    def write(self, data: bytes) -> None:
        if self._file is None:
            if self._path is None or self._memory.tell() + memoryview(data).nbytes <= LARGE:
                self._memory.write(data)
                return
            self._file = open(self._path, "wb")
            self._file.write(self._memory.getvalue())
            self._memory = io.BytesIO()
        self._file.write(data)

    def packed(self) -> Payload:
        if self._file is None:
            return Payload(self._memory.getvalue())
        self._file.flush()
        return Payload(b"", str(self._path))


@dataclass(frozen=True, slots=True)
class ReturnedValue:
    """The value that a call returned."""

    value: Payload


@dataclass(frozen=True, slots=True)
class NoValue:
    """The call has neither a value nor an exception of its own that could be sent. The report says why."""

    traceback: str
    unpicklable: bool = False
    """Whether there is a value that cannot be pickled."""


def unreturnable(value: object, why: BaseException) -> str:
    """Describe why a value cannot be pickled, and what to do: the end of a sentence."""
    if isinstance(value, Coroutine):
        value.close()  # otherwise Python would warn, too, that it was never awaited
        remedy = (
            "an `async def` function only returns a coroutine, which has not run: call `asyncio.run(...)` on it in an "
            "ordinary function, and use that"
        )
    elif isinstance(value, Generator):
        remedy = "return a list of what the generator yields"
    else:
        remedy = (
            "return what the value can be made from, such as plain numbers, arrays on the CPU, or the path of a file "
            "that was written there"
        )
    return f"{describe(why)}{found_at({'the value': value}, pickling.main_namespace())}. Remedy: {remedy}"
