"""Several nodes with one run, for a program whose jobs tell it in messages what becomes of them.

The nodes share no directory with the program. So they need its script and its working directory, and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

from gpu_launcher.errors import NodeDiedError
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import GaveUp
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Message, Opened
from gpu_launcher.jobs.reports import ReportFiles
from gpu_launcher.jobs.scratch import Scratch
from gpu_launcher.jobs.sweep import Options, portable
from gpu_launcher.nodes.agent_messages import HostedProgram
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.node_group import POLL_SECONDS, NodeGroup
from gpu_launcher.processes.pickling import NOTHING
from gpu_launcher.processes.worker import Program
from gpu_launcher.validation import StartMethod


class GroupLoop(NodeGroup):
    """See the module. Use it like a `RemoteLoop`."""

    tick_seconds = POLL_SECONDS
    moves_jobs = True

    def __init__(
        self, specs: Sequence[NodeSpec], program: Program, options: Options, command: str, *, method: StartMethod
    ) -> None:
        """Start the nodes and the run. The arguments are those of `RemoteLoop`. Raises what `NodeGroup` raises."""
        self.known = NOTHING
        self._no_node: str | None = None
        """Why no node is left, if none is."""
        self._scratch = Scratch()
        """Directory for the reports of jobs on this machine."""
        option = options.spell("start_method")
        super().__init__(
            specs,
            partial(LocalNode, program, method=method, option=option, captured=False),
            HostedProgram(program, as_proposed, captured=False),
            None,
            method=method,
            option=option,
            arguments=sys.argv,
            imports_script=True,
        )
        self.say(BeginRun(portable(options), ReportFiles(self._scratch.path), command, shown=True, last=True))

    def open(self) -> Opened:
        """Wait until jobs can run, or nodes wait in a queue. Raises the error that prevents that."""
        opened = super().open()
        early, self.early = self.early, []
        self._outbox[:0] = early
        os.eventfd_write(self._posted, 1)
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
        return message

    def _conclude_lost(self) -> list[Message]:
        """Do nothing: the error that ends the run concludes all jobs."""
        return []

    def close(self) -> None:
        """End all nodes. Idempotent."""
        super().close()
        if self._process == os.getpid():
            self._scratch.remove()
