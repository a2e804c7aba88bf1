"""Starts what runs the jobs of a program: a node on this machine, or a group of nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.node import LogFile
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.worker import Program
from gpu_launcher.validation import StartMethod

if TYPE_CHECKING:
    from gpu_launcher.nodes.node_group import NodeGroup


def start_nodes(
    specs: Sequence[NodeSpec],
    program: Program,
    directory: Path,
    *,
    arguments: Sequence[str],
    method: StartMethod = "auto",
    option: str = "start_method",
    keep: tuple[int, ...] = (),
    log_file: LogFile = as_proposed,
    open_files: OpenFiles | None = None,
    imports_script: bool = True,
    check: Callable[[], str | None] | None = None,
    idle: Callable[[], bool] = lambda: False,
) -> LocalNode | NodeGroup:
    """Start the nodes that `specs` name, or a node on this machine if there is no other.

    `directory` holds the results; all nodes must see it. `arguments` are the program's `sys.argv`. If `imports_script`,
    other nodes import the program's main module, because its jobs may need what it defines. `check` is called on other
    nodes, and returns why the program cannot run there; None if it can. `idle` says whether there is nothing to run, so
    that other machines are not reached. The other arguments are those of `LocalNode`.

    Raises OptionError if the program cannot be sent to nodes, and NodeStartError if the command of a node cannot run.
    """
    local = partial(
        LocalNode, program, method=method, option=option, keep=keep, log_file=log_file, open_files=open_files
    )
    if all(spec.command is None for spec in specs):
        return local()
    from gpu_launcher.nodes.agent_messages import HostedProgram  # most programs run on one machine
    from gpu_launcher.nodes.node_group import NodeGroup

    hosted = HostedProgram(program, log_file, check=check)
    return NodeGroup(
        () if idle() else specs,
        local,
        hosted,
        directory,
        method=method,
        option=option,
        arguments=arguments,
        imports_script=imports_script,
    )
