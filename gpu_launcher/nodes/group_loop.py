"""Several nodes with one run, for a program whose jobs tell it in messages what becomes of them.

The nodes share no directory with the program. So they need its script and its working directory, and nothing else.

If jobs have channels, the node on this machine has an agent, too. So a function finds the same program whichever node
calls it: the program as it is imported, not as it has become since.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gpu_launcher.errors import NodeDiedError
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import GaveUp, NodesChanged, Notice
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Message, Opened
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.scratch import Scratch
from gpu_launcher.jobs.sweep import Options, portable
from gpu_launcher.nodes.agent_messages import HostedProgram
from gpu_launcher.nodes.engines import NodeSpec, needed, with_agent
from gpu_launcher.nodes.node_group import POLL_SECONDS, NodeGroup
from gpu_launcher.processes.pickling import NOTHING
from gpu_launcher.processes.worker import Program
from gpu_launcher.validation import StartMethod

SPARE_DESCRIPTORS = 64
"""Descriptors that the channels of jobs leave free for the rest of the program."""


class GroupLoop(NodeGroup):
    """See the module. Use it like a `RemoteLoop`."""

    tick_seconds = POLL_SECONDS
    moves_jobs = True
    shares_files = False
    unsafe: str | None = None

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        program: Program,
        options: Options,
        command: str,
        *,
        method: StartMethod,
        channels: bool = False,
        keep: tuple[int, ...] = (),
    ) -> None:
        """Start the nodes and the run. Raises what `NodeGroup` raises.

        `channels` says whether offers bring channels. Events are then those for a program without a display. The other
        arguments are those of `RemoteLoop`; `keep` is for the processes on this machine.
        """
        self.known = NOTHING
        self._no_node: str | None = None
        """Why no node is left, if none is."""
        self._scratch = Scratch()
        """Directory for the reports of jobs on this machine."""
        self.directory = self._scratch.path
        """Directory for files of this program about its jobs."""
        self._has_channels = channels
        option = options.spell("start_method")
        super().__init__(
            needed([with_agent(spec) for spec in specs] if channels else specs, options.max_parallel),
            partial(LocalNode, program, method=method, option=option, captured=False, keep=keep),
            HostedProgram(program, as_proposed, captured=False),
            None,
            method=method,
            option=option,
            arguments=sys.argv,
            imports_script=True,
        )
        self.say(BeginRun(portable(options), ReportFiles(self.directory), command, shown=not channels, last=True))

    def open(self) -> Opened:
        """Wait until jobs can run, or nodes wait in a queue. Raises the error that prevents that."""
        opened = super().open()
        early, self.early = self.early, []
        self._outbox[:0] = early
        self._announce()
        return opened

    def receive_ready(self) -> list[Message]:
        """Return what the nodes have reported. If no node is left, the run ends with an error."""
        return [self._seen_here(message) for message in super().receive_ready()]

    def _seen_here(self, message: Message) -> Message:
        match message:
            case GaveUp(problem=problem):
                self._no_node = problem.removeprefix("was not run: ")
            case Closed(None) if self._no_node is not None:
                return Closed(NodeDiedError(self._no_node))
            case NodesChanged(time, _, text) if self._has_channels:
                return Notice(time, text)
        return message

    def _most_jobs(self, options: Options) -> int | None:
        """Return for how many jobs there are descriptors, too: the channel of a job takes two of this program's."""
        most = super()._most_jobs(options)
        if not self._has_channels:
            return most
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = sum(1 for _ in Path("/proc/self/fd").iterdir())
        affordable = max(1, (limit - used - SPARE_DESCRIPTORS) // 2)
        return affordable if most is None else min(most, affordable)

    @property
    def is_ours(self) -> bool:
        """Whether this process started the nodes. False in a fork of that process."""
        return self._process == os.getpid()

    def _conclude_lost(self) -> None:
        """Do nothing: the error that ends the run concludes all jobs."""

    def close(self) -> None:
        """End all nodes. Idempotent."""
        super().close()
        if self.is_ours:
            self._scratch.remove()
