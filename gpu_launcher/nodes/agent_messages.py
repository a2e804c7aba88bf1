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

from gpu_launcher.jobs.job import Job
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
    private: bool = False
    """Whether the node has a sweep's directory of its own, so that it sends the outputs of jobs."""


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


# The outputs of a job that has ended, from an agent without the sweep's directory. See `nodes.outputs`.


@dataclass(frozen=True, slots=True)
class OutputsBegin:
    """The outputs of a job follow: its directory, piece by piece, and then its report."""

    number: int
    directory: str | None
    """Its directory in that of the sweep. None if only a report follows."""
    size: int
    """Number of bytes of all files."""
    log: str
    """The name of its log. Empty if it has none."""
    attempt: int


@dataclass(frozen=True, slots=True)
class OutputDirectory:
    """A directory in the job's directory."""

    number: int
    path: str


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file, whose content follows."""

    number: int
    path: str | None
    """Its path in the job's directory. None for the report."""
    mode: int


@dataclass(frozen=True, slots=True)
class OutputData:
    """A part of the content of the file that was named last."""

    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class OutputLink:
    """A symbolic link."""

    number: int
    path: str
    target: str


@dataclass(frozen=True, slots=True)
class OutputsEnd:
    """All outputs of a job were sent. Its result follows."""

    number: int
    problem: str | None
    """Why some were not sent. None if all were."""
    left_out: int
    """How many links and special files were left out."""


OutputPiece = OutputsBegin | OutputDirectory | OutputFile | OutputData | OutputLink | OutputsEnd


# In both directions, about a channel between a head and the process of a job. See `nodes.channel_relay`.


@dataclass(frozen=True, slots=True)
class ChannelData:
    """A part of a message in a channel."""

    channel: int
    data: bytes
    last: bool
    """Whether the message ends with it."""


@dataclass(frozen=True, slots=True)
class ChannelRead:
    """The reader of a channel has taken `count` more bytes, so as many more may be sent."""

    channel: int
    count: int


@dataclass(frozen=True, slots=True)
class ChannelEnd:
    """The job of a channel has ended, and everything that it said was sent. The last message about the channel."""

    channel: int


# From a head to an agent.


@dataclass(frozen=True, slots=True)
class OfferWithChannel:
    """An `Offer` of a job that has a channel to its source."""

    job: Job
    channel: int
    """The channel's number in ChannelData and the like. A job that is offered again gets another one."""


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
    notice: float = 0.0
    """Seconds before the end of its allocation at which the node's jobs are interrupted."""
    allocation: str | None = None
    """The id of the Slurm allocation in which the head runs, if it runs in one."""
    elastic: bool = False
    """Whether the node is an allocation of its own, which the agent gives back if it loses the head."""
    fetches: bool = False
    """Whether the outputs of jobs are sent to the head, if the node does not see the probe."""


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
class StopOutputs:
    """The head cannot keep the outputs of this job. No more of them are sent."""

    number: int


@dataclass(frozen=True, slots=True)
class EndAgent:
    """End the node, and then say Bye."""


def digest_of(path: Path) -> bytes | None:
    """Return the SHA-256 of a file. None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None
