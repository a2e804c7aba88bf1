"""Finds which part of an object cannot be pickled, for error messages. Pickle itself names only the part's type."""

from __future__ import annotations

import dis
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from gpu_launcher.processes import pickling

MAX_DEPTH = 50
"""Maximum number of steps from the object to the part."""
MAX_SECONDS = 3.0
"""Time limit for the search, which pickles the parts one by one. After that, the part found so far is named."""

_Part = tuple[str, str, Any]
"""Text, description, and the part itself. With a description, the text is a new name; without, it extends the name."""


def found_at(
    roots: Mapping[str, object],
    known: Mapping[str, object] = pickling.NOTHING,
    instead: Mapping[int, Callable[[], object]] = pickling.NO_OTHERS,
) -> str:
    """Name the part of `roots` that cannot be pickled, in parentheses.

    Returns ` (found at cfg.model.lock)`, for example, or ` (found at net.lock, where net is a global that train()
    uses)`; an empty string if a root as a whole cannot be pickled, or everything can. `known` and `instead` are those
    of `pickling.dump`.
    """
    deadline = time.monotonic() + MAX_SECONDS

    def is_bad(thing: object) -> bool:
        try:
            pickling.dump_to(_Nowhere(), thing, known, instead)
        except Exception:  # whatever the user's objects raise
            return True
        return False

    for name, root in roots.items():
        if is_bad(root):
            found = _descend(name, root, is_bad, deadline)
            return "" if found == name else f" (found at {found.lstrip('.')})"
    return ""


def _descend(name: str, thing: object, is_bad: Callable[[object], bool], deadline: float) -> str:
    origin = base = ""
    seen: set[int] = set()
    for _ in range(MAX_DEPTH):
        seen.add(id(thing))
        for text, what, part in _parts(thing):
            if time.monotonic() > deadline:
                break
            if id(part) not in seen and is_bad(part):
                if what:
                    base, origin = text, what
                name = text if what else f"{name}{text}"
                thing = part
                break
        else:
            break
    if not origin:
        return name
    return f"{name}, {origin}" if name == base else f"{name}, where {base} is {origin}"


class _Nowhere:
    def write(self, data: bytes, /) -> None:
        """Discard the data."""


def _parts(thing: Any) -> Iterator[_Part]:
    """Yield the parts of an object that pickle would pickle next."""
    if isinstance(thing, dict):
        yield from ((f"[{key!r}]", "", value) for key, value in thing.items())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", "", value) for index, value in enumerate(thing))
    elif isinstance(thing, FunctionType):
        yield from _used_by(thing)
    elif isinstance(thing, MethodType):
        yield ".__self__", "", thing.__self__
        yield "", "", thing.__func__
    elif isinstance(thing, functools.partial):
        yield "", "", thing.func
        yield from ((f".args[{index}]", "", value) for index, value in enumerate(thing.args))
        yield from ((f".keywords[{key!r}]", "", value) for key, value in thing.keywords.items())
    elif isinstance(thing, type):
        yield from ((f".{name}", "", value) for name, value in vars(thing).items())
    elif type(thing).__module__.startswith("omegaconf."):
        yield from _in_config(thing)
    else:
        yield from _reduced(thing)


def _used_by(function: FunctionType) -> Iterator[_Part]:
    name = function.__qualname__.rpartition("<locals>.")[2]
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield variable, f"a variable that {name}() uses from around it", cell.cell_contents
        except ValueError:
            continue  # still empty
    for used in _globals_in(function.__code__):
        if used in function.__globals__:
            yield used, f"a global that {name}() uses", function.__globals__[used]
    defaults = function.__defaults__ or ()
    parameters = function.__code__.co_varnames[: function.__code__.co_argcount][-len(defaults) :]
    for parameter, default in (*zip(parameters, defaults, strict=False), *(function.__kwdefaults__ or {}).items()):
        yield parameter, f"a parameter of {name}() with a default", default
    yield from ((f".{attribute}", "", value) for attribute, value in vars(function).items())


def _globals_in(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _globals_in(const)


def _in_config(node: Any, key: str = "") -> Iterator[_Part]:
    """Yield the values in OmegaConf's containers with their keys.

    A node is not pickled alone, because it refers to the whole config.
    """
    content = vars(node).get("_content")
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _in_config(value, f"{key}.{name}")
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _in_config(value, f"{key}[{index}]")
    elif "_val" in vars(node):
        yield key, "", vars(node)["_val"]


def _reduced(thing: Any) -> Iterator[_Part]:
    """Yield the parts that an object passes to pickle: usually its attributes."""
    try:
        reduced = thing.__reduce_ex__(4)
    except Exception:  # this object itself cannot be pickled
        return
    if not isinstance(reduced, tuple):
        return
    _, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    for one in state if isinstance(state, tuple) and len(state) == 2 else (state,):  # from __dict__ and __slots__
        if isinstance(one, dict):
            yield from ((f".{name}", "", value) for name, value in one.items())
    yield from ((f"[{index}]", "", value) for index, value in enumerate(items or ()))
    yield from ((f"[{key!r}]", "", value) for key, value in pairs or ())
    yield from (("", "", argument) for argument in arguments)
