"""The grant policy: which tickets are granted now, and on which devices. Pure functions of a snapshot of the pool.

Theory of operation. Every waiting process applies the policy to the same snapshot and acts only on the results for its
own tickets. So the policy is deterministic: equal snapshots give equal grants, in any order of leases and tickets.

The rules:

- The shares of a device never exceed the device, nor their declared memory the device's memory. A whole share takes
  everything.
- A ticket gets all of its devices at once, or none.
- Tickets are served by priority, and in order of arrival within a priority. A ticket that must wait *reserves* all of
  its candidates. A later ticket passes it only onto devices that the earlier one cannot use, or with a time limit that
  ends before the earlier one could start (backfill). So passing never delays, unless jobs end or give up earlier than
  declared.
- The earliest start of a ticket is computed from the declared ends of leases. A lease that declared no end, is overdue,
  or was declared in another boot may end at any moment, so it does not postpone the start.
- A ticket that would have to wait even if all leases ended, because devices are unavailable (used outside the pool, or
  broken), keeps its place and reserves nothing until that changes.

Granted tickets may act in any order and at any time without changing the decisions for others, except for the choice
among free devices. Best fit depends on earlier grants, and a claimant's `DevicePreference` is measured at the last
moment and known only to that claimant. So among tickets that could all be granted at one moment, a later one may once
take a device that an earlier one needs; the earlier one then reserves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_launcher.model import MILLIONTHS, Request, Share

MAX_SETS = 2000
"""Maximum number of sets that are compared to find the best connected one. If there are more, sets are grown."""
MAX_SEEDS = 32
"""Maximum number of devices from which sets are grown."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that a ticket may get."""

    uuid: str
    memory: int | None = None
    """The device's memory in bytes; None if unknown."""
    exclusive: bool = False
    """Whether the device takes only whole shares."""

    def share(self, request: Request) -> Share | None:
        """The share that the request would take of the device; None if the device could never provide it."""
        if self.memory is not None and request.share.memory > self.memory:
            return None
        share = request.share.of(self.memory)
        return None if self.exclusive and not share.whole else share


@dataclass(frozen=True, slots=True)
class Demand:
    """The request of a ticket, and the devices that may satisfy it."""

    request: Request
    candidates: tuple[Candidate, ...]
    """The devices that it may get, best first."""
    unavailable: frozenset[str] = frozenset()
    """UUIDs of the candidates that, as its process sees, are in use outside the pool or broken."""
    able: Mapping[str, tuple[Share, int | None]] = field(init=False, repr=False, compare=False)
    """The share to take of each candidate that could ever satisfy it, and the device's memory, by UUID; best first."""

    def __post_init__(self) -> None:
        shares = {one.uuid: (one.share(self.request), one.memory) for one in self.candidates}
        able = {uuid: (share, memory) for uuid, (share, memory) in shares.items() if share is not None}
        object.__setattr__(self, "able", able)


@dataclass(frozen=True, slots=True)
class LeaseState:
    """A live lease. If it cannot be read, `shares` is None and it counts as holding every device."""

    id: str
    shares: Mapping[str, Share] | None
    """The shares, by device UUID."""
    started: float | None = None
    """Time of the grant; None if it cannot be compared with now."""
    ends: float | None = None
    """Time when its devices are free at the latest; None if unknown."""


@dataclass(frozen=True, slots=True)
class TicketState:
    """A live ticket. If it cannot be read, `demand` is None, and the ticket may be for anything."""

    sequence: int
    """Place in the queue: lower is earlier. The id breaks ties."""
    id: str
    demand: Demand | None
    priority: int = 0

    @property
    def place(self) -> tuple[int, int, str]:
        """The sort key that gives queue order."""
        return -self.priority, self.sequence, self.id


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The live leases and tickets of a pool at one moment, in any order."""

    leases: tuple[LeaseState, ...]
    tickets: tuple[TicketState, ...]
    now: float = 0.0
    """The current time, on the clock of the leases' times."""


@dataclass(frozen=True, slots=True)
class DevicePreference:
    """A claimant's preference among the devices that are free for it."""

    ranking: tuple[str, ...] = ()
    """UUIDs, best first. Other devices come after them, in the order of the candidates."""
    closeness: Callable[[str, str], int] | None = None
    """How well two devices are connected: higher is better. None if all are equal."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The reasons why a ticket is not granted now."""

    missing: int
    """Number of devices that it needs beyond those that are free for it."""
    leases: tuple[str, ...] = ()
    """Ids of the leases on its candidates."""
    behind: tuple[str, ...] = ()
    """Ids of the earlier tickets that get or reserve its candidates: the first one for each candidate."""
    unavailable: tuple[str, ...] = ()
    """UUIDs of its candidates that are in use outside the pool, or broken."""
    staggered: tuple[str, ...] = ()
    """UUIDs of its candidates on which another job has just started."""
    unreadable: bool = False
    """Whether nothing may be granted because a lease, this ticket or an earlier ticket cannot be read."""


NO_PREFERENCE = DevicePreference()

Grant = Mapping[str, Share]
"""The shares of a new lease by device UUID, in the order in which the job sees the devices."""


def decide(snapshot: Snapshot) -> dict[str, Grant]:
    """Return all grants that are possible now, by ticket id and in queue order."""
    grants: dict[str, Grant] = {}
    allocator = _Allocator.opened(snapshot.leases, snapshot.now)
    if allocator is None:
        return grants
    for ticket in sorted(snapshot.tickets, key=lambda ticket: ticket.place):
        if ticket.demand is None:
            break
        found = allocator.grant_or_reserve(ticket.demand)
        if found is not None:
            grants[ticket.id] = found
    return grants


def waits(snapshot: Snapshot) -> dict[str, Wait]:
    """Return the reasons why tickets are not granted, by ticket id and in queue order. Granted tickets are omitted."""
    reasons: dict[str, Wait] = {}
    allocator = _Allocator.opened(snapshot.leases, snapshot.now)
    holders: dict[str, list[str]] = {}
    for lease in sorted(snapshot.leases, key=lambda lease: lease.id):
        for uuid in lease.shares or ():
            holders.setdefault(uuid, []).append(lease.id)
    first: dict[str, str] = {}
    readable = True
    for ticket in sorted(snapshot.tickets, key=lambda ticket: ticket.place):
        demand = ticket.demand
        readable = readable and demand is not None
        if allocator is None or demand is None or not readable:
            reasons[ticket.id] = Wait(missing=demand.request.gpus if demand else 0, unreadable=True)
            continue
        stagger, free = demand.request.stagger, len(allocator.free(demand))
        found = allocator.grant_or_reserve(demand)
        uuids = [candidate.uuid for candidate in demand.candidates]
        if found is None:
            leases = dict.fromkeys(id for uuid in uuids for id in holders.get(uuid, ()))
            reasons[ticket.id] = Wait(
                missing=demand.request.gpus - free,
                leases=tuple(leases),
                behind=tuple(dict.fromkeys(first[uuid] for uuid in uuids if uuid in first)),
                unavailable=tuple(uuid for uuid in uuids if uuid in demand.unavailable),
                staggered=tuple(one for one in uuids if allocator.staggered(one, demand.request)) if stagger else (),
            )
        if found is not None or allocator.possible(demand):
            for uuid in uuids if found is None else found:
                first.setdefault(uuid, ticket.id)
    return reasons


def grant(
    leases: Iterable[LeaseState],
    queue: Iterable[TicketState],
    own: TicketState,
    now: float,
    preference: DevicePreference = NO_PREFERENCE,
) -> Grant | None:
    """Return the grant for the ticket `own`; None if it must wait.

    `queue` yields the tickets in queue order, including `own`. It is read only as far as the answer depends on it.
    """
    assert own.demand is not None, "its owner knows what it is for"
    allocator = _Allocator.opened(leases, now)
    if allocator is None or not allocator.enough(own.demand):
        return None
    for ticket in queue:
        if ticket.id == own.id:
            return allocator.grant_or_reserve(own.demand, preference)
        if ticket.demand is None:
            return None
        before = allocator.changes
        allocator.grant_or_reserve(ticket.demand)
        if allocator.changes > before and not allocator.enough(own.demand):
            return None
    raise LookupError(f"ticket {own.id} is not in the queue")


@dataclass(slots=True)
class _Allocator:
    """Grants and reserves devices for tickets in queue order, and records what is taken and reserved."""

    now: float
    used: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The millionths and bytes in use, by device."""
    started: dict[str, float] = field(default_factory=dict)
    """The latest known start of a lease that is still on a device, by device."""
    ends: dict[str, list[tuple[float, Share]]] = field(default_factory=dict)
    """The shares that may be held until a declared time, with that time, by device."""
    reserved: dict[str, float] = field(default_factory=dict)
    """The earliest time at which a waiting ticket could start, by device."""
    closed: set[str] = field(default_factory=set)
    """The devices of which no later ticket gets anything now."""
    promised: set[str] = field(default_factory=set)
    """The closed devices that a waiting ticket may get at any moment. No reservation on them can be earlier."""
    changes: int = 0
    """Number of times that a device was closed or reserved for an earlier time."""
    rooms: dict[tuple[str, Share, int | None], float] = field(default_factory=dict)
    """Cached results of `_room_at`."""

    @classmethod
    def opened(cls, leases: Iterable[LeaseState], now: float) -> _Allocator | None:
        """Create an allocator that knows the leases; return None while a lease cannot be read."""
        allocator = cls(now)
        for lease in leases:
            if lease.shares is None:
                return None
            for uuid, share in lease.shares.items():
                allocator._take(uuid, share, lease.started)
                if lease.ends is not None and lease.ends > now:
                    allocator.ends.setdefault(uuid, []).append((lease.ends, share))
        return allocator

    def grant_or_reserve(self, demand: Demand, preference: DevicePreference = NO_PREFERENCE) -> Grant | None:
        """Return a grant for the demand; None if it must wait, after reserving its candidates."""
        if demand.able.keys() <= self.promised:
            return None
        free = self.free(demand)
        if len(free) >= demand.request.gpus:
            chosen = self._choose(free, demand.request, preference)
            for uuid, share in chosen.items():
                self._take(uuid, share, self.now)
            return chosen
        if self.possible(demand):
            self._reserve(demand)
        return None

    def free(self, demand: Demand) -> dict[str, Share]:
        """Return the candidates that have room for the demand, in its order."""
        request = demand.request
        found: dict[str, Share] = {}
        for uuid, (share, memory) in demand.able.items():
            if uuid in self.closed or uuid in demand.unavailable:
                continue
            if uuid in self.reserved and not self._over_before(self.reserved[uuid], request):
                continue
            if uuid in self.used and not _fits(share, self.used[uuid], memory):
                continue
            if not request.stagger or not self.staggered(uuid, request):
                found[uuid] = share
        return found

    def enough(self, demand: Demand) -> bool:
        """Whether enough devices are left that the demand may still be granted now."""
        left = demand.able.keys() - self.closed
        if demand.request.gpus <= len(left) and not self.reserved.keys().isdisjoint(left):
            left = {
                uuid
                for uuid in left
                if uuid not in self.reserved or self._over_before(self.reserved[uuid], demand.request)
            }
        return len(left) >= demand.request.gpus

    def possible(self, demand: Demand) -> bool:
        """Whether the demand would be granted if all leases ended."""
        return len(demand.able.keys() - demand.unavailable) >= demand.request.gpus

    def staggered(self, uuid: str, request: Request) -> bool:
        """Whether the request avoids the device because a job has just started there."""
        return bool(request.stagger) and 0 <= self.now - self.started.get(uuid, -math.inf) < request.stagger

    def _over_before(self, time: float, request: Request) -> bool:
        return request.timeout is not None and self.now + request.timeout <= time

    def _take(self, uuid: str, share: Share, started: float | None) -> None:
        millionths, memory = self.used.get(uuid, (0, 0))
        self.used[uuid] = millionths + share.millionths, memory + share.memory
        if started is not None:
            self.started[uuid] = max(started, self.started.get(uuid, -math.inf))
        if self.used[uuid][0] >= MILLIONTHS:
            self.closed.add(uuid)
            self.changes += 1

    def _reserve(self, demand: Demand) -> None:
        bounds = {self.reserved.get(uuid, math.inf) for uuid in demand.able}
        if len(bounds) == 1 and not self._over_before(bound := bounds.pop(), demand.request) and bound < math.inf:
            return  # it cannot start before the tickets ahead of it, so no reservation becomes earlier
        start = self._earliest_start(demand)
        for uuid in demand.able:
            if start < self.reserved.get(uuid, math.inf):
                self.reserved[uuid] = start
                self.changes += 1
                if start <= self.now:
                    self.closed.add(uuid)
                    self.promised.add(uuid)

    def _earliest_start(self, demand: Demand) -> float:
        """The time when the demand could start if leases without a declared end ended now, and all others as declared.

        On a device where it cannot pass the tickets ahead of it, it does not start before the first of them could.
        """
        times = []
        for uuid, (share, memory) in demand.able.items():
            time, reserved = self._room_at(uuid, share, memory), self.reserved.get(uuid, self.now)
            times.append(time if self._over_before(reserved, demand.request) else max(time, reserved))
        return sorted(times)[demand.request.gpus - 1]

    def _room_at(self, uuid: str, share: Share, memory: int | None) -> float:
        if uuid not in self.ends:
            return self.now
        key = uuid, share, memory
        if key not in self.rooms:
            left = sorted(self.ends[uuid], key=lambda one: one[0], reverse=True)
            millionths, declared = sum(one.millionths for _, one in left), sum(one.memory for _, one in left)
            time = self.now
            while not _fits(share, (millionths, declared), memory):
                time, over = left.pop()
                millionths, declared = millionths - over.millionths, declared - over.memory
            self.rooms[key] = time
        return self.rooms[key]

    def _choose(self, free: Mapping[str, Share], request: Request, preference: DevicePreference) -> dict[str, Share]:
        liked = list(free)
        if preference.ranking:
            rank = {uuid: place for place, uuid in enumerate(preference.ranking)}
            liked.sort(key=lambda uuid: rank.get(uuid, len(rank)))
        if any(share.millionths < MILLIONTHS for share in free.values()):
            # Best fit: prefer the fullest devices, so that whole devices stay free. The sort is stable.
            filled = {uuid: share.millionths for uuid, share in free.items()}
            for uuid in filled.keys() & self.used.keys():
                filled[uuid] += self.used[uuid][0]
            liked.sort(key=filled.__getitem__, reverse=True)
        elif preference.closeness is not None and 1 < request.gpus < len(liked):
            liked = _best_connected(liked, request.gpus, preference.closeness)
        return {uuid: free[uuid] for uuid in liked[: request.gpus]}


def _fits(share: Share, used: tuple[int, int], memory: int | None) -> bool:
    return used[0] + share.millionths <= MILLIONTHS and (memory is None or used[1] + share.memory <= memory)


def _best_connected(liked: Sequence[str], count: int, closeness: Callable[[str, str], int]) -> list[str]:
    """Return the set whose worst connection is best. Ties go to the best sum, then to the most preferred devices.

    The worst connection counts because it limits the speed of collective operations.
    """
    near = {(one, two): closeness(one, two) for one, two in itertools.permutations(liked, 2)}

    def worth(chosen: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
        links = [near[liked[one], liked[two]] for one, two in itertools.combinations(chosen, 2)]
        return min(links), sum(links), tuple(-place for place in chosen)

    places = range(len(liked))
    sets: Iterable[tuple[int, ...]]
    if math.comb(len(liked), count) <= MAX_SETS:
        sets = itertools.combinations(places, count)
    else:
        sets = (_grown(liked, seed, count, near) for seed in places[:MAX_SEEDS])
    return [liked[place] for place in max(sets, key=worth)]


def _grown(liked: Sequence[str], seed: int, count: int, near: Mapping[tuple[str, str], int]) -> tuple[int, ...]:
    chosen, others = [seed], [place for place in range(len(liked)) if place != seed]
    worst = {place: near[liked[place], liked[seed]] for place in others}
    total = dict(worst)
    while len(chosen) < count:
        best = max(others, key=lambda place: (worst[place], total[place], -place))
        chosen.append(best)
        others.remove(best)
        for place in others:
            link = near[liked[place], liked[best]]
            worst[place], total[place] = min(worst[place], link), total[place] + link
    return tuple(sorted(chosen))
