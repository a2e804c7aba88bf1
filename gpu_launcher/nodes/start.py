"""Starts what runs the jobs of a program: a node on this machine, or a group of nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.node import LogFile
from gpu_launcher.jobs.node_client import LocalNode, RemoteLoop
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.jobs.where import this_program
from gpu_launcher.nodes.engines import NodeSpec, needed
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.worker import Program
from gpu_launcher.validation import StartMethod

if TYPE_CHECKING:
    from gpu_launcher.nodes.group_loop import GroupLoop
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
    at_once: Callable[[], int | None] = lambda: None,
    fetches: bool = False,
    logs: Sequence[str] = (),
) -> LocalNode | NodeGroup:
    """Start the nodes that `specs` name, or a node on this machine if there is no other.

    `directory` holds the results. All nodes must see it, unless this program `fetches` the outputs of jobs.
    `arguments` are the program's `sys.argv`. If `imports_script`, other nodes import the program's main module, because
    its jobs may need what it defines. `check` is called on other nodes, and returns why the program cannot run there;
    None if it can. `at_once` returns the maximum number of jobs at the same time, and None if there is no maximum; no
    more allocations than that are requested, and for 0 no other node is started. `logs` names the files of a job's
    directory that are kept for each attempt when outputs are fetched, in addition to its log. The other arguments are
    those of `LocalNode`.

    Raises OptionError if the program cannot be sent to nodes, and NodeStartError if the command of a node cannot run.
    """
    local = partial(
        LocalNode, program, method=method, option=option, keep=keep, log_file=log_file, open_files=open_files
    )
    if any(spec.command is not None for spec in specs):
        specs = needed(specs, at_once())
    if all(spec.command is None for spec in specs):
        return local()
    from gpu_launcher.nodes.agent_messages import HostedProgram  # most programs run on one machine
    from gpu_launcher.nodes.node_group import NodeGroup

    hosted = HostedProgram(program, log_file, check=check)
    return NodeGroup(
        specs,
        local,
        hosted,
        directory,
        method=method,
        option=option,
        arguments=arguments,
        imports_script=imports_script,
        fetches=fetches,
        logs=logs,
    )


def start_loop(
    specs: Sequence[NodeSpec],
    program: Program,
    options: Options,
    *,
    method: StartMethod,
    channels: bool = False,
    keep: tuple[int, ...] = (),
) -> RemoteLoop | GroupLoop:
    """Start the nodes that `specs` name, or a node on this machine, with one run. See `RemoteLoop` and `GroupLoop`.

    The processes on this machine keep the descriptors `keep` open.
    """
    if all(spec.command is None for spec in specs):
        return RemoteLoop(program, options, this_program(), method=method, keep=keep)
    from gpu_launcher.nodes.group_loop import GroupLoop  # most programs run on one machine

    return GroupLoop(specs, program, options, this_program(), method=method, channels=channels, keep=keep)
