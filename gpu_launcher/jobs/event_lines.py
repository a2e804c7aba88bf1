"""Events and the state of a sweep as lines of JSON, for programs that watch it. Pure.

    {"state": {"total": 8, "running": [...], ...}, "failures": [...], "durations": [...], "ran_together": [...]}
    {"event": "JobStarted", "time": 4711.5, "number": 3, ...}

A state replaces everything before it; an event changes it. Times are on the machine's monotonic clock. A line may come
from another user's program, so each value is checked against the type of its field, and texts become single lines
without control characters.
"""

from __future__ import annotations

import json
import types
import typing
from array import array
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from gpu_launcher.jobs.events import Event, JobEnded, JobStarted
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.json_data import MAX_TIME, load_object
from gpu_launcher.text import MAX_SHOWN, one_line

MAX_STATE_FAILURES = 200
"""Maximum number of distinct failures in a state. More are only counted."""
MAX_INTEGER = 2**63 - 1
_EVENTS = {kind.__name__: kind for kind in typing.get_args(Event)}
_APART = ("running", "failures", "same", "durations", "ran_together")
"""Fields of the state that are not written as those of events are."""


def write_event(event: Event) -> bytes:
    """Return the line of an event."""
    return _line({"event": type(event).__name__, **_encode(event)})


def write_state(tally: SweepTally) -> bytes:
    """Return the line of a state."""
    groups = list(tally.failures.groups.values())[:MAX_STATE_FAILURES]
    return _line(
        {
            "state": {name: _encode(getattr(tally, name)) for name in _plain_fields()},
            "running": [_encode(job) for job in tally.running.values()],
            "failures": [[_encode(group.first), list(group.others)] for group in groups],
            "durations": list(tally.durations),
            "ran_together": list(tally.ran_together),
        }
    )


def read_line(line: bytes) -> SweepTally | Event:
    """Read a line. Raises ValueError for a line that this version does not write."""
    content = load_object(line)
    if "state" in content:
        return _read_state(content)
    kind = _EVENTS.get(str(content.get("event")))
    if kind is None:
        raise ValueError("neither a state nor an event")
    event: Event = _decode(kind, content)
    return event


def _read_state(content: Mapping[str, Any]) -> SweepTally:
    tally, state, hints = SweepTally(), content["state"], _hints(SweepTally)
    if not isinstance(state, dict):
        raise ValueError("the state is not an object")
    for name in _plain_fields():
        setattr(tally, name, _decode(hints[name], state.get(name)))
    tally.running = {job.number: job for job in _decode(tuple[JobStarted, ...], content.get("running"))}
    tally.durations.extend(_decode(tuple[float, ...], content.get("durations")))
    tally.ran_together.extend(_decode(tuple[int, ...], content.get("ran_together")))
    for group in _list(content.get("failures")):
        first, others = _list(group, 2)
        ended: JobEnded = _decode(JobEnded, first)
        tally.failures.restore(ended, array("q", _decode(tuple[int, ...], others)))
    return tally


def _plain_fields() -> list[str]:
    return [field.name for field in fields(SweepTally) if field.name not in _APART]


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _encode(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return value[:MAX_SHOWN]
    if is_dataclass(value):
        named = ((field.name, getattr(value, field.name)) for field in fields(value))
        # Values of jobs are in the manifest. Displays do not need them.
        return {name: _encode(one) for name, one in named if not isinstance(one, Figures)}
    if isinstance(value, (tuple, frozenset)):
        return [_encode(one) for one in value]
    return value


def _decode(kind: Any, value: Any) -> Any:
    """Return `value` as a value of the type `kind`. Raises ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (one for one in arguments if one is not type(None))
        return None if value is None else _decode(kind, value)
    if origin is tuple and arguments[1] is not Ellipsis:  # such as a name and its value
        parts = zip(arguments, _list(value, len(arguments)), strict=True)
        return tuple(_decode(one, part) for one, part in parts)
    if origin in (tuple, frozenset):
        return origin(_decode(arguments[0], one) for one in _list(value))
    if origin is None and is_dataclass(kind):
        return _decode_fields(kind, value)
    if origin is None and issubclass(kind, Enum):
        return kind(value)
    if kind is str and type(value) is str:
        return one_line(value)
    if kind is bool and type(value) is bool:
        return value
    if kind is int and type(value) is int and 0 <= value <= MAX_INTEGER:
        return value
    if kind is float and type(value) in (int, float) and 0 <= value <= MAX_TIME:
        return float(value)
    raise ValueError(f"{value!r:.40} is not a {getattr(kind, '__name__', kind)}")


def _decode_fields(kind: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is not an object")
    hints, found = _hints(kind), {}
    for field in fields(kind):
        if field.name in value:
            found[field.name] = _decode(hints[field.name], value[field.name])
        elif field.default is MISSING:
            raise ValueError(f"{field.name} is missing")
    return kind(**found)


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{value!r:.40} is not a list{'' if length is None else f' of {length}'}")
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
