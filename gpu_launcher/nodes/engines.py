"""The engines that start agents: what users write as `nodes`, and the command line of each node."""

from __future__ import annotations

import math
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_launcher.errors import OptionError
from gpu_launcher.version import find_version

LOCAL = "local"
MAX_SLURM_NODES = 512
SLURM_MARGIN = 30
"""Seconds before the end of an allocation at which its jobs must have ended. Slurm may also signal earlier."""
MAX_SLURM_NOTICE = 65535
"""Maximum number of seconds that srun accepts in --signal."""
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
_EXAMPLES = "give local, ssh:HOST, slurm:COUNT, 'command:COMMAND ...', or a list of these"


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to start."""

    name: str
    """Its name in messages."""
    command: tuple[str, ...] | None
    """The command whose standard input and output are the agent's. None for a node on this machine."""
    check: str = ""
    """A command line with which users can see for themselves whether the node can be reached."""
    orphaned: signal.Signals = signal.SIGTERM
    """The signal that the command gets when the head is killed."""

    def why_not_executed(self, error: OSError) -> str:
        """Say what is wrong if the command cannot be executed, and what to do."""
        assert self.command is not None
        program = self.command[0]
        remedy = f"install {program} on this machine, or give its full path"
        return f"cannot run its command: {error.strerror}: {program!r}. Remedy: {remedy}"

    def remedy(self, status: int | None, said: str) -> str:
        """Say what to do about a command that led to no agent: its exit status, if it has ended, and what it printed.

        The texts are those of OpenSSH, shells, Slurm, container engines and Python.
        """
        assert self.command is not None
        lower, python = said.lower(), sys.executable
        if "no module named" in lower and "gpu_launcher" in lower:
            return f"install gpu-launcher {find_version()} there, for {python}"
        if python in said and any(words in lower for words in ("no such file", "not found", "permission denied")):
            return "install the same environment there, at the same path, or put it on a file system that both share"
        if self.command[0] == "ssh":
            if "could not resolve" in lower:
                return "correct the host's name, or add it to ~/.ssh/config"
            if "permission denied" in lower:
                return f"set up a key (`ssh-copy-id`) or ssh-agent, until `{self.check}` asks for nothing"
            if "host key verification failed" in lower:
                return f"run `{self.check}` once, and check the host's key"
        if self.command[0] == "srun" and status is None:
            return f"`squeue --me` says why it waits; a sweep starts without it. Else try `{self.check}`"
        if status == 0:
            return f"the command must run its last arguments as a command line; try `{self.check}`"
        return f"`{self.check}` must succeed without a question"


def read_nodes(value: object, grace: float = 10.0) -> tuple[NodeSpec, ...]:
    """Read the option `nodes`: None, text, or a list of text. Jobs get `grace` seconds to end. Raises OptionError."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError("nodes", f"{value!r} names no nodes: {_EXAMPLES}")
    stripped = [text.strip() for text in texts]
    if stripped.count(LOCAL) > 1:
        raise OptionError("nodes", "local is named twice: this machine is one node")
    names = {LOCAL}  # no other node gets this name
    return tuple(spec for text in stripped for spec in _read_entry(text, names, grace))


def _read_entry(text: str, names: set[str], grace: float) -> Iterator[NodeSpec]:
    kind, _, rest = text.partition(":")
    rest = rest.strip()
    command: tuple[str, ...]
    if text == LOCAL:
        yield NodeSpec(LOCAL, None)
        return
    if "\0" in text:
        raise OptionError("nodes", f"{text!r} contains a null character, which no command line can have")
    if kind == "ssh" and rest:
        if rest.startswith("-") or any(mark.isspace() for mark in rest):
            raise OptionError("nodes", f"{rest!r} is not the name of a host: give ssh:HOST or ssh:USER@HOST")
        # ssh joins its arguments to one line for a shell on the other side.
        name, command = rest, (*_SSH, "--", rest, shlex.join(_agent()))
        check = shlex.join(("ssh", rest, "true"))
    elif kind == "command" and rest:
        words = _split(text, rest)
        name, command = words[0].rpartition("/")[2], (*words, *_agent())
        check = shlex.join((*words, "true"))
        if not name:
            raise OptionError("nodes", f"{words[0]!r} in {text!r} is not the name of a program")
    elif kind == "slurm" and rest:
        number, *arguments = _split(text, rest)
        if not number.isdecimal() or len(number) > 9 or not 1 <= int(number) <= MAX_SLURM_NODES:
            raise OptionError(
                "nodes",
                f"{text!r} has no number of nodes from 1 to {MAX_SLURM_NODES}: give slurm:COUNT, followed by "
                "options of srun, such as 'slurm:4 --partition=gpu --gpus=8 --time=8:00:00'",
            )
        check = shlex.join(("srun", *arguments, "true"))
        # The agent ends its jobs before the allocation ends. The user's own --signal comes later, so it counts.
        notice = f"--signal=TERM@{min(math.ceil(grace) + SLURM_MARGIN, MAX_SLURM_NOTICE)}"
        for _ in range(int(number)):
            # SIGALRM takes an srun out of the queue. One whose agent has started ignores it, and ends with the agent,
            # which sees the end of its input. SIGTERM or two SIGINT would make it kill the agent, and jobs could
            # outlive that. The kernel sends the signal once for each thread of the head.
            yield NodeSpec(_unique("slurm", names), (*_SRUN, notice, *arguments, *_agent()), check, signal.SIGALRM)
        return
    else:
        raise OptionError("nodes", f"{text!r} names no node: {_EXAMPLES}")
    yield NodeSpec(_unique(name, names), command, check)


def _split(text: str, rest: str) -> list[str]:
    """Split the rest of an entry into words, as a shell does. It may be quoted as a whole, as in slurm:'4 --gpus=8'."""
    try:
        words = shlex.split(rest)
        return shlex.split(words[0]) if len(words) == 1 and words[0].strip() else words
    except ValueError as error:
        raise OptionError("nodes", f"{text!r} cannot be split into words: {error}") from None


def _unique(name: str, names: set[str]) -> str:
    number, unique = 2, name
    while unique in names:
        number, unique = number + 1, f"{name}-{number}"
    names.add(unique)
    return unique


def _agent() -> tuple[str, ...]:
    return (sys.executable, "-c", _AGENT)
