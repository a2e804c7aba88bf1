"""Gives nodes of a group back and asks for them again, as `scaling` decides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from gpu_launcher.debug_log import get_logger
from gpu_launcher.jobs.events import NodesChanged, Notice
from gpu_launcher.jobs.node_messages import Message
from gpu_launcher.nodes.group_jobs import GroupJobs
from gpu_launcher.nodes.member import Member, MemberPhase, devices_of
from gpu_launcher.nodes.scaling import Acquire, Drain, NodeState, Presence, Renew, Rest, Scaler

_log = get_logger("nodes.group_scaling")

SCALE_SECONDS = 1.0
"""Seconds between two looks at which nodes are needed."""


class GroupScaling:
    """See the module."""

    def __init__(self, members: Mapping[str, Member], jobs: GroupJobs, post: Callable[[Message], None]) -> None:
        """Begin when the nodes do."""
        self._members = members
        self._jobs = jobs
        self._post = post
        self._scaler = Scaler()
        self._next = -math.inf
        """When to look again, in seconds of the monotonic clock."""

    def scale(self, limit: int | None) -> None:
        """Give nodes back that have nothing to do or end too soon, and ask for nodes again that jobs wait for.

        `limit` is how many devices may be used on all nodes. Do nothing if this was done just now.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + SCALE_SECONDS
        for step in self._scaler.decide(self._states(limit), now):
            member = self._members[step.name]
            _log.info("%s", step)
            match step:
                case Acquire():
                    member.wait_until(now, "jobs wait")
                    self._post(Notice(now, f"node {member.name} is asked for again, because jobs wait"))
                case Drain():
                    member.become(MemberPhase.DRAINING, "it ends too soon for jobs that wait")
                    text = "ends too soon for jobs that wait, and is replaced when it has no more"
                    self._post(Notice(now, f"node {member.name} {text}"))
                    self._jobs.leaves(member)
                case Renew():
                    self._give_back(member, "is replaced, because it ends too soon for jobs that wait")
                    if member.ran:  # even if all of its jobs failed, the next one may not be too late
                        member.failures = 0
                    member.plan_restart()
                case Rest():
                    self._give_back(member, "is given back, because no job needs it now")

    def _give_back(self, member: Member, why: str) -> None:
        """End an idle node, or withdraw the request for it."""
        assert member.remote is not None
        member.become(MemberPhase.RESTING, why)
        member.remote.ask_to_end()
        devices = devices_of(self._members.values())
        self._post(NodesChanged(time.monotonic(), devices, f"node {member.name} {why}"))
        self._jobs.given_back(member)

    def _states(self, limit: int | None) -> list[NodeState]:
        """Describe the nodes that run jobs, or could. One that cannot be reached is left alone."""
        late, dealer = self._jobs.late(), self._jobs.dealer
        jobs = dealer.counts()
        limited = limit is not None and len(devices_of(self._members.values())) >= limit
        states = []
        for member in self._members.values():
            if (presence := _presence(member)) is None:
                continue
            missing = presence is not Presence.OPEN
            state = NodeState(
                member.name,
                presence,
                elastic=member.remote is not None and member.remote.elastic and not member.leaving,
                jobs=jobs[member.name],
                at_once=member.at_once or 0,
                waiting=dealer.waiting_for(member.name, late, limited=limited) if missing else 0,
                too_late=0 if missing else len(dealer.too_late_for(member.name)),
                draining=member.phase is MemberPhase.DRAINING,
            )
            states.append(state)
        return states


def _presence(member: Member) -> Presence | None:
    """Return whether a node is there. None if it is not there, and does not come back."""
    match member.phase:
        case MemberPhase.RESTING:
            return Presence.RESTING
        case MemberPhase.WAITING:
            return Presence.STARTING
        case MemberPhase.LEAVING | MemberPhase.RETIRED:
            return Presence.STARTING if member.can_return else None
        case MemberPhase.STARTING:
            return None if member.unreachable else Presence.STARTING
        case MemberPhase.OPEN | MemberPhase.DRAINING:
            return None if member.unreachable else Presence.OPEN
        case MemberPhase.ENDED:
            return None
