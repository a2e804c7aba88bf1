"""Messages between a head and the agents of its nodes. Messages of the nodes themselves pass through unchanged."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gpu_launcher.jobs.node import LogFile
from gpu_launcher.processes.worker import Program
from gpu_launcher.validation import StartMethod
from gpu_launcher.version import find_version

COMPARED = ("gpu-launcher", "hydra-core", "omegaconf", "cloudpickle", "optuna")
"""Distributions whose objects travel between head and nodes, so that both need the same version."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When each side decides, in seconds of its own clock, that the other is gone.

    When the head gives the jobs of a silent node to others, the agent must have ended them. So the head first stops
    sending. An agent hears a message that was under way for at most `silence` seconds, or else it has ended before;
    then it takes `silence` seconds to end. The rest of `lost` is for ending the jobs.
    """

    beat: float = 2.0
    """Seconds between two signs of life."""
    quiet: float = 10.0
    """Seconds without a sign of life after which the head sends no more, until it hears one."""
    silence: float = 15.0
    """Seconds without a sign of life after which an agent ends its jobs."""
    lost: float = 35.0
    """Seconds after the head last sent something at which it counts a silent node as lost."""


def versions() -> dict[str, str]:
    """Return the versions that must be the same on both sides."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPARED:
        try:
            found[name] = find_version() if name == "gpu-launcher" else metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


# From an agent to its head.


def hello() -> dict[str, object]:
    """Return the first message. It consists of plain types, so that every version can read it."""
    return {"versions": versions(), "host": os.uname().nodename, "pid": os.getpid(), "python": sys.executable}


@dataclass(frozen=True, slots=True)
class Refused:
    """The agent cannot run the head's jobs, and ends."""

    problem: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The program is imported, and the node starts."""

    differs: bool
    """Whether the program's script is not the same on the node."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, in both directions."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A question from the head, which the agent sends back."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """The agent was asked to end, and ends its jobs. Those that have no report yet can run elsewhere."""

    why: str


@dataclass(frozen=True, slots=True)
class Bye:
    """No process of the node is left. The last message."""


# From a head to an agent.


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to an agent: the program, and what it needs."""

    timing: Timing
    directory: str
    """The working directory of the program."""
    arguments: tuple[str, ...]
    """The program's `sys.argv`."""
    interpreter: bytes
    """The result of `spawn.describe_interpreter`, with a pickled `HostedProgram`."""
    script: Script | None
    """The main module, if jobs need what it defines. None for a notebook and the like, and for commands."""
    probe: tuple[str, bytes] | None
    """A file in the sweep's directory with its content, which the node must see, too. None if they share no directory:
    then each node keeps its jobs' reports in a temporary directory of its own."""
    method: StartMethod
    option: str
    """The name of the user's option for the start method."""


@dataclass(frozen=True, slots=True)
class Script:
    """A main module, which each node runs once without its main part, before it forks jobs."""

    file: str
    module: str | None
    """Its name, if the program was started with `python -m`."""
    digest: bytes | None
    """SHA-256 of the file."""

    @classmethod
    def of_this_program(cls) -> Script | None:
        """Return the main module of this process, if it has a file."""
        main = sys.modules["__main__"]
        file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
        if file is None:
            return None
        return cls(str(Path(file).absolute()), None if spec is None else spec.name, digest_of(Path(file)))


@dataclass(frozen=True)  # without slots, `found_at` can name the part that cannot be pickled
class HostedProgram:
    """What the jobs of a node run, and where their output goes. It is pickled by value."""

    program: Program
    log_file: LogFile
    captured: bool = True
    """Whether output of jobs without a log is kept for messages. Otherwise the head passes it on to its terminal."""
    check: Callable[[], str | None] | None = None
    """Returns why the machine of a node cannot run the program; None if it can."""


@dataclass(frozen=True, slots=True)
class EndAgent:
    """End the node, and then say Bye."""


def digest_of(path: Path) -> bytes | None:
    """Return the SHA-256 of a file. None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None
