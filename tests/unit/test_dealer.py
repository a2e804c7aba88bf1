"""The dealer under random histories: no job is at two nodes, lost, or asked for without room."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import pytest

from gpu_launcher.jobs.job import Job
from gpu_launcher.nodes.dealer import MAX_MOVES, Ask, Deal, Dealer, Give, MovedTooOften, TakeBack, quotas

HISTORIES = int(os.environ.get("GPU_LAUNCHER_HISTORIES", "500"))
MAX_LINES = 200
MAX_NODES = 5
MAX_TURNS = 1000
"""Maximum number of turns in which nodes that stay must finish everything."""
pytestmark = pytest.mark.timeout(120 + HISTORIES // 10)


class Told(NamedTuple):
    """A message on its way, from the head to a node or back."""

    what: str
    number: int


class Node:
    """A node, the messages on their way to and from it, and what the head knows about it."""

    def __init__(self, at_once: int, refused: int) -> None:
        self.at_once = at_once
        """How many jobs it can run at the same time."""
        self.refused = refused
        """How many of ten jobs have requests that it can never grant."""
        self.inbox: deque[Told] = deque()
        self.outbox: deque[Told] = deque()
        self.jobs: list[int] = []
        """Jobs that it has and has not started."""
        self.running: list[int] = []
        self.interrupted = False
        """Whether its engine has asked it to end."""
        self.connected = True
        self.room = 0
        """How many more jobs it has asked for, as the head knows."""
        self.known = False
        """Whether the head knows that it asks for jobs."""
        self.leaving = False
        """Whether the head gives it no more jobs."""

    @property
    def placed(self) -> list[int]:
        """The jobs that run here, may run here, or will when their offers arrive."""
        return [*self.running, *self.jobs, *(number for what, number in self.inbox if what == "offer")]


class History:
    """A head and its nodes, in which anything may happen next, and messages take any time. Each step is checked.

    A node's messages arrive in their order, those of several nodes in any order. A connection that is lost loses the
    messages that are under way, and the node may go on for a while. The head counts it as lost when it has ended.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.most = random.choice([None, None, 1, 2, 5])
        self.dealer = Dealer(self.most)
        self.nodes: dict[str, Node] = {}
        self.names = 0
        self.total = random.choice([1, 5, 20, 60])
        """Number of jobs after which the head has no more."""
        self.refused = random.choice([0, 0, 3, 10])
        """How many of ten jobs some nodes can never run."""
        self.offered: dict[int, Job] = {}
        self.asked = 0
        """How many jobs the head was asked for and has not offered."""
        self.exhausted = False
        self.waiting: list[int] = []
        """Jobs that are at no node, in the order in which they are to be dealt."""
        self.at: dict[int, str] = {}
        """The node of each job that is at one, as the head knows."""
        self.started: set[int] = set()
        """Jobs that were started at the nodes where they are, as the head knows."""
        self.cancelled: set[int] = set()
        self.losses: Counter[int] = Counter()
        """How many nodes have lost each job after they had started it."""
        self.lost_at: dict[int, set[str]] = {}
        """The names of these nodes."""
        self.refused_by: dict[int, set[str]] = {}
        self.taking: dict[int, str] = {}
        """Jobs that are taken back, and whose nodes have not answered, with the nodes that are to get them."""
        self.moved: set[int] = set()
        """Jobs at the nodes for which they were taken back."""
        self.endings: list[int] = []
        self.story: list[str] = []
        self.seen: Counter[str] = Counter()
        # Nodes are lost all the time in some histories, and hardly ever in others.
        rates = {"join": (2, 10), "want": (3, 10), "offer": (3, 10), "end": (0.2, 5), "start": (0, 5, 10)}
        rates |= {"cut": (0.3, 3, 10), "lose": (1, 10, 20), "interrupt": (0, 0.5, 3), "give_back": (1, 10)}
        rates |= {"withdraw": (0, 0.2, 2), "exhaust": (0, 0.05), "refuse": (0, 10), "late": (0, 1, 5)}
        rates |= {"arrive": (2, 10, 30), "hear": (2, 10, 30)}
        self.weights = {step: random.choice(choices) for step, choices in rates.items()}
        if random.random() < 0.1:  # few jobs, and one node after the other is lost with them
            self.total = random.choice([1, 5])
            self.weights |= {"join": 10, "want": 5, "start": 20, "cut": 3, "lose": 20, "arrive": 30, "hear": 30}
            self.weights |= {"end": 0, "interrupt": 0, "withdraw": 0, "exhaust": 0, "refuse": 0}

    @property
    def open(self) -> int:
        room = sum(node.room for node in self.nodes.values() if not node.leaving)
        return room if self.most is None else min(room, self.most - len(self.at))

    # What happens

    def run(self) -> None:
        names, weights = list(self.weights), list(self.weights.values())
        length = self.random.randint(1, MAX_LINES)
        for step in self.random.choices(names, weights, k=10 * length):  # many are not possible when they are chosen
            self.step(step)
            if len(self.story) >= length:
                break
        self.finish()

    def step(self, name: str, *arguments: object) -> None:
        before = len(self.story)
        getattr(self, name)(*arguments)
        if len(self.story) > before:
            self.check()

    def finish(self) -> None:
        """Let a node that stays finish everything. Others do nothing any more, but answer.

        A job that was taken back for another node waits there until it is started.
        """
        stays = self.add_node(new=True)
        self.nodes[stays].at_once, self.nodes[stays].refused = 100, 0
        for _ in range(MAX_TURNS):
            if self.exhausted and self.dealer.idle:
                break
            while self.asked:
                self.step("offer")
            for name, node in list(self.nodes.items()):
                while node.outbox:
                    self.step("hear", name)
                if not node.connected:
                    self.step("lose", name)
                    continue
                while node.inbox:
                    self.step("arrive", name)
                for number in [*node.running, *node.jobs]:
                    if number in node.jobs and (name == stays or node.interrupted or number in self.moved):
                        self.step("start", name, number)
                    if number in node.running:
                        self.step("end", name, number)
            self.step("late", True)
            if self.nodes[stays].room < len(self.waiting) + 1:
                self.step("want", stays)
        assert self.exhausted
        assert self.dealer.idle, "nobody starves"
        assert self.waiting == []
        assert sorted(self.endings) == sorted(self.offered), "each job has exactly one end"

    def join(self) -> None:
        if len(self.nodes) < MAX_NODES:
            self.add_node()

    def add_node(self, *, new: bool = False) -> str:
        """A new node joins, or one that was lost comes back."""
        gone = [name for number in range(self.names) if (name := f"node-{number + 1}") not in self.nodes]
        if gone and not new and self.random.random() < 0.5:
            name = self.random.choice(gone)
        else:
            self.names += 1
            name = f"node-{self.names}"
        self.nodes[name] = Node(self.random.choice([1, 1, 2, 4]), self.random.choice([0, self.refused]))
        return name

    def want(self, name: str | None = None) -> None:
        """A node has room for more jobs."""
        name = name or self.any_node(lambda node: node.connected and not node.interrupted)
        if name is not None:
            self.says(name, "wants", self.random.choice([1, 1, 2, 8]))

    def offer(self) -> None:
        """The head offers a job that it was asked for, or has no more."""
        if self.asked and len(self.offered) == self.total:
            self.exhaust()
        elif self.asked:
            job = Job(len(self.offered), f"job {len(self.offered)}", None)
            self.asked -= 1
            self.offered[job.number] = job
            self.waiting.append(job.number)
            self.tell(f"{job.label} is offered")
            self.carry_out(self.dealer.offered(job))

    def exhaust(self) -> None:
        self.exhausted, self.asked = True, 0
        self.tell("the head is exhausted")
        self.dealer.exhaust()

    def start(self, name: str | None = None, number: int | None = None) -> None:
        """A node starts a job. It may be cut off, and not know it yet."""
        if name is None or number is None:
            name, number = self.any_job(lambda node: node.jobs)
        if name is not None and number is not None:
            self.nodes[name].jobs.remove(number)
            self.nodes[name].running.append(number)
            self.says(name, "starts", number)

    def end(self, name: str | None = None, number: int | None = None) -> None:
        """A job ends."""
        if name is None or number is None:
            name, number = self.any_job(lambda node: node.running)
        if name is not None and number is not None:
            self.leave_node(name, number)
            self.says(name, "ends", number)

    def refuse(self) -> None:
        """A node cannot grant the request of a job."""
        name, number = self.any_job(lambda node: [job for job in node.jobs if job % 10 < node.refused])
        if name is not None and number is not None:
            self.leave_node(name, number)
            self.says(name, "refuses", number)

    def give_back(self) -> None:
        """A node that was asked to end gives a job back that it has interrupted."""
        name, number = self.any_job(lambda node: [*node.running, *node.jobs] if node.interrupted else [])
        if name is not None and number is not None:
            self.leave_node(name, number)
            self.says(name, "returns", number)

    def interrupt(self) -> None:
        """An engine asks a node to end."""
        name = self.any_node(lambda node: node.connected and not node.interrupted)
        if name is not None:
            self.nodes[name].interrupted = True
            self.says(name, "leaves", 0)

    def cut(self) -> None:
        """A node dies or its connection is lost, with messages that are under way."""
        name = self.any_node(lambda node: node.connected)
        if name is not None:
            node = self.nodes[name]
            node.connected = False
            node.inbox.clear()
            for _ in range(self.random.randint(0, len(node.outbox))):
                node.outbox.pop()
            self.tell(f"{name} is cut off, {len(node.outbox)} messages arrive")

    def lose(self, name: str | None = None) -> None:
        """The head learns that no process of a node is left."""
        name = name or self.any_node(lambda node: not node.connected and not node.outbox)
        if name is None:
            return
        self.tell(f"{name} is lost")
        self.nodes[name].leaving = True
        self.carry_out(self.dealer.leaves(name))
        del self.nodes[name]
        lost = [number for number, where in self.at.items() if where == name]
        for number in lost:
            if number in self.cancelled:
                self.conclude(number)
        lost = [number for number in lost if number in self.at]
        for number in lost:
            self.lose_job(name, number)
        deals = self.dealer.lost(name)
        failed = {deal.job.number for deal in deals if isinstance(deal, MovedTooOften)}
        assert failed == {number for number in lost if self.losses[number] > MAX_MOVES}
        self.carry_out(deals)

    def late(self, everything: bool = False) -> None:
        """Time passes, so that jobs that were not started have waited long."""
        late = [number for number in [*self.waiting, *self.at] if number not in {*self.started, *self.taking}]
        if not everything:
            late = self.random.sample(late, self.random.randint(0, len(late)))
        if not late:
            return
        self.tell(f"{late} are late")
        at_once = {name: node.at_once for name, node in self.nodes.items()}
        idle = {
            name: node
            for name, node in self.nodes.items()
            if node.known and not node.leaving and node.room > 0 and len(self.dealer.jobs_at(name)) < node.at_once
        }
        stuck = [
            number
            for number in late
            if number in self.at
            and number not in self.moved
            and any(name != self.at[number] and name not in self.refused_by.get(number, ()) for name in idle)
        ]
        nothing_moves = not self.waiting and not self.taking
        deals = self.dealer.deal_late(late, at_once)
        if stuck and nothing_moves:
            assert deals, f"none of {stuck} is taken back although {list(idle)} are idle"
        for deal in deals:
            match deal:
                case Give(name, job):
                    self.tell(f"  {deal}")
                    assert job.number in late
                    self.give(name, job.number)
                case TakeBack(name, job, target):
                    self.tell(f"  {deal}")
                    self.seen["TakeBack"] += 1
                    assert self.at[job.number] == name != target
                    assert job.number in late
                    assert job.number not in self.moved, "a job that was taken back waits where it is then"
                    assert target not in self.refused_by.get(job.number, ())
                    self.taking[job.number] = target
                    coming = sum(other == target for other in self.taking.values())
                    assert coming <= self.nodes[target].room
                    assert coming + len(self.dealer.jobs_at(target)) <= self.nodes[target].at_once
                    self.nodes[name].inbox.append(Told("take back", job.number))
                case _:
                    raise AssertionError(f"{deal} is not about time")

    def withdraw(self) -> None:
        """The head cancels a job. If it waits, that is its end."""
        alive = [number for number in [*self.waiting, *self.at] if number not in self.cancelled]
        if alive:
            number = self.random.choice(alive)
            waits = number in self.waiting
            self.tell(f"job {number} is cancelled")
            assert self.dealer.cancelled(number) == (self.offered[number] if waits else None)
            self.cancelled.add(number)
            if waits:
                self.conclude(number)
                self.seen["cancelled"] += 1
            elif self.nodes[self.at[number]].connected:
                self.nodes[self.at[number]].inbox.append(Told("cancel", number))

    def arrive(self, name: str | None = None) -> None:
        """A message of the head arrives at its node."""
        name = name or self.any_node(lambda node: bool(node.inbox))
        if name is None:
            return
        node = self.nodes[name]
        what, number = node.inbox.popleft()
        self.tell(f"{name} receives: {what} {number}")
        if what == "offer":
            node.jobs.append(number)
        elif what == "cancel" and number in [*node.jobs, *node.running]:
            self.leave_node(name, number)
            self.says(name, "ends", number)
        elif what == "take back" and number in node.jobs:
            self.leave_node(name, number)
            self.says(name, "gives", number)

    def hear(self, name: str | None = None) -> None:
        """A message of a node arrives at the head."""
        name = name or self.any_node(lambda node: bool(node.outbox))
        if name is None:
            return
        node = self.nodes[name]
        what, number = node.outbox.popleft()
        self.tell(f"the head hears that {name} {what} {number}")
        if what == "wants":
            if not node.leaving:
                node.room += number
                node.known = True
                self.carry_out(self.dealer.wanted(name, number))
            return
        if what == "leaves":
            node.leaving = True
            self.carry_out(self.dealer.leaves(name))
            return
        assert self.at[number] == self.dealer.node_of(number) == name, "it says nothing about jobs of others"
        if what == "starts":
            self.taking.pop(number, None)
            self.started.add(number)
            self.dealer.started(number)
            return
        target = self.taking.pop(number, None)
        if what == "ends" or number in self.cancelled:
            self.conclude(number)
        elif what == "returns" or node.leaving:
            self.lose_job(name, number)
            self.seen["returned"] += 1
            self.carry_out(self.dealer.returned(number))
        elif what == "gives":
            assert target is not None
            assert number not in self.started, "a job that runs is not taken back"
            del self.at[number]
            self.waiting.insert(0, number)
            self.seen["given back"] += 1
            deals = self.dealer.taken(number)
            if deals and deals[0] == Give(target, self.offered[number]):
                self.tell(f"  {deals.pop(0)}")
                self.give(target, number)
                self.moved.add(number)
            self.carry_out(deals)
        else:
            self.refused_by.setdefault(number, set()).add(name)
            self.moved.discard(number)
            del self.at[number]
            self.waiting.insert(0, number)
            self.seen["refused"] += 1
            self.carry_out(self.dealer.refused(number))
            everywhere = {name for name, node in self.nodes.items() if not node.leaving}
            for job in self.dealer.refused_by_all(everywhere):
                assert everywhere <= self.refused_by[job.number]
                self.waiting.remove(job.number)
                self.ends(job.number)
                self.seen["refused by all"] += 1

    # What follows

    def says(self, name: str, what: str, number: int) -> None:
        self.tell(f"{name} {what} {number}")
        if self.nodes[name].connected:
            self.nodes[name].outbox.append(Told(what, number))

    def leave_node(self, name: str, number: int) -> None:
        node = self.nodes[name]
        (node.jobs if number in node.jobs else node.running).remove(number)

    def lose_job(self, name: str, number: int) -> None:
        """A job comes back from its node without a result."""
        del self.at[number]
        self.taking.pop(number, None)
        self.moved.discard(number)
        if number in self.started:
            self.started.remove(number)
            self.losses[number] += 1
            self.lost_at.setdefault(number, set()).add(name)
        if self.losses[number] <= MAX_MOVES:
            self.waiting.append(number)

    def conclude(self, number: int) -> None:
        self.at.pop(number, None)
        if number in self.waiting:
            self.waiting.remove(number)
        self.ends(number)

    def ends(self, number: int) -> None:
        self.endings.append(number)
        self.started.discard(number)
        self.taking.pop(number, None)
        self.carry_out(self.dealer.ended(number))

    def give(self, name: str, number: int) -> None:
        """A job is offered to a node."""
        node = self.nodes[name]
        assert not node.leaving
        assert node.room > 0, "the node has not asked for a job"
        assert name not in self.refused_by.get(number, ()), "it can never run there"
        self.seen["Give"] += 1
        self.waiting.remove(number)
        node.room -= 1
        self.at[number] = name
        assert self.most is None or len(self.at) <= self.most
        if node.connected:
            node.inbox.append(Told("offer", number))

    def carry_out(self, deals: list[Deal]) -> None:
        for deal in deals:
            self.tell(f"  {deal}")
            match deal:
                case Ask(count):
                    self.seen["Ask"] += 1
                    assert count > 0
                    assert not self.exhausted, "the head has no more jobs"
                    assert not any(map(self.may_go_to, self.waiting)), "jobs that wait come first"
                    self.asked += count
                    assert self.asked <= self.open, "more is asked for than nodes have room for"
                case Give(name, job):
                    assert name in self.may_go_to(job.number), "a node that has not lost it comes first"
                    first = next(number for number in self.waiting if self.may_go_to(number))
                    assert first == job.number, "the job that has waited for longest comes first"
                    assert job is self.offered[job.number]
                    self.give(name, job.number)
                case MovedTooOften(job):
                    self.seen["MovedTooOften"] += 1
                    assert self.losses[job.number] == MAX_MOVES + 1
                    self.ends(job.number)
                case TakeBack():
                    raise AssertionError("only time takes jobs back")

    def check(self) -> None:
        placed = [number for node in self.nodes.values() for number in node.placed]
        assert len(placed) == len(set(placed)), "a job is at two nodes"
        assert not set(placed) & {*self.waiting, *self.endings}, "a job that is elsewhere or has ended is at a node"
        known = sorted([*self.at, *self.waiting, *self.endings])
        assert known == sorted(self.offered), "each job is at a node, waits or has ended"
        for number in self.offered:
            assert self.dealer.node_of(number) == self.at.get(number)
        assert [job.number for job in self.dealer.waiting] == self.waiting
        assert self.dealer.idle == (not self.at and not self.waiting)
        assert not any(map(self.may_go_to, self.waiting)), "a job waits although a node has room for it"
        if self.waiting and self.open > 0:
            self.seen["kept back"] += 1
        assert self.exhausted or self.asked >= self.open, "a node has room, but the head is not asked"

    def may_go_to(self, number: int) -> list[str]:
        """Return the nodes with room for a waiting job. Those that have lost it count only when no other lives."""
        if self.open <= 0:
            return []
        able = {
            name: node
            for name, node in self.nodes.items()
            if node.known and not node.leaving and name not in self.refused_by.get(number, ())
        }
        names = set(able) - self.lost_at.get(number, set()) or set(able)
        return [name for name in names if able[name].room > 0]

    # Choices

    def any_node(self, fits: Callable[[Node], bool]) -> str | None:
        names = [name for name, node in self.nodes.items() if fits(node)]
        return self.random.choice(names) if names else None

    def any_job(self, choose: Callable[[Node], list[int]]) -> tuple[str | None, int | None]:
        name = self.any_node(lambda node: bool(choose(node)))
        return (None, None) if name is None else (name, self.random.choice(choose(self.nodes[name])))

    def tell(self, line: str) -> None:
        self.story.append(line)


def test_dealer_keeps_its_rules_in_random_histories():
    seen: Counter[str] = Counter()
    for seed in range(HISTORIES):
        history = History(Random(seed))
        try:
            history.run()
        except Exception as error:
            story = "\n".join(history.story)
            raise AssertionError(f"History(Random({seed})), most {history.most}, fails: {error}\n{story}") from error
        seen.update(history.seen.keys())
    expected = ["Ask", "Give", "MovedTooOften", "TakeBack", "given back", "refused", "refused by all", "returned"]
    expected += ["cancelled", "kept back"]
    assert not [name for name in expected if seen[name] < HISTORIES // 200], f"hardly any history shows some of {seen}"


def job(number: int) -> Job:
    return Job(number, "", None)


def test_head_is_asked_for_what_all_nodes_want_together():
    dealer = Dealer()
    assert dealer.wanted("a", 2) == [Ask(2)]
    assert dealer.wanted("b", 3) == [Ask(3)]
    assert [deal.node for number in range(5) for deal in dealer.offered(job(number)) if isinstance(deal, Give)] == list(
        "babab"
    ), "the node with the most room comes first"


def test_cap_limits_what_is_asked_for():
    dealer = Dealer(most=2)
    assert dealer.wanted("a", 5) == [Ask(2)]
    assert dealer.offered(job(0)) == [Give("a", job(0))]
    assert dealer.offered(job(1)) == [Give("a", job(1))]
    assert dealer.ended(0) == [Ask(1)]


def test_jobs_of_a_lost_node_go_to_another_before_new_ones():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    assert dealer.lost("a") == []
    assert dealer.wanted("b", 3) == [Give("b", job(0)), Ask(2)]


def test_job_that_loses_six_nodes_fails():
    dealer = Dealer()
    dealer.wanted("node-0", 1)
    dealer.offered(job(0))
    for lost in range(MAX_MOVES):
        dealer.started(0)
        assert dealer.lost(f"node-{lost}") == []
        assert dealer.wanted(f"node-{lost + 1}", 1) == [Give(f"node-{lost + 1}", job(0))]
    dealer.started(0)
    assert dealer.lost(f"node-{MAX_MOVES}") == [MovedTooOften(job(0))]
    assert dealer.idle


def test_job_that_is_returned_six_times_fails():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    for _ in range(MAX_MOVES):
        dealer.started(0)
        assert dealer.returned(0) == []
        assert dealer.wanted("a", 1) == [Give("a", job(0))]
    dealer.started(0)
    assert dealer.returned(0) == [MovedTooOften(job(0))]


def test_job_that_is_never_started_does_not_fail_however_often_it_moves():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    for _ in range(5 * MAX_MOVES):
        assert dealer.lost("a") == []
        assert dealer.wanted("a", 1) == [Give("a", job(0))]


def test_moved_job_waits_for_a_node_that_has_not_lost_it():
    dealer = Dealer()
    dealer.wanted("flaky", 1)
    dealer.offered(job(0))
    dealer.wanted("busy", 1)
    dealer.offered(job(1))
    dealer.started(0)
    dealer.lost("flaky")
    assert dealer.wanted("flaky", 2) == [Ask(2)]
    assert dealer.offered(job(2)) == [Give("flaky", job(2))], "other jobs do not wait for it"
    assert dealer.wanted("busy", 1) == [Give("busy", job(0))]


def test_moved_job_goes_to_any_node_when_each_has_lost_it():
    dealer = Dealer()
    dealer.wanted("flaky", 1)
    dealer.offered(job(0))
    dealer.wanted("busy", 0)
    dealer.started(0)
    dealer.lost("flaky")
    dealer.wanted("flaky", 1)
    assert dealer.leaves("busy") == [Give("flaky", job(0))]


def test_nothing_is_asked_for_after_the_head_is_exhausted():
    dealer = Dealer()
    dealer.wanted("a", 2)
    dealer.offered(job(0))
    dealer.exhaust()
    assert dealer.wanted("a", 5) == []
    assert dealer.ended(0) == []
    assert dealer.idle


def busy_and_idle() -> Dealer:
    """A dealer without more jobs, whose jobs 0 and 1 are at node a, while node b has room."""
    dealer = Dealer()
    dealer.wanted("a", 2)
    for number in range(2):
        dealer.offered(job(number))
    dealer.wanted("b", 2)
    dealer.exhaust()
    return dealer


def test_late_job_is_taken_back_once_for_an_idle_node():
    dealer = busy_and_idle()
    assert dealer.deal_late([1], {"a": 1, "b": 1}) == [TakeBack("a", job(1), "b")]
    assert dealer.deal_late([1], {"a": 1, "b": 1}) == []
    dealer.wanted("a", 5)
    assert dealer.taken(1) == [Give("b", job(1))], "it does not go back to the node with most room"
    assert dealer.deal_late([1], {"a": 9, "b": 1}) == []


@pytest.mark.parametrize("at_once", [{"a": 1, "b": 1}, {"a": 1}])
def test_no_more_jobs_are_taken_back_than_idle_nodes_can_run(at_once: dict[str, int]):
    dealer = busy_and_idle()
    assert len(dealer.deal_late([0, 1], at_once)) == len(at_once) - 1


def test_job_is_taken_back_even_if_the_head_may_have_more():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    dealer.wanted("b", 1)
    assert dealer.deal_late([0], {"a": 1, "b": 1}) == [TakeBack("a", job(0), "b")]


def test_job_that_waits_long_goes_even_to_a_node_that_has_lost_it():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    dealer.started(0)
    dealer.wanted("b", 1)
    dealer.offered(job(1))
    dealer.lost("a")
    assert dealer.wanted("a", 1) == [Ask(1)], "it waits for node b"
    assert dealer.deal_late([], {"a": 1, "b": 1}) == []
    assert dealer.deal_late([0], {"a": 1, "b": 1}) == [Give("a", job(0))]


def test_no_job_is_taken_back_for_a_node_that_gets_no_more_jobs():
    dealer = busy_and_idle()
    dealer.leaves("b")
    assert dealer.deal_late([0], {"a": 1, "b": 1}) == []


def test_job_that_was_started_after_all_takes_no_room_elsewhere():
    dealer = busy_and_idle()
    assert dealer.deal_late([0], {"a": 1, "b": 1}) == [TakeBack("a", job(0), "b")]
    dealer.started(0)
    assert dealer.deal_late([1], {"a": 1, "b": 1}) == [TakeBack("a", job(1), "b")]


def test_job_that_is_given_back_when_its_target_is_gone_is_dealt_to_any_node():
    dealer = busy_and_idle()
    dealer.deal_late([1], {"a": 1, "b": 1})
    dealer.lost("b")
    assert dealer.taken(1) == []
    assert dealer.wanted("a", 1) == [Give("a", job(1))]


def test_late_job_goes_to_a_node_with_free_devices_even_if_a_busy_one_asks_for_more():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    dealer.wanted("busy", 1)
    dealer.offered(job(1))
    dealer.wanted("busy", 8)
    dealer.wanted("idle", 1)
    dealer.started(1)
    assert dealer.deal_late([0], {"a": 1, "busy": 1, "idle": 1}) == [TakeBack("a", job(0), "idle")]


def test_job_for_which_a_node_ends_too_soon_waits_for_another_or_until_it_was_lost():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    dealer.exhaust()
    assert dealer.refused(0, too_late=True) == []
    assert dealer.too_late_for("a") == [job(0)]
    assert dealer.wanted("a", 3) == []
    assert dealer.refused_by_all({"a"}) == [], "it can run there later"
    dealer.lost("a")
    assert dealer.wanted("a", 1) == [Give("a", job(0))]
    assert dealer.too_late_for("a") == []


def test_other_nodes_get_a_job_for_which_one_ends_too_soon():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    dealer.exhaust()
    dealer.refused(0, too_late=True)
    assert dealer.wanted("b", 1) == [Give("b", job(0))]


def test_node_that_is_not_there_could_get_any_number_of_jobs_until_the_head_holds_back():
    dealer = Dealer()
    dealer.wanted("a", 1)
    assert dealer.waiting_for("b", []) == 0, "the head was asked, and has not answered"
    dealer.offered(job(0))
    assert dealer.waiting_for("b", []) == math.inf
    dealer.exhaust()
    assert dealer.waiting_for("b", []) == 0
    assert dealer.waiting_for("b", [0]) == 1, "job 0 was not started for a long time"


def test_node_that_is_not_there_gets_no_job_beyond_the_cap():
    dealer = Dealer(most=3)
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    assert dealer.waiting_for("b", []) == 2
    dealer.wanted("a", 2)
    dealer.offered(job(1))
    dealer.offered(job(2))
    assert dealer.waiting_for("b", []) == 0
    assert dealer.waiting_for("b", [1]) == 1, "job 1 would move"


def test_node_that_refused_a_job_is_not_asked_for_because_of_it():
    dealer = Dealer()
    dealer.wanted("a", 1)
    dealer.offered(job(0))
    dealer.exhaust()
    dealer.refused(0)
    assert (dealer.waiting_for("a", []), dealer.waiting_for("b", [])) == (0, 1)


def test_job_that_was_taken_back_once_is_no_reason_to_ask_for_a_node():
    dealer = busy_and_idle()
    dealer.deal_late([1], {"a": 1, "b": 1})
    assert dealer.waiting_for("c", [0, 1]) == 1


@pytest.mark.parametrize(
    ("limit", "devices", "held", "shares"),
    [
        (None, [4, 2], [9, 9], [None, None]),
        (3, [4, 4], [0, 0], [3, 0]),
        (6, [4, 4], [0, 0], [4, 2]),
        (20, [4, 0, 4], [0, 0, 0], [4, 0, 4]),
        (1, [], [], []),
    ],
)
def test_limit_on_devices_is_dealt_in_the_order_of_the_nodes(
    limit: int | None, devices: list[int], held: list[int], shares: list[int | None]
) -> None:
    assert quotas(limit, devices, held) == shares


@pytest.mark.parametrize(
    ("limit", "devices", "held", "shares"),
    [
        (3, [2, 2], [2, 2], [1, 1]),
        (3, [2, 2], [2, 1], [2, 1]),
        (2, [2, 2], [1, 2], [0, 0]),
        (2, [2, 2], [0, 1], [1, 0]),
        (2, [1, 1, 2], [0, 0, 1], [1, 0, 0]),
        (3, [1, 1, 2], [0, 0, 1], [1, 1, 1]),
        (0, [2, 2], [2, 0], [0, 0]),
        (4, [2, 2], [9, 9], [0, 0]),
    ],
)
def test_no_node_gets_more_of_the_limit_than_the_others_leave(
    limit: int, devices: list[int], held: list[int], shares: list[int]
) -> None:
    assert quotas(limit, devices, held) == shares


def test_node_has_work_while_it_has_jobs_or_could_get_some():
    dealer = Dealer(most=2)
    assert dealer.has_work_for("a")
    dealer.wanted("a", 2)
    dealer.offered(job(0))
    dealer.offered(job(1))
    assert dealer.has_work_for("a")
    assert not dealer.has_work_for("b")
    dealer.ended(0)
    assert dealer.has_work_for("b")
    dealer.exhaust()
    assert not dealer.has_work_for("b")
    dealer.refused(1)
    assert not dealer.has_work_for("a")
    assert dealer.has_work_for("b")


def test_node_is_not_asked_for_while_those_that_are_there_may_use_no_more_devices():
    dealer = Dealer()
    dealer.wanted("a", 2)
    dealer.offered(job(0))
    dealer.offered(job(1))
    assert dealer.waiting_for("b", [1]) == math.inf
    assert dealer.waiting_for("b", [1], limited=True) == 0
    dealer.lost("a")
    assert dealer.waiting_for("b", [], limited=True) == 2
