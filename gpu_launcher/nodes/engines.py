"""The engines that start agents: what users write as `nodes`, and the command line of each node."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_launcher.errors import OptionError
from gpu_launcher.model import LOCAL
from gpu_launcher.nodes import ray_options
from gpu_launcher.nodes.slurm_options import names_job, read_term
from gpu_launcher.validation import one_of
from gpu_launcher.version import find_version

OUTPUTS = ("shared", "fetch")
"""Values of the option `outputs`."""
MAX_SLURM_NODES = 512
SLURM_MARGIN = 30
"""Seconds before the end of an allocation at which its jobs must have ended. Slurm may also signal earlier."""
MAX_SLURM_NOTICE = 65535
"""Maximum number of seconds that srun accepts in --signal."""
MAX_SBATCH_NODES = 128
"""Each takes a process on this machine that passes on what its agent says."""
MAX_RAY_NODES = 64
"""Each takes a process on this machine that imports Ray."""
_MAIN = "import sys; sys.path[:] = filter(None, sys.path); from gpu_launcher.nodes.{} import main; main()"
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
_EXAMPLES = "give local, ssh:HOST, slurm:COUNT, sbatch:COUNT, ray:COUNT, 'command:COMMAND ...', or a list of these"

# What the bridge of sbatch prints.
SUBMITTED = "submitted Slurm job"
NOT_STARTED = "the job ended before its agent was there"
NOT_CONNECTED = "the node could not connect to this machine, at"
_SBATCH_REMEDIES = {
    "cannot run sbatch": "start the sweep where Slurm's commands are installed",
    "cannot write the key": "start the sweep in a directory that you can write to and that the nodes share",
    "not look like a batch script": "name a script behind the options that begins with #!, as in 'sbatch:4 on_node.sh'",
    "Unable to open file": "name a script behind the options that begins with #!, as in 'sbatch:4 on_node.sh'",
    NOT_CONNECTED: "let the nodes connect to this machine (a firewall may forbid it), or use slurm:COUNT",
    NOT_STARTED: "see `scontrol show job` with its number",
    SUBMITTED: "`squeue --me` says why it waits; a sweep starts without it",
}


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
    notice: float = 0.0
    """Seconds before the end of its allocation at which the node's jobs are interrupted."""
    lasts: float = math.inf
    """Seconds for which jobs can run on it before its allocation ends, if its options say so."""
    elastic: bool = False
    """Whether the node is an allocation of its own, which is given back while no job needs it."""
    end_seconds: float = 5.0
    """Seconds for the command to end by itself when its input has ended."""
    cleans_up: bool = False
    """Whether a child of the command gives back what the command had, if that is killed. It gets no signals."""
    remedies: Mapping[str, str] = field(default_factory=dict)
    """What to do about problems of this engine, by a part of what its command prints about them."""

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
        for problem, remedy in self.remedies.items():
            if problem in said:
                return remedy
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


def needed(specs: Sequence[NodeSpec], at_once: int | None) -> tuple[NodeSpec, ...]:
    """Leave out allocations beyond the number of jobs that run at the same time, and all nodes if there are no jobs."""
    if at_once == 0:
        return ()
    elastic = [spec for spec in specs if spec.elastic]
    return tuple(spec for spec in specs if not spec.elastic or spec in elastic[:at_once])


def fetches(outputs: object) -> bool:
    """Read the option `outputs`: whether outputs are fetched where the sweep's directory is not shared."""
    return one_of("outputs", outputs, OUTPUTS) == "fetch"


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
        name, command = rest, (*_SSH, "--", rest, shlex.join(agent_command()))
        check = shlex.join(("ssh", rest, "true"))
    elif kind == "command" and rest:
        words = _split(text, rest)
        name, command = words[0].rpartition("/")[2], (*words, *agent_command())
        check = shlex.join((*words, "true"))
        if not name:
            raise OptionError("nodes", f"{words[0]!r} in {text!r} is not the name of a program")
    elif kind == "slurm" and rest:
        example = "options of srun, such as 'slurm:4 --partition=gpu --gpus=8 --time=8:00:00'"
        number, arguments = _read_count(text, rest, MAX_SLURM_NODES, example)
        check = shlex.join(("srun", *arguments, "true"))
        # The agent ends its jobs before the allocation ends. The user's own --signal comes later, so it counts.
        ours = f"--signal=TERM@{min(math.ceil(grace) + SLURM_MARGIN, MAX_SLURM_NOTICE)}"
        command = (*_SRUN, ours, *arguments, *agent_command())
        inside = "SLURM_JOB_ID" in os.environ or names_job(arguments)  # then srun starts a step of an allocation
        term = read_term((ours, *arguments))
        lasts = math.inf if inside else term.lasts
        for _ in range(number):
            # SIGALRM takes an srun out of the queue. One whose agent has started ignores it, and ends with the agent,
            # which sees the end of its input. SIGTERM or two SIGINT would make it kill the agent, and jobs could
            # outlive that. The kernel sends the signal once for each thread of the head.
            name = _unique("slurm", names)
            yield NodeSpec(name, command, check, signal.SIGALRM, term.notice, lasts, elastic=not inside, cleans_up=True)
        return
    elif kind == "sbatch" and rest:
        example = "options of sbatch, such as 'sbatch:4 --partition=gpu --gpus=8 --time=8:00:00'"
        number, arguments = _read_count(text, rest, MAX_SBATCH_NODES, example)
        # B: the main process passes it on to the agent. Without B, Slurm signals only steps, and there are none.
        ours = f"--signal=B:TERM@{min(math.ceil(grace) + SLURM_MARGIN, MAX_SLURM_NOTICE)}"
        term = read_term((ours, *arguments))
        flags, _, name = term.signal.rpartition(":")
        if term.signal and ("B" not in flags or name not in ("TERM", "SIGTERM", "15")):  # others end the main process
            raise OptionError("nodes", f"{text!r}: the signal would not reach the agent: give --signal=B:TERM@SECONDS")
        command = (*module_command("sbatch_bridge"), ours, *arguments)
        check = shlex.join(("sbatch", "--wrap=true", *arguments))
        for _ in range(number):
            # The bridge cancels the job when its input ends, or ends after the agent.
            name = _unique("sbatch", names)
            yield NodeSpec(
                name, command, check, signal.SIGCONT, term.notice, term.lasts, elastic=True, remedies=_SBATCH_REMEDIES
            )
        return
    elif kind == "ray" and rest:
        number, arguments = _read_count(text, rest, MAX_RAY_NODES, f"options, such as {ray_options.EXAMPLE}")
        try:
            options = ray_options.read_ray_options(arguments)
        except ValueError as error:
            raise OptionError("nodes", f"{text!r}: {error}") from None
        address = options.address or os.environ.get(ray_options.ADDRESS_VARIABLE)
        if address == ray_options.NEW_CLUSTER and number > 1:
            raise OptionError("nodes", f"{text!r}: a new cluster on this machine is one node: give ray:1")
        check = "ray status"
        for _ in range(number):
            # The bridge ends after its agent when its input ends. SIGTERM would end it before the agent.
            yield NodeSpec(
                _unique("ray", names),
                (*module_command("ray_bridge"), *arguments, *agent_command()),
                check,
                signal.SIGCONT,
                end_seconds=ray_options.BRIDGE_END_SECONDS,
                remedies=ray_options.REMEDIES,
            )
        return
    else:
        raise OptionError("nodes", f"{text!r} names no node: {_EXAMPLES}")
    yield NodeSpec(_unique(name, names), command, check)


def _read_count(text: str, rest: str, most: int, example: str) -> tuple[int, list[str]]:
    """Split the rest of an entry into the number of its nodes and the words behind that."""
    number, *words = _split(text, rest)
    if not number.isdecimal() or len(number) > 9 or not 1 <= int(number) <= most:
        kind = text.partition(":")[0]
        raise OptionError(
            "nodes", f"{text!r} has no number of nodes from 1 to {most}: give {kind}:COUNT, followed by {example}"
        )
    return int(number), words


def with_agent(spec: NodeSpec) -> NodeSpec:
    """Return a node that has an agent on this machine, too, if `spec` is the node on this machine."""
    if spec.command is not None:
        return spec
    return NodeSpec(spec.name, agent_command(), shlex.join((sys.executable, "-c", "import gpu_launcher")))


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


def agent_command() -> tuple[str, ...]:
    """Return the command line of an agent."""
    return module_command("agent")


def module_command(module: str) -> tuple[str, ...]:
    """Return the command line that calls `main` of a module in this package, without its arguments."""
    return (sys.executable, "-c", _MAIN.format(module))
