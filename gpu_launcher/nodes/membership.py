"""Nodes that join, leave and are lost: what follows for their jobs, and what the head is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs.events import NodesChanged, Notice
from gpu_launcher.jobs.node_messages import Message, Opened
from gpu_launcher.jobs.source import Exhausted, Stop
from gpu_launcher.nodes.group_jobs import GroupJobs
from gpu_launcher.nodes.member import Member, MemberPhase, devices_of
from gpu_launcher.nodes.node_connections import NodeConnections
from gpu_launcher.nodes.output_receiver import OutputReceiver
from gpu_launcher.wording import count, device_counts

_log = get_logger("nodes.membership")

RETRY_SECONDS = 0.1
"""Seconds until it is looked again whether nothing is left of a node that is to be started again."""


class Membership:
    """See the module."""

    def __init__(
        self,
        members: Mapping[str, Member],
        connections: NodeConnections,
        jobs: GroupJobs,
        post: Callable[[Message], None],
        directory: Path | None,
        logs: Sequence[str],
    ) -> None:
        """Begin when the nodes do. `directory` is the sweep's, and `logs` are those of an `OutputReceiver`."""
        self._members = members
        self._connections = connections
        self._jobs = jobs
        self._post = post
        self._directory = directory
        self._logs = logs

    def begin(self, member: Member) -> None:
        """Let a node that was just started begin the run."""
        begin = self._jobs.begun
        assert begin is not None
        environ = None if member.remote is not None else begin.options.environ
        # Failures are counted here, over all nodes. One node alone cannot say that the cap leaves devices idle.
        failures = replace(begin.options.failures, most=None)
        options = replace(begin.options, failures=failures, cap=None, environ=environ)
        member.begin(replace(begin, options=options, node=member.name, listed=False))

    def join(self, member: Member, pool: Opened) -> None:
        """Take note that the pool of a node is open."""
        assert self._jobs.begun is not None
        member.open(pool)
        member.outputs = None
        if member.remote is not None and member.remote.private and self._directory is not None:
            member.outputs = OutputReceiver(self._directory, self._jobs.begun.reports, self._logs)
        if member.remote is not None and member.remote.differs:
            self._post(Notice(time.monotonic(), f"{member.name}: the program's script is not the same as here"))
        if self._jobs.stopping:
            member.tell(Stop())
        if self._jobs.exhausted_told:
            member.tell(Exhausted())
        if self._jobs.opened:
            self._note_change(f"{member.name} joined with {device_counts(pool.devices)}")

    def retire(self, member: Member, phase: MemberPhase, why: str) -> None:
        """Give a node no more jobs, and take back those that it ends without a report."""
        member.retire(phase, why)
        self._post(Notice(time.monotonic(), f"node {member.name} {why}"))
        self._jobs.leaves(member)

    def end_run(self, member: Member, error: GpuLauncherError | None) -> None:
        """Take note that the run of a node is over. If it was not asked for that, its jobs go to others."""
        was_leaving = member.leaving
        member.error = error
        member.become(MemberPhase.ENDED, "its run is over" if error is None else str(error))
        if error is not None:
            self._drop(member, f"cannot run jobs: {error}")
            return
        if was_leaving and member.remote is not None:
            member.remote.ask_to_end()
            member.plan_restart()
        self._jobs.lost(member)

    def look(self) -> None:
        """Notice nodes that are lost, and start those again whose time has come."""
        for member in self._members.values():
            member.node.tick()
            if member.lost:
                self._jobs.leaves(member)
                if self._connections.forget(member):
                    self._note_silence(member)
        for member in self._members.values():  # only now: a new connection may get a descriptor that was closed
            if member.gone and not member.over:
                self._lose(member)
            if member.phase is MemberPhase.WAITING and time.monotonic() >= member.start_at:
                self._restart(member)

    def _note_silence(self, member: Member) -> None:
        """If the connection to a node is lost, say how long its jobs may still run there."""
        jobs = self._jobs.running_at(member)
        if member.remote is not None and member.silent and jobs and not self._jobs.stopping:
            may = f"its {count(len(jobs), 'job')} may still run there for {member.remote.seconds_left:.0f} s"
            then = "will be lost then" if self._jobs.has_spoken(jobs[0]) else "can run elsewhere then"
            self._post(Notice(time.monotonic(), f"node {member.name} lost its connection: {may}, and {then}"))

    def _lose(self, member: Member) -> None:
        """Deal the jobs of a node again of which nothing is left, and connect to its machine once more.

        A node that has never run jobs would most probably fail in the same way again.
        """
        member.become(MemberPhase.ENDED, member.problem)
        member.plan_restart()
        self._drop(member, member.problem)

    def _drop(self, member: Member, why: str) -> None:
        jobs = [job for job in self._jobs.dealer.jobs_at(member.name) if not self._jobs.has_spoken(job.number)]
        again = ""
        if jobs and not self._jobs.stopping:
            others = [other for other in self._members.values() if other is not member]
            if any(not other.over or other.will_return for other in others):
                again = f"; its {count(len(jobs), 'job')} can run elsewhere"
            elif member.phase is MemberPhase.WAITING:
                again = f"; its {count(len(jobs), 'job')} can run when it is back"
        text = f"node {member.name} {why}{again}"
        _log.warning("%s", text)
        self._note_change(text)
        self._jobs.lost(member)

    def _restart(self, member: Member) -> None:
        """Start a node again whose time has come, if it is needed and nothing of it is left."""
        if self._jobs.closed or self._jobs.stopping or self._jobs.exhausted_told:
            member.become(MemberPhase.ENDED, "no more jobs are started")
        elif not member.gone:  # it was asked to end, and ends
            member.start_at = time.monotonic() + RETRY_SECONDS
        else:
            _log.info("%s is started again", member.name)
            try:
                self._connections.restart(member)
            except OSError as error:
                member.become(MemberPhase.ENDED, str(error))
                self._drop(member, f"cannot be started again: {error}")
                return
            self.begin(member)

    def _note_change(self, text: str) -> None:
        self._post(NodesChanged(time.monotonic(), devices_of(self._members.values()), text))
