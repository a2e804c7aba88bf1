"""What the options of `srun` and `sbatch` say about the time of an allocation. Pure."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_launcher.nodes.slurm_time import EARLY_SECONDS

DEFAULT_NOTICE = 60.0
"""Seconds before the end of an allocation at which Slurm signals if an option names only the signal."""
# Options without a value, or whose value needs `=`, in all versions of Slurm. All others take the next word.
_FLAGS = (
    "bell compress consolidate-segments contiguous disable-status exact exclusive external get-user-env help hold "
    "ignore-pbs immediate interactive join kill-on-bad-exit label multi-prog nice no-allocate no-bell no-kill "
    "no-requeue overcommit overlap oversubscribe parsable preserve-env propagate pty quiet quit-on-interrupt reboot "
    "requeue resv-ports send-libs share spread-job spread-segments stepmgr test-only unbuffered usage use-min-nodes "
    "verbose version whole"
)
_SHORT_FLAGS = frozenset("EHIKOQVXZhklsuv")
_SHORT_OPTIONAL = frozenset("IKk")
"""Those of them that may have a value, in the same word."""


@dataclass(frozen=True, slots=True)
class SlurmTerm:
    """What options say about the end of an allocation."""

    signal: str
    """Which signal Slurm is to send, and to what, as in `B:TERM`. Empty if the options do not say."""
    notice: float
    """How many seconds before the end Slurm is to send it. 0 if it sends none."""
    lasts: float
    """For how many seconds jobs can run. Infinite if the options set no time limit, or one that we cannot read."""


def options_in(words: Sequence[str]) -> Sequence[str]:
    """Return the options at the beginning, without the command that may follow."""
    place = 0
    while place < len(words):
        word = words[place]
        if not word.startswith("-") or word in ("-", "--"):
            break
        place += 2 if _takes_next(word) else 1
    return words[:place]


def names_job(words: Sequence[str]) -> bool:
    """Whether an option of srun names the allocation in which it is to run. It may be abbreviated."""
    return any(word.partition("=")[0] in ("--jobi", "--jobid") for word in options_in(words))


def _takes_next(word: str) -> bool:
    """Whether the value of an option is the next word."""
    if word.startswith("--"):
        return "=" not in word and word[2:] not in _FLAGS.split()
    for place, letter in enumerate(word[1:], 2):
        if letter in _SHORT_OPTIONAL:
            return False
        if letter not in _SHORT_FLAGS:
            return place == len(word)
    return False


def read_term(words: Sequence[str]) -> SlurmTerm:
    """Read the options for the time limit and the signal. Of several, the last one counts."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("-t", "--time", default="")
    options.add_argument("--signal", default="")
    try:
        known, _ = options.parse_known_args(options_in(words))
    except argparse.ArgumentError:  # Slurm will complain
        return SlurmTerm("", 0.0, math.inf)
    signal, _, seconds = known.signal.partition("@")
    notice = float(seconds) if seconds.isdecimal() else DEFAULT_NOTICE
    return SlurmTerm(signal, notice, read_time_limit(known.time) - notice - EARLY_SECONDS)


def read_time_limit(text: str) -> float:
    """Read a time limit as Slurm does: D-H, D-H:M, D-H:M:S, M, M:S or H:M:S. Infinite for anything else, and for 0."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() and len(part) < 9 for part in (days or "0", *parts)) or len(parts) > 3:
        return math.inf
    numbers = [int(part) for part in parts]
    hours, minutes, seconds = ([*numbers, 0, 0] if days or len(parts) == 3 else [0, *numbers, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds or math.inf
