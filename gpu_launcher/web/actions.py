"""What the pages can do to a sweep: the requests of `jobs.steering`, with its permissions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.control import Ranges, read_ranges
from gpu_launcher.jobs.steering import Sweep
from gpu_launcher.text import one_line, read_digits

_log = get_logger("web.actions")

MAX_DEVICES = 10**6
Form = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Said:
    """What an action says to the user."""

    text: str
    is_problem: bool = False


def act(directory: Path, action: str, form: Form) -> Said:
    """Carry out one of ACTIONS on the sweep in a directory."""
    try:
        said = Said(one_line(ACTIONS[action](Sweep(directory), form)))
    except (SteeringError, ValueError) as error:
        said = Said(one_line(str(error)), is_problem=True)
    _log.info("%s of %s: %s%s", action, directory, "refused: " if said.is_problem else "", said.text)
    return said


def _jobs(form: Form) -> Ranges:
    """The numbers of jobs in a form. Raises ValueError."""
    if not (texts := _one(form, "jobs").replace(",", " ").split()):
        raise ValueError("no job is named: give numbers such as 7, or ranges such as 9-12")
    return read_ranges(texts)


def _limit(sweep: Sweep, form: Form) -> str:
    text = _one(form, "devices").strip()
    if not text:
        return sweep.limit(None)
    if not (devices := read_digits(text, MAX_DEVICES)):
        raise ValueError(f"{text[:20]!r} is not a number of devices: give a number such as 4, or none for no limit")
    return sweep.limit(devices)


def _one(form: Form, name: str) -> str:
    return next(iter(form.get(name) or ()), "")


ACTIONS: Mapping[str, Callable[[Sweep, Form], str]] = {
    "pause": lambda sweep, form: sweep.pause(),
    "continue": lambda sweep, form: sweep.resume(),
    "limit": _limit,
    "cancel": lambda sweep, form: sweep.cancel_ranges(_jobs(form)),
    "retry": lambda sweep, form: sweep.retry_ranges(_jobs(form)),
    "retry-failed": lambda sweep, form: sweep.retry_ranges(None),
    "stop": lambda sweep, form: sweep.stop(),
    "kill": lambda sweep, form: sweep.stop(now=True),
}
"""By name in URLs. Each returns what was done, as a line, and raises SteeringError or ValueError."""
