"""An exception on its way from a job's process to the launching program: itself, its traceback, and what led to it.

Pickle carries an exception without its traceback and without its cause. Both are put together again on the other side,
so that Hydra shows them as it does with its own launcher: the user's frames and nothing else.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, FunctionType, TracebackType
from typing import Literal

from omegaconf.errors import OmegaConfBaseException

from gpu_launcher.processes import cpu_unpickler
from gpu_launcher.processes.exceptions import RemoteTraceback, message_of

MOST_FRAMES = 200
"""Of a longer traceback, as of endless recursion, half of these from either end travel."""


@dataclass(frozen=True, slots=True)
class Link:
    """One exception of a chain, without what led to it."""

    pickled: bytes | None
    """None if it would not be the same on the other side: then a RemoteTraceback stands for it."""
    text: str
    """Its traceback and message, as Python prints them."""
    frames: tuple[tuple[str, str, int], ...]
    """File name, function and line of each frame of its traceback."""
    led_by: Literal["cause", "context"] | None
    """How the next link of the chain led to this one; None at the end."""


def pack_chain(error: BaseException) -> list[Link]:
    """The exception and what led to it, in the order from last raised to first."""
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
        tb = user_frames(current.__traceback__)
        text = "".join(traceback.format_exception(type(current), current, tb, chain=False))
        frames = [(f.filename, f.name, f.lineno or 0) for f in traceback.extract_tb(_from_run_job(current, tb))]
        if len(frames) > MOST_FRAMES:
            frames[MOST_FRAMES // 2 : -MOST_FRAMES // 2] = []
        links.append(Link(_pickled(current), text, tuple(frames), led_by))
        current = earlier
    return links


def unpack_chain(links: Sequence[Link], replacement: Exception) -> Exception:
    """The exception as it was, or `replacement` in its place if it is none to raise here."""
    error: BaseException | None = None
    for link in reversed(links):
        earlier = error
        error = None if link.pickled is None else _unpickled(link.pickled)
        if link is links[0] and not isinstance(error, Exception):
            error = replacement  # SystemExit in a job must not end the launching program
        if error is None:
            error = RemoteTraceback(link.text)
        else:
            error.__traceback__ = _traceback(link.frames)
        if link.led_by == "cause":
            error.__cause__ = earlier
        elif link.led_by == "context":
            error.__context__ = earlier
    assert isinstance(error, Exception)
    return error


def whole_message(error: BaseException) -> str:
    """All that Hydra would show of an error of its own or OmegaConf's: its message and, as lines below, its cause's."""
    parts = [message_of(error).strip()]
    if isinstance(cause := error.__cause__, OmegaConfBaseException) and message_of(cause) not in parts[0]:
        parts.append(message_of(cause).strip())
    return "\n".join(parts)


def dumps(value: object) -> bytes:
    """Pickle; by value where plain pickle cannot, as for what a function defines. Raises whatever that raises."""
    try:
        return pickle.dumps(value)
    except Exception:
        import cloudpickle

        pickled: bytes = cloudpickle.dumps(value)
        return pickled


def user_frames(tb: TracebackType | None) -> TracebackType | None:
    """From where the user's code begins: Hydra's own frames and ours come first."""
    start = tb
    while start is not None and _module(start) in _NOT_USERS:
        start = start.tb_next
    return start or tb


_HYDRA = "hydra.core.utils"
_NOT_USERS = (_HYDRA, "hydra_plugins.gpu_pool_launcher._program")


def _from_run_job(error: BaseException, users: TracebackType | None) -> TracebackType | None:
    """The traceback from Hydra's `run_job` on, if that called the user's code, else all of it.

    Hydra shows only the frames behind one of that name. It cannot cope with OmegaConf's being the first of them.
    """
    caller = tb = error.__traceback__
    while tb is not None and tb is not users:
        caller, tb = tb, tb.tb_next
    if users is None or caller is None or caller is users:
        return users
    by_hydra = _module(caller) == _HYDRA and not _module(users).startswith("omegaconf")
    return caller if by_hydra else error.__traceback__


def _module(tb: TracebackType) -> str:
    return str(tb.tb_frame.f_globals.get("__name__"))


def _pickled(error: BaseException) -> bytes | None:
    try:
        pickled = dumps(error)
        restored = cpu_unpickler.loads(pickled)
    except Exception:  # anything can be raised by an object that is asked to pickle itself
        return None
    # One whose constructor words the message gets its own words back as if they were the argument.
    return pickled if type(restored) is type(error) and message_of(restored) == message_of(error) else None


def _unpickled(pickled: bytes) -> BaseException | None:
    try:
        error = cpu_unpickler.loads(pickled)
    except Exception:  # as above; in a fresh interpreter (`spawn`) it may have worked
        return None
    return error if isinstance(error, BaseException) else None


def _traceback(frames: Sequence[tuple[str, str, int]]) -> TracebackType | None:
    tb = None
    for filename, function, line in reversed(frames):
        tb = TracebackType(tb, _frame(filename, function), -1, line)
    return tb


def _frame(filename: str, function: str) -> FrameType:
    """A frame that looks as if it were of that function. Python leaves frames only where something raised."""
    code = _raise.__code__.replace(co_filename=filename, co_name=function)
    try:
        FunctionType(code, {_MARK: None})()
    except ZeroDivisionError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        return frame
    raise AssertionError("it raises")


_MARK = "_SyntheticTraceback"
"""Among a frame's globals tells Hydra 1.4 to judge the frame by its file name."""


def _raise() -> None:
    1 / 0  # noqa: B018
