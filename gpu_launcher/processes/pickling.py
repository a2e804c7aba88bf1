"""Pickles Python objects for sending between a program and its jobs, including those defined in `__main__`.

A forked job's `__main__` is a copy of the program's at the fork; a fresh interpreter's is empty. Objects that the
reader's `__main__` has are pickled by name, so that both sides use the same class. Objects that it lacks are pickled by
value, and the reader then adds them to its `__main__`.
"""

from __future__ import annotations

import functools
import io
import linecache
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MappingProxyType
from typing import Any, BinaryIO, Protocol

from gpu_launcher.processes import random_generators
from gpu_launcher.processes.cpu_unpickler import CpuUnpickler

NOTHING: Mapping[str, object] = MappingProxyType({})
NO_OTHERS: Mapping[int, Callable[[], object]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Afresh:
    """A wrapper that marks the user's code in a pickle. Unpickling returns the code itself.

    Unseeded random number generators in the code are not copied: each process that unpickles it gets different numbers.
    """

    code: object


@dataclass(frozen=True, slots=True)
class _Mark:
    """A mark in a pickle where an Afresh begins or ends."""

    begins: bool


class Writable(Protocol):
    """An object that pickle can write to."""

    def write(self, data: bytes, /) -> object:
        """Write all of `data`."""


def main_namespace() -> dict[str, Any]:
    """The namespace of this process's `__main__`."""
    return vars(sys.modules["__main__"])


def prepare() -> None:
    """Import cloudpickle. Call this before a fork, so that each child does not have to."""
    _pickler_class()


def dump(
    thing: object, known: Mapping[str, object] = NOTHING, instead: Mapping[int, Callable[[], object]] = NO_OTHERS
) -> bytes:
    """Pickle `thing` for a process whose `__main__` contains the objects `known`, which are pickled by name.

    `instead` maps ids of objects to functions: unpickling such an object calls its function and returns the result.
    Raises whatever the user's objects raise when they are pickled.
    """
    buffer = io.BytesIO()
    dump_to(buffer, thing, known, instead)
    return buffer.getvalue()


def can_dump(thing: object, known: Mapping[str, object] = NOTHING) -> bool:
    """Whether `dump` would work."""
    try:
        dump(thing, known)
    except Exception:  # whatever the user's objects raise
        return False
    return True


def dump_to(
    file: Writable,
    thing: object,
    known: Mapping[str, object] = NOTHING,
    instead: Mapping[int, Callable[[], object]] = NO_OTHERS,
) -> None:
    """Pickle `thing` into a file, like `dump` but without another copy of large objects."""
    pickler = _pickler_class()(file, known, instead)
    pickler.dump(thing)
    pickler.dump(pickler.used)  # refers to the same classes and functions, because both dumps share one memo


@functools.cache
def _pickler_class() -> Any:
    import cloudpickle  # only when needed: the command line does not use it

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(
            self, file: Writable, known: Mapping[str, object], instead: Mapping[int, Callable[[], object]]
        ) -> None:
            super().__init__(file)
            self.known = known
            self.instead = instead
            self.main = main_namespace()
            self.afresh: random_generators.Reducer | None = None
            """Reducer for random generators; None outside an Afresh."""
            self.used: dict[str, Any] = {}
            """Objects of this process's `__main__` that the reader lacks, by name."""
            self.sources: dict[str, list[str] | None] = {}
            """Source lines by file name; None for files that the reader can open itself."""

        def reducer_override(self, thing: Any) -> Any:
            if type(thing) is Afresh:
                return _code, (_Mark(True), thing.code, _Mark(False))
            if type(thing) is _Mark:
                self.afresh = random_generators.Reducer() if thing.begins else None
                return bool, ()
            if self.afresh is not None and (reduced := self.afresh.reduce(thing)) is not None:
                return reduced
            if (other := self.instead.get(id(thing))) is not None:
                return other, ()
            if type(thing) is CodeType:
                # cloudpickle >= 3.1.2 replaces the file name by `<dynamic-code>`, and tracebacks would show that.
                make, arguments = self.dispatch_table[CodeType](thing)
                return _code_of_file, (thing.co_filename, self.source_of(thing.co_filename), make, arguments)
            if issubclass(type(thing), (type, FunctionType)) and getattr(thing, "__module__", None) == "__main__":
                name = thing.__qualname__
                if _lookup(self.known, name) is thing:
                    return _from_main, (name,)
                if self.main.get(name) is thing:
                    self.used[name] = thing
            return super().reducer_override(thing)

        def source_of(self, filename: str) -> list[str] | None:
            if filename not in self.sources:
                self.sources[filename] = None if os.path.exists(filename) else linecache.getlines(filename) or None  # noqa: PTH110
            return self.sources[filename]

    return Pickler


def _code_of_file(
    filename: str, source: list[str] | None, make: Callable[..., CodeType], arguments: tuple[Any, ...]
) -> CodeType:
    """Unpickle a code object. Tracebacks show `source` if the file does not exist, as for a notebook's cell."""
    if source is not None and filename not in linecache.cache:
        # `linecache.checkcache` keeps an entry that has no modification time.
        linecache.cache[filename] = (sum(map(len, source)), None, source, filename)
    return make(*arguments).replace(co_filename=filename)


def load(pickled: bytes, *, on_cpu: bool = False) -> Any:
    """Unpickle what `dump` returned, and add the `__main__` objects that it contains to this process's `__main__`.

    With `on_cpu`, arrays are created on the CPU, for a program that reads its jobs' results and must not use a GPU.
    Raises whatever the user's objects raise when they are unpickled.
    """
    return load_from(io.BytesIO(pickled), on_cpu=on_cpu)


def load_from(file: BinaryIO | io.BytesIO, *, on_cpu: bool = False) -> Any:
    """Unpickle from a file that `dump_to` wrote, like `load`."""
    unpickler = (CpuUnpickler if on_cpu else pickle.Unpickler)(file)
    thing = unpickler.load()
    main_namespace().update(unpickler.load())
    return thing


def _code(begin: object, code: object, end: object) -> object:
    random_generators.restore_globals()
    return code


def _lookup(names: Mapping[str, object], qualified: str) -> object:
    first, *rest = qualified.split(".")
    return functools.reduce(lambda thing, name: getattr(thing, name, None), rest, names.get(first))


def _from_main(name: str) -> Any:
    found = _lookup(main_namespace(), name)
    if found is None:
        raise AttributeError(f"{name} is not in __main__ of this process")
    return found
