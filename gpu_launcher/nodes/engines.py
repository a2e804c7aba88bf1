"""The engines that start agents: what users write as `nodes`, and the command line of each node."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_launcher.errors import OptionError

LOCAL = "local"
MAX_SLURM_NODES = 512
_AGENT = "import sys; sys.path[:] = filter(None, sys.path); from gpu_launcher.nodes.agent import main; main()"
# Nothing may be imported from the directory in which the engine starts the agent.
_SSH = (
    "ssh",
    "-T",
    "-o",
    "BatchMode=yes",  # a question for a password would wait behind the sweep's screen
    "-o",
    "ConnectTimeout=20",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=5",
)
_SRUN = ("srun", "--unbuffered", "--quiet", "--nodes=1", "--ntasks=1")
# Without --unbuffered, srun passes on whole lines only.
_EXAMPLES = "give local, ssh:HOST, slurm:COUNT, command:'COMMAND ...', or a list of these"


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to start."""

    name: str
    """Its name in messages."""
    command: tuple[str, ...] | None
    """The command whose standard input and output are the agent's. None for a node on this machine."""


def read_nodes(value: object) -> tuple[NodeSpec, ...]:
    """Read the option `nodes`: None, text, or a list of text. Raises OptionError."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError("nodes", f"{value!r} names no nodes: {_EXAMPLES}")
    names: set[str] = set()
    return tuple(spec for text in texts for spec in _read_entry(text.strip(), names))


def _read_entry(text: str, names: set[str]) -> Iterator[NodeSpec]:
    kind, _, rest = text.partition(":")
    rest = rest.strip()
    command: tuple[str, ...] | None
    if text == LOCAL:
        name, command = LOCAL, None
        if LOCAL in names:
            raise OptionError("nodes", "local is named twice: this machine is one node")
    elif kind == "ssh" and rest:
        if rest.startswith("-") or any(mark.isspace() for mark in rest):
            raise OptionError("nodes", f"{rest!r} is not the name of a host: give ssh:HOST or ssh:USER@HOST")
        # ssh joins its arguments to one line for a shell on the other side.
        name, command = rest, (*_SSH, "--", rest, shlex.join(_agent()))
    elif kind == "command" and rest:
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise OptionError("nodes", f"{text!r} cannot be split into words: {error}") from None
        name, command = words[0].rpartition("/")[2], (*words, *_agent())
    elif kind == "slurm" and rest:
        number, *arguments = shlex.split(rest)
        if not number.isdecimal() or not 1 <= int(number) <= MAX_SLURM_NODES:
            raise OptionError(
                "nodes",
                f"{text!r} has no number of nodes from 1 to {MAX_SLURM_NODES}: give slurm:COUNT, and behind it options "
                "of srun, such as 'slurm:4 --partition=gpu --gpus=8 --time=8:00:00'",
            )
        for _ in range(int(number) - 1):
            yield NodeSpec(_unique("slurm", names), (*_SRUN, *arguments, *_agent()))
        name, command = "slurm", (*_SRUN, *arguments, *_agent())
    else:
        raise OptionError("nodes", f"{text!r} names no node: {_EXAMPLES}")
    yield NodeSpec(_unique(name, names), command)


def _unique(name: str, names: set[str]) -> str:
    number, unique = 2, name
    while unique in names:
        number, unique = number + 1, f"{name}-{number}"
    names.add(unique)
    return unique


def _agent() -> tuple[str, ...]:
    return (sys.executable, "-c", _AGENT)
