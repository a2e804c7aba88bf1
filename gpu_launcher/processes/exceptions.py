"""Exceptions on their way to another process, whatever their classes make of that."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from gpu_launcher.processes import pickling


class RemoteTraceback(Exception):
    """The cause of an exception that another process raised, or what stands for one: its traceback there, as text."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


@dataclass(frozen=True, slots=True)
class Carried:
    """An exception on its way. One that cannot be pickled as a whole is rebuilt from what of it can be."""

    pickled: bytes | None
    text: str
    """Such as `ValueError: no such file`."""
    traceback: str
    problem: str = ""
    """Why nothing of it could be pickled."""

    @classmethod
    def of(cls, error: BaseException, known: Mapping[str, object], *, skip: int = 0) -> Carried:
        """For a process whose `__main__` has what is `known`; without the first `skip` frames, which are ours."""
        shown = traceback_of(error, skip)
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        try:
            return cls(dump(error, known), text, shown)
        except Exception as why:  # whatever the user's objects raise
            return cls(None, text, shown, f"it cannot be pickled: {describe(why)}")

    def load(self) -> BaseException:
        """The exception, caused by its traceback. Raises LookupError, which says why, if it cannot be had here."""
        if self.pickled is None:
            raise LookupError(self.problem)
        try:
            error = pickling.load(self.pickled)
        except Exception as why:  # whatever the user's objects raise
            raise LookupError(f"it cannot be unpickled: {describe(why)}") from why
        if not isinstance(error, BaseException):
            raise LookupError("it is no exception when it is unpickled")
        error.__cause__ = RemoteTraceback(self.traceback)
        return error


def dump(error: BaseException, known: Mapping[str, object]) -> bytes:
    """Pickle an exception for `pickling.load`, as a whole or else what of it can be.

    Many a class can be pickled and not unpickled: each whose `__init__` takes other arguments than those it hands on.
    Raises whatever the class raises, and TypeError.
    """
    try:
        pickled = pickling.dump(error, known)
        if not isinstance(_first(pickled), type(error)):
            raise TypeError("it becomes something else when it is unpickled")
    except Exception as why:  # whatever the user's objects raise
        try:
            return _dump_rebuilt(error, known)
        except Exception:  # of its class, most likely
            raise why from None
    return pickled


def _dump_rebuilt(error: BaseException, known: Mapping[str, object]) -> bytes:
    """Of its class, its arguments and its attributes, without calling anything of the class.

    Attributes that cannot be pickled are left out, and such arguments are replaced by what they look like. Raises
    whatever its class raises.
    """
    pickled = pickling.dump(_parts(error, known), known)
    _first(pickled)
    return pickled


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """Pickled, it becomes the exception."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.kind, self.args, self.attributes)


def _parts(error: BaseException, known: Mapping[str, object]) -> _Rebuilt:
    _, args, *rest = _builtin(type(error)).__reduce__(error)
    attributes = rest[0] if rest and rest[0] else {}
    kept = {name: value for name, value in attributes.items() if _travels(value, known)}
    return _Rebuilt(type(error), tuple(_stand_in(arg, known) for arg in args), kept)


def _stand_in(arg: Any, known: Mapping[str, object]) -> Any:
    """An argument, or what becomes the nearest to it."""
    if _travels(arg, known):
        return arg
    if isinstance(arg, BaseException):
        return _parts(arg, known)
    if type(arg) in (list, tuple):  # as the exceptions of a group
        return type(arg)(_stand_in(one, known) for one in arg)
    return _look(arg)


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    builtin = _builtin(kind)
    error: BaseException = builtin.__new__(kind, *args)
    builtin.__init__(error, *args)
    builtin.__setstate__(error, attributes)
    return error


def _builtin(kind: type[BaseException]) -> Any:
    """The nearest base whose methods are Python's own."""
    return next(base for base in kind.__mro__ if base.__module__ == "builtins")


def _travels(thing: object, known: Mapping[str, object]) -> bool:
    try:
        _first(pickling.dump(thing, known))
    except Exception:  # whatever the user's objects raise
        return False
    return True


def _first(pickled: bytes) -> Any:
    """What `pickling.load` returns, without defining anything in `__main__`: this process has it."""
    return pickle.loads(pickled)


def _look(thing: object) -> str:
    try:
        return repr(thing)
    except Exception:  # the user's own
        return f"<{type(thing).__qualname__}>"


def traceback_of(error: BaseException, skip: int) -> str:
    """As Python prints it, without the first `skip` frames, which are ours."""
    return "".join(traceback.format_exception(type(error), error, without_frames(error, skip)))


def without_frames(error: BaseException, skip: int) -> TracebackType | None:
    """Its traceback without the first `skip` frames."""
    frames = error.__traceback__
    for _ in range(skip):
        frames = frames and frames.tb_next
    return frames


def describe(error: BaseException) -> str:
    """Its type, and what it says, in one line."""
    try:
        said = str(error)
    except Exception:  # an exception of the user's that cannot be shown
        said = ""
    name = type(error).__qualname__
    return f"{name}: {said}" if said else name
