"""The protocol of a sweep's control socket: requests and answers as lines of JSON. Pure.

    {"version": 1, "do": "cancel", "jobs": [[7, 7], [9, 12]]}
    {"version": 1, "ok": true, "ending": [[9, 9]], "dropped": [[7, 7]], "already": [], "coming": [], "grace": 10.0}
    {"version": 1, "ok": false, "problem": "..."}

Each request gets one answer. After the answer to `watch`, the lines of `jobs.event_lines` follow until the sweep ends.
Jobs are named by ranges of numbers, so a request is short, however many jobs it names.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.text import read_digits, short_repr

VERSION = 1
MAX_LINE = 2**16
"""Maximum number of bytes of a request or an answer."""
MAX_RANGES = 1000
"""Maximum number of ranges that a request names. An answer leaves out more."""
MAX_NUMBER = 2**31
"""Largest number of a job in a request."""

MAX_SPELLED = 12
"""Maximum number of ranges in a line for people."""

Ranges = tuple[tuple[int, int], ...]
"""Numbers of jobs, as first and last number of each range, in order."""


@dataclass(frozen=True, slots=True)
class AskStatus:
    """How does the sweep stand?"""


@dataclass(frozen=True, slots=True)
class CancelJobs:
    """End these jobs, or do not start them."""

    jobs: Ranges


@dataclass(frozen=True, slots=True)
class RetryJobs:
    """Run those of these jobs again that failed or were cancelled."""

    jobs: Ranges | None
    """None for all that failed."""


@dataclass(frozen=True, slots=True)
class StopSweep:
    """End the sweep as Ctrl-C does. With `now`, as a second Ctrl-C does."""

    now: bool = False


@dataclass(frozen=True, slots=True)
class PauseSweep:
    """Start no more jobs until the sweep is continued."""


@dataclass(frozen=True, slots=True)
class ContinueSweep:
    """Start jobs again."""


@dataclass(frozen=True, slots=True)
class LimitDevices:
    """Use at most this many devices from now on. None for no limit."""

    devices: int | None


@dataclass(frozen=True, slots=True)
class WatchSweep:
    """Send the state of the sweep, and then each event."""


Steering = AskStatus | WatchSweep | CancelJobs | RetryJobs | StopSweep | PauseSweep | ContinueSweep | LimitDevices
"""A request to the head of a sweep."""

RANGES: Mapping[type[Steering], tuple[str, ...]] = {
    CancelJobs: ("ending", "dropped", "already", "coming"),
    RetryJobs: ("again", "ahead", "unfinished"),
}
"""Names of the fields of an answer that name jobs."""

Answer = Mapping[str, Any]
"""What the head answers, as JSON data without `version` and `ok`."""


_NAMES = {
    AskStatus: "status",
    WatchSweep: "watch",
    CancelJobs: "cancel",
    RetryJobs: "retry",
    StopSweep: "stop",
    PauseSweep: "pause",
    ContinueSweep: "continue",
    LimitDevices: "limit",
}


def name_of(request: Steering) -> str:
    """Return the name of a request, which is also that of its command."""
    return _NAMES[type(request)]


def write_request(request: Steering) -> bytes:
    """Return the line of a request."""
    content: dict[str, Any] = {"do": name_of(request)}
    match request:
        case CancelJobs(jobs):
            content["jobs"] = jobs
        case RetryJobs(jobs):
            content["jobs"] = jobs
        case StopSweep(now):
            content["now"] = now
        case LimitDevices(devices):
            content["devices"] = devices
    return _line(content)


def read_request(line: bytes) -> Steering:
    """Read the line of a request. Raises ValueError, whose message is for the sender."""
    try:
        content = load_object(line)
    except ValueError:
        raise ValueError("this is not a control request of gpu-launcher") from None
    version = content.get("version")
    if version != VERSION:
        raise ValueError(f"this sweep's gpu-launcher reads control requests of version {VERSION}, not {version!r:.40}")
    fields = Fields(content)
    match content.get("do"):
        case "status":
            return AskStatus()
        case "watch":
            return WatchSweep()
        case "cancel":
            return CancelJobs(_read_ranges(content.get("jobs")))
        case "retry":
            return RetryJobs(None if content.get("jobs", 0) is None else _read_ranges(content.get("jobs")))
        case "stop":
            return StopSweep(fields.boolean("now"))
        case "pause":
            return PauseSweep()
        case "continue":
            return ContinueSweep()
        case "limit":
            return LimitDevices(None if content.get("devices", 0) is None else fields.integer("devices", least=1))
        case other:
            raise ValueError(f"this sweep's gpu-launcher has no control request {other!r:.40}")


def write_answer(answer: Answer) -> bytes:
    """Return the line of the answer to a request that was carried out."""
    return _line({"ok": True, **answer})


def write_refusal(problem: str) -> bytes:
    """Return the line of the answer to a request that was not carried out."""
    return _line({"ok": False, "problem": problem})


def read_answer(line: bytes) -> dict[str, Any]:
    """Read the line of an answer. Raises ValueError for anything else, and for an answer of another version."""
    content = load_object(line)
    if content.get("version") != VERSION or not isinstance(content.get("ok"), bool):
        raise ValueError("not an answer of this version")
    return content


def check_answer(request: Steering, answer: Answer) -> None:
    """Raise ValueError if this does not answer the request. The head may be another user's program."""
    fields = Fields(answer)
    if isinstance(request, AskStatus):
        fields.text_or_none("stopping")
        fields.boolean("paused")
        _integer_or_none(answer, "devices")
        _integer_or_none(answer, "total")
        _check_ended(answer.get("ended"))
        _check_facts(answer.get("facts"))
    if isinstance(request, WatchSweep):
        return
    if isinstance(request, CancelJobs | RetryJobs):
        for name in RANGES[type(request)]:
            if answer.get(name) != []:
                _read_ranges(answer.get(name))
    else:
        fields.integer("running")
    if isinstance(request, CancelJobs | StopSweep):
        fields.time("grace")
    if isinstance(request, RetryJobs):
        fields.boolean("over")
    if isinstance(request, StopSweep):
        fields.boolean("already")
    if isinstance(request, PauseSweep | ContinueSweep | LimitDevices):
        fields.boolean("changed")


def _integer_or_none(content: Answer, name: str) -> None:
    if content.get(name) is not None:
        Fields(content).integer(name)


def _check_ended(value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError("ended does not count outcomes")
    for outcome in value:
        Fields(value).integer(Outcome(outcome).value)


def _check_facts(value: object) -> None:
    if not isinstance(value, list):
        raise ValueError("facts is not a list")
    for fact in value:
        if not isinstance(fact, list) or len(fact) != 2 or not all(isinstance(text, str) for text in fact):
            raise ValueError("facts has something that is not a name and a value")


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **content}).encode() + b"\n"


def _read_ranges(value: object) -> Ranges:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_RANGES:
        raise ValueError(f"jobs is not a list of 1 to {MAX_RANGES} ranges")
    return merged(_read_range(pair) for pair in value)


def _read_range(pair: object) -> tuple[int, int]:
    match pair:
        case [first, last] if type(first) is type(last) is int and 0 <= first <= last <= MAX_NUMBER:
            return first, last
    raise ValueError(f"jobs has {pair!r:.40}, which is not a range of numbers")


# Ranges


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """Return numbers as ranges."""
    return merged((number, number) for number in numbers)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges in order, without gaps of nothing between them and without overlaps."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return tuple(found)


def overlap(ranges: Ranges, first: int, last: int) -> Ranges:
    """Return the parts of `ranges` from `first` to `last`."""
    parts = ((max(one, first), min(other, last)) for one, other in ranges)
    return tuple((one, other) for one, other in parts if one <= other)


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """Return the numbers of `ranges` that are not in `others`."""
    left = []
    for first, last in merged(ranges):
        for one, other in merged(overlap(others, first, last)):
            if first < one:
                left.append((first, one - 1))
            first = other + 1
        if first <= last:
            left.append((first, last))
    return tuple(left)


def contains(ranges: Ranges, number: int) -> bool:
    """Whether a number is in one of the ranges."""
    at = bisect.bisect_right(ranges, (number, MAX_NUMBER)) - 1
    return at >= 0 and number <= ranges[at][1]


def named(ranges: Ranges, numbers: Collection[int]) -> list[int]:
    """Return those of `numbers` that are in one of the ranges, in order."""
    return sorted(number for number in numbers if contains(ranges, number))


def read_ranges(texts: Iterable[str]) -> Ranges:
    """Read job numbers as a user writes them: `7`, `9-12`, `1,3,5-6`. Raises ValueError with a message for the user."""
    found = []
    for text in texts:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            begin, end = (read_digits(number, MAX_NUMBER) for number in (first, last if dash else first))
            if begin is None or end is None:
                said = short_repr(text)
                raise ValueError(f"{said} is not a job's number: give numbers such as 7, or ranges such as 9-12")
            if begin > end:
                raise ValueError(f"{part.strip()!r} ends before it begins: write {end}-{begin}")
            found.append((begin, end))
    if len(ranges := merged(found)) > MAX_RANGES:
        raise ValueError(f"{len(ranges)} ranges are too many for one command: give at most {MAX_RANGES}")
    return ranges


def is_one(ranges: Ranges) -> bool:
    """Whether the ranges name a single job."""
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def spell(ranges: Ranges) -> str:
    """Format jobs for people: `job 7`, `jobs 3, 9-12`."""
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:MAX_SPELLED]]
    more = ", ..." if len(ranges) > MAX_SPELLED else ""
    return f"{'job' if is_one(ranges) else 'jobs'} {', '.join(shown)}{more}"
