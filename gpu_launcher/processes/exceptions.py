"""Sends exceptions to another process, and describes them in words.

Pickle drops the traceback of an exception and the exceptions that led to it. Many classes can be pickled but not
unpickled: every class whose `__init__` takes other arguments than it passes to its base. So an exception is sent as a
`PortableException`: pickled as a whole, or rebuilt from its class, arguments and attributes. Its traceback is sent as
text. The other side reads it in one of two ways:

- `load` returns the exception with a `RemoteTraceback` as its cause, as in `concurrent.futures`.
- `load_chain` returns the exception with its own causes and frames, as if it had been raised there. Hydra shows those.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, FunctionType, TracebackType
from typing import Any, Literal

from gpu_launcher.processes import cpu_unpickler, pickling

MAX_FRAMES = 200
"""Maximum number of frames sent with a traceback. Of a longer one, as in endless recursion, half come from each end."""


class RemoteTraceback(Exception):
    """The traceback, as text, of an exception raised in another process. Used as its cause, or in its place."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


@dataclass(frozen=True, slots=True)
class PortableException:
    """An exception in a form that can be sent to another process."""

    pickled: bytes | None
    """The pickled exception; None if it can neither be pickled as a whole nor be rebuilt."""
    summary: str
    """Type and message of the exception, such as `ValueError: no such file`."""
    traceback: str
    """Traceback of the exception as Python prints it, from where the user's code begins."""
    problem: str = ""
    """Why the exception cannot be pickled, and what to do."""
    frames: tuple[tuple[str, str, int], ...] = ()
    """File name, function and line of each frame of its traceback. Used in chains."""
    led_by: Literal["cause", "context"] | None = None
    """How the next exception in a chain led to this one; None at the end."""

    @classmethod
    def of(cls, error: BaseException, known: Mapping[str, object], *, chain: bool = True) -> PortableException:
        """Pack `error` for a process whose `__main__` contains `known`. With `chain`, the text includes its causes."""
        summary = "".join(traceback.format_exception_only(type(error), error)).strip()
        text = traceback_of(error, chain=chain)
        try:
            return cls(dump(error, known), summary, text)
        except Exception as why:  # whatever the user's objects raise
            return cls(None, summary, text, _not_portable("pickled", why))

    def load(self) -> BaseException:
        """Return the exception with its traceback as cause. Raises LookupError with the reason if that fails."""
        error = self.load_alone()
        error.__cause__ = RemoteTraceback(self.traceback)
        return error

    def load_alone(self) -> BaseException:
        """Return the exception without a cause. Raises LookupError like `load`."""
        if self.pickled is None:
            raise LookupError(self.problem)
        try:
            error: BaseException = pickling.load(self.pickled, on_cpu=True)
        except Exception as why:  # whatever the user's objects raise
            raise LookupError(_not_portable("unpickled in this process", why)) from why
        return error


def _not_portable(what: str, why: BaseException) -> str:
    return (
        f"The exception itself cannot be {what} ({describe(why)}). Remedy: define its class in a module, or give it a "
        "`__reduce__` that works in any process"
    )


# Chains


def pack_chain(
    error: BaseException,
    known: Mapping[str, object],
    shown: Callable[[BaseException], TracebackType | None],
) -> list[PortableException]:
    """Pack `error` and the exceptions that led to it, the last raised first. `shown` selects the frames to send."""
    links = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None:
        seen.add(id(current))
        led_by: Literal["cause", "context"] | None = None
        earlier: BaseException | None = None
        if current.__cause__ is not None:
            led_by, earlier = "cause", current.__cause__
        elif current.__context__ is not None and not current.__suppress_context__:
            led_by, earlier = "context", current.__context__
        if id(earlier) in seen:
            led_by, earlier = None, None
        frames = [(f.filename, f.name, f.lineno or 0) for f in traceback.extract_tb(shown(current))]
        if len(frames) > MAX_FRAMES:
            frames[MAX_FRAMES // 2 : -MAX_FRAMES // 2] = []
        alone = PortableException.of(current, known, chain=False)
        links.append(replace(alone, frames=tuple(frames), led_by=led_by))
        current = earlier
    return links


def load_chain(links: Sequence[PortableException], replacement: Exception) -> Exception:
    """Return the exception that `pack_chain` packed, or `replacement` if it cannot be raised here.

    A RemoteTraceback replaces any other exception in the chain that cannot be loaded.
    """
    error: BaseException | None = None
    for link in reversed(links):
        earlier = error
        try:
            error = link.load_alone()
        except LookupError:
            error = None
        if link is links[0] and not isinstance(error, Exception):
            error = replacement  # SystemExit in a job must not end the head
        if error is None:
            error = RemoteTraceback(link.traceback)
        else:
            error.__traceback__ = _synthetic_traceback(link.frames)
        if link.led_by == "cause":
            error.__cause__ = earlier
        elif link.led_by == "context":
            error.__context__ = earlier
    assert isinstance(error, Exception)
    return error


def _synthetic_traceback(frames: Sequence[tuple[str, str, int]]) -> TracebackType | None:
    tb = None
    for filename, function, line in reversed(frames):
        tb = TracebackType(tb, _synthetic_frame(filename, function), -1, line)
    return tb


def _synthetic_frame(filename: str, function: str) -> FrameType:
    """Return a frame that looks like one of that function. It is taken from an exception: Python cannot create one."""
    code = _raise.__code__.replace(co_filename=filename, co_name=function)
    try:
        FunctionType(code, {_MARK: None})()
    except ZeroDivisionError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        return frame
    raise AssertionError("it raises")


_MARK = "_SyntheticTraceback"
"""Name of a global of a frame that tells Hydra 1.4 to judge the frame by its file name."""


def _raise() -> None:
    1 / 0  # noqa: B018


# Pickling


def dump(error: BaseException, known: Mapping[str, object]) -> bytes:
    """Pickle an exception for `pickling.load`.

    It is pickled as a whole if the unpickled exception has the same class and message, and otherwise for rebuilding.
    Raises whatever the class raises, and TypeError.
    """
    try:
        pickled = pickling.dump(error, known)
        again = _first(pickled)
        if not isinstance(again, type(error)):
            raise TypeError("it becomes something else when it is unpickled")
    except Exception as why:  # whatever the user's objects raise
        try:
            return _dump_rebuilt(error, known)
        except Exception:  # the first error explains more: it is most likely due to the class
            raise why from None
    if message_of(again) == message_of(error):
        return pickled
    try:  # the constructor formats the message, and unpickling passed it the formatted message as its argument
        return _dump_rebuilt(error, known)
    except Exception:  # whatever the user's objects raise
        return pickled


def _dump_rebuilt(error: BaseException, known: Mapping[str, object]) -> bytes:
    """Pickle the class, arguments and attributes of an exception, from which it is rebuilt without calling its class.

    Attributes that cannot be pickled are left out. Arguments that cannot be pickled are replaced by their repr. Raises
    whatever the class raises.
    """
    pickled = pickling.dump(_parts(error, known), known)
    _first(pickled)
    return pickled


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """The parts of an exception. Unpickling returns the exception itself."""

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
    """Return an argument, or the closest value to it that can be pickled."""
    if _travels(arg, known):
        return arg
    if isinstance(arg, BaseException):
        return _parts(arg, known)
    if type(arg) in (list, tuple):  # for example the exceptions of a group
        return type(arg)(_stand_in(one, known) for one in arg)
    return _look(arg)


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    builtin = _builtin(kind)
    error: BaseException = builtin.__new__(kind, *args)
    builtin.__init__(error, *args)
    builtin.__setstate__(error, attributes)
    return error


def _builtin(kind: type[BaseException]) -> Any:
    """Return the nearest base class that is built into Python."""
    return next(base for base in kind.__mro__ if base.__module__ == "builtins")


def _travels(thing: object, known: Mapping[str, object]) -> bool:
    try:
        _first(pickling.dump(thing, known))
    except Exception:  # whatever the user's objects raise
        return False
    return True


def _first(pickled: bytes) -> Any:
    """Unpickle like `pickling.load`, but without adding anything to `__main__`, which has everything here."""
    return cpu_unpickler.loads(pickled)


def _look(thing: object) -> str:
    try:
        return repr(thing)
    except Exception:  # raised by the user's code
        return f"<{type(thing).__qualname__}>"


# Frames


def users_part(tb: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback from where the user's code begins. None if it has no frame of the user's code."""
    while tb is not None and module_of(tb).startswith(_CALLERS):
        tb = tb.tb_next
    return tb


def traceback_of(error: BaseException, *, chain: bool = True) -> str:
    """Format a traceback as Python prints it, from where the user's code begins. `chain` includes its causes."""
    return "".join(traceback.format_exception(type(error), error, users_part(error.__traceback__), chain=chain))


_CALLERS = ("gpu_launcher.", "hydra_plugins.gpu_pool_launcher.", "hydra.core.utils", "cloudpickle.")
"""Prefixes of the names of modules that call the user's code or pickle it."""


def module_of(tb: TracebackType) -> str:
    """Return the name of the first frame's module."""
    return str(tb.tb_frame.f_globals.get("__name__"))


# In words

MAX_CAUSES = 5
"""Maximum number of exceptions of a chain that `describe` names."""
MAX_IN_GROUP = 3
"""Maximum number of exceptions of a group that `describe` names."""


def describe(error: BaseException) -> str:
    """Describe an exception by its type, the first line of its message and, if that is not enough, its cause."""
    return _describe(error, MAX_CAUSES)


def _describe(error: BaseException, causes: int) -> str:
    name = type(error).__qualname__
    lines, embedded = _lines(error)
    cause = error.__cause__
    if cause is None and not error.__suppress_context__ and (not lines or lines[0].endswith(":")):
        cause = error.__context__
    if cause is not None and type(cause).__name__.endswith("RemoteTraceback"):  # the same exception, in its process
        cause = None
    led_to = _describe(cause, causes - 1) if cause is not None and causes > 1 else ""
    if not lines:
        return f"{name}, caused by {led_to}" if led_to else name
    said = lines.pop(0)
    if said.endswith(":"):
        if led_to:
            said = f"{said} {led_to}"
        while said.endswith(":") and lines:
            said = f"{said} {lines.pop(0)}"
        # The last lines of OmegaConf's and Hydra's messages name the part of the config.
        where = next((line for line in lines if line.startswith("full_key:")), "")
        said += f" ({where})" if where else ""
    elif cause is not None and led_to and not _repeats(said, cause):
        said = f"{said} (caused by {led_to})"
    elif embedded:
        said = f"{said} ({embedded})"
    group = getattr(error, "exceptions", None)
    if isinstance(group, (list, tuple)) and all(isinstance(one, BaseException) for one in group) and causes > 1:
        named = [_describe(one, causes - 1) for one in group[:MAX_IN_GROUP]]
        more = f"; and {len(group) - MAX_IN_GROUP} more" if len(group) > MAX_IN_GROUP else ""
        said += f": {'; '.join(named)}{more}" if named else ""
    return f"{name}: {said}"


def _lines(error: BaseException) -> tuple[list[str], str]:
    """Return the lines of an exception's message, and separately the last line of a traceback in it.

    Blank lines and rulers are left out. A traceback, such as that of a data loader's worker, is reduced to its last
    line. The separate line is empty if the message contains no traceback or begins with it.
    """
    lines = [line.strip() for line in message_of(error).splitlines() if any(map(str.isalnum, line))]
    begin = next((i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
    if begin is None:
        return lines, ""
    return [*lines[:begin], lines[-1]], lines[-1] if begin else ""


def _repeats(said: str, cause: BaseException) -> bool:
    """Whether an exception's message `said` contains that of its cause."""
    lines = message_of(cause).strip().splitlines()
    return bool(lines) and lines[0].strip() in said


def message_of(error: BaseException) -> str:
    """Return the message of an exception, or a placeholder if its `__str__` fails."""
    try:
        return str(error)
    except Exception:  # raised by the user's class
        return "<its str() failed>"


def reason(error: BaseException) -> str:
    """Describe the outcome of a job that raised `error` in one line: `raised ValueError: ...`."""
    said = f"raised {describe(error)}"
    return f"{said}; {NO_TERMINAL}" if _wanted_terminal(error) else said


def origin(error: BaseException) -> str:
    """Return file and line of the innermost frame of the user's code, or of any code if there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    mine = [one for one in frames if not one[0].startswith(_LIBRARIES)]
    return "{}:{}".format(*(mine or frames)[-1]) if frames else ""


_LIBRARIES = (
    "<frozen ",
    *(f"{path}{os.sep}" for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib", "platlib")),
    *(f"{Path(__file__).parents[2] / name}{os.sep}" for name in ("gpu_launcher", "hydra_plugins")),
)
"""Prefixes of the paths of code that is not the user's."""

NO_TERMINAL = "jobs have no terminal, so breakpoint() and input() do not work in them: run this job alone"


def _wanted_terminal(error: BaseException) -> bool:
    """Whether `input`, `getpass`, a debugger or a prompt raised the error because stdin is empty, as it is in a job."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        kind = type(one)
        if kind.__name__ == "BdbQuit" and kind.__module__ == "bdb":
            return True
        if isinstance(one, EOFError) and (str(one) == "EOF when reading a line" or _raised_in(one) == "getpass"):
            return True
        one = one.__cause__ or one.__context__
    return False


def _raised_in(error: BaseException) -> str:
    """Return the module of the function that raised the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__")) if frames else ""
