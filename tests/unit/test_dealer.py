"""The dealer under random histories: no job is at two nodes, lost, or asked for without room."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from gpu_launcher.jobs.job import Job
from gpu_launcher.nodes.dealer import MAX_MOVES, Ask, Deal, Dealer, Give, MovedTooOften, TakeBack

HISTORIES = int(os.environ.get("GPU_LAUNCHER_HISTORIES", "2000"))
MAX_STEPS = 150
MAX_NODES = 5
pytestmark = pytest.mark.timeout(120 + HISTORIES // 10)


class Member:
    """A node: the room that it has asked for, and its jobs."""

    def __init__(self) -> None:
        self.room = 0
        self.jobs: dict[int, Job] = {}
        self.started: set[int] = set()
        self.known = False
        """Whether it has asked for jobs."""
        self.leaving = False


class History:
    """A head and its nodes, in which anything may happen next. Each step checks what the dealer decides."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.most = random.choice([None, None, 1, 2, 5])
        self.dealer = Dealer(self.most)
        self.nodes: dict[str, Member] = {}
        self.names = 0
        self.total = random.choice([1, 5, 20, 60])
        """Number of jobs after which the head has no more."""
        self.offered: dict[int, Job] = {}
        self.asked = 0
        """How many jobs the head was asked for and has not offered."""
        self.exhausted = False
        self.waiting: list[int] = []
        """Jobs that are at no node, in the order in which they came or came back."""
        self.losses: Counter[int] = Counter()
        """How many nodes have lost each job after they had started it."""
        self.lost_at: dict[int, set[str]] = {}
        """The names of these nodes."""
        self.eager = random.choice([True, False])
        """Whether nodes start their jobs at once."""
        self.endings: list[int] = []
        self.story: list[str] = []
        self.seen: Counter[str] = Counter()
        # Nodes are lost all the time in some histories, and hardly ever in others.
        rates = {"join": (5, 10), "want": (5, 10), "offer": (5, 20), "end": (0.2, 5), "lose": (1, 10), "start": (0, 5)}
        rates |= {"give_back": (0, 5), "leave": (0, 3), "withdraw": (0, 0.2, 2), "exhaust": (0, 0.05)}
        self.weights = {step: random.choice(choices) for step, choices in rates.items()}

    @property
    def at(self) -> int:
        return sum(len(node.jobs) for node in self.nodes.values())

    @property
    def open(self) -> int:
        room = sum(node.room for node in self.nodes.values() if not node.leaving)
        return room if self.most is None else min(room, self.most - self.at)

    # What happens

    def run(self) -> None:
        names, weights = list(self.weights), list(self.weights.values())
        for _ in range(self.random.randint(1, MAX_STEPS)):
            self.step(self.random.choices(names, weights)[0])
        self.finish()

    def step(self, name: str, *arguments: object) -> None:
        getattr(self, name)(*arguments)
        self.check()

    def finish(self) -> None:
        """Let a node that stays finish everything."""
        stays = self.add_node()
        self.step("want", stays)
        while self.asked or not self.dealer.idle:
            for name in self.nodes:  # a job may wait for any of them
                if not self.nodes[name].leaving:
                    self.step("want", name)
            self.step("offer")
            for name, node in self.nodes.items():
                for number in list(node.jobs):
                    self.step("end", name, number)
            self.step("want", stays)
        assert self.waiting == []
        assert sorted(self.endings) == sorted(self.offered), "each job has exactly one end"
        assert self.exhausted

    def join(self) -> None:
        if len(self.nodes) < MAX_NODES:
            self.add_node()

    def add_node(self) -> str:
        """A new node joins, or one that was lost comes back."""
        gone = [name for number in range(self.names) if (name := f"node-{number + 1}") not in self.nodes]
        if gone and self.random.random() < 0.5:
            name = self.random.choice(gone)
        else:
            self.names += 1
            name = f"node-{self.names}"
        self.nodes[name] = Member()
        return name

    def want(self, name: str | None = None) -> None:
        """A node has room for more jobs."""
        if name is None:
            name = self.any_node(lambda node: not node.leaving)
        if name is not None:
            count = self.random.choice([1, 1, 2, 8])
            self.nodes[name].room += count
            self.nodes[name].known = True
            self.tell(f"{name} wants {count}")
            self.carry_out(self.dealer.wanted(name, count))

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
        """A node starts a job."""
        name, number = (name, number) if name is not None else self.any_job()
        if name is not None and number is not None:
            self.nodes[name].started.add(number)
            self.tell(f"{name} starts job {number}")
            self.dealer.started(number)

    def lose_job(self, name: str, node: Member, number: int) -> None:
        if number in node.started:
            node.started.remove(number)
            self.losses[number] += 1
            self.lost_at.setdefault(number, set()).add(name)
        if self.losses[number] <= MAX_MOVES:
            self.waiting.append(number)

    def end(self, name: str | None = None, number: int | None = None) -> None:
        """A node reports a job's result."""
        name, number = (name, number) if name is not None else self.any_job()
        if name is not None and number is not None:
            assert self.dealer.node_of(number) == name
            del self.nodes[name].jobs[number]
            self.nodes[name].started.discard(number)
            self.endings.append(number)
            self.tell(f"job {number} ends at {name}")
            self.carry_out(self.dealer.ended(number))

    def give_back(self) -> None:
        """A node that leaves returns a job that it has interrupted."""
        name, number = self.any_job(lambda node: node.leaving)
        if name is not None and number is not None:
            del self.nodes[name].jobs[number]
            self.lose_job(name, self.nodes[name], number)
            self.tell(f"{name} returns job {number}")
            self.seen["returned"] += 1
            self.carry_out(self.dealer.returned(number))

    def leave(self) -> None:
        """A node will start no more jobs."""
        name = self.any_node(lambda node: not node.leaving)
        if name is not None:
            self.nodes[name].leaving = True
            self.tell(f"{name} leaves")
            self.carry_out(self.dealer.leaves(name))

    def lose(self) -> None:
        """No process of a node is left."""
        name = self.any_node()
        if name is not None:
            lost = self.nodes.pop(name)
            for number in lost.jobs:
                self.lose_job(name, lost, number)
            self.tell(f"{name} is lost with jobs {list(lost.jobs)}")
            deals = self.dealer.lost(name)
            failed = {deal.job.number for deal in deals if isinstance(deal, MovedTooOften)}
            assert failed == {number for number in lost.jobs if self.losses[number] > MAX_MOVES}
            self.carry_out(deals)

    def withdraw(self) -> None:
        """The head cancels a job. If it waits, that is its end."""
        if self.offered:
            number = self.random.choice(list(self.offered))
            waits = number in self.waiting
            self.tell(f"job {number} is cancelled")
            assert self.dealer.cancelled(number) == (self.offered[number] if waits else None)
            if waits:
                self.waiting.remove(number)
                self.endings.append(number)
                self.seen["cancelled"] += 1
                self.carry_out(self.dealer.ended(number))

    # What follows

    def carry_out(self, deals: list[Deal]) -> None:
        for deal in deals:
            self.tell(f"  {deal}")
            self.seen[type(deal).__name__] += 1
            match deal:
                case Ask(count):
                    assert count > 0
                    assert not self.exhausted, "the head has no more jobs"
                    assert not any(map(self.may_go_to, self.waiting)), "jobs that wait come first"
                    self.asked += count
                    assert self.asked <= self.open, "more is asked for than nodes have room for"
                case Give(name, job):
                    node = self.nodes[name]
                    assert not node.leaving
                    assert node.room > 0, "the node has not asked for a job"
                    assert name in self.may_go_to(job.number), "a node that has not lost it comes first"
                    first = next(number for number in self.waiting if self.may_go_to(number))
                    assert first == job.number, "the job that has waited for longest comes first"
                    assert job is self.offered[job.number]
                    self.waiting.remove(job.number)
                    node.room -= 1
                    node.jobs[job.number] = job
                    assert self.most is None or self.at <= self.most
                    if self.eager:
                        self.start(name, job.number)
                case MovedTooOften(job):
                    assert self.losses[job.number] == MAX_MOVES + 1
                    self.endings.append(job.number)
                    self.carry_out(self.dealer.ended(job.number))

    def check(self) -> None:
        places = [number for node in self.nodes.values() for number in node.jobs]
        assert len(places) == len(set(places)), "a job is at two nodes"
        known = sorted([*places, *self.waiting, *self.endings])
        assert known == sorted(self.offered), "each job is at a node, waits or has ended"
        for name, node in self.nodes.items():
            assert self.dealer.jobs_at(name) == list(node.jobs.values())
        for number in self.offered:
            where = [name for name, node in self.nodes.items() if number in node.jobs]
            assert self.dealer.node_of(number) == (where[0] if where else None)
        assert self.dealer.idle == (not places and not self.waiting)
        assert not any(map(self.may_go_to, self.waiting)), "a job waits although a node has room for it"
        if self.waiting and self.open > 0:
            self.seen["kept back"] += 1
        assert self.exhausted or self.asked >= self.open, "a node has room, but the head is not asked"

    def may_go_to(self, number: int) -> list[str]:
        """Return the nodes with room for a waiting job. Those that have lost it count only when no other lives."""
        if self.open <= 0:
            return []
        known = {name: node for name, node in self.nodes.items() if node.known and not node.leaving}
        names = set(known) - self.lost_at.get(number, set()) or set(known)
        return [name for name in names if known[name].room > 0]

    # Choices

    def any_node(self, fits: Callable[[Member], bool] = lambda node: True) -> str | None:
        names = [name for name, node in self.nodes.items() if fits(node)]
        return self.random.choice(names) if names else None

    def any_job(self, fits: Callable[[Member], bool] = lambda node: True) -> tuple[str | None, int | None]:
        name = self.any_node(lambda node: bool(node.jobs) and fits(node))
        return (None, None) if name is None else (name, self.random.choice(list(self.nodes[name].jobs)))

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
    expected = ("Ask", "Give", "MovedTooOften", "returned", "cancelled", "kept back")
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
    assert dealer.deal_late([1], {"a": 1, "b": 1}) == [TakeBack("a", job(1))]
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
    assert dealer.deal_late([0], {"a": 1, "b": 1}) == [TakeBack("a", job(0))]


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
    assert dealer.deal_late([0], {"a": 1, "b": 1}) == [TakeBack("a", job(0))]
    dealer.started(0)
    assert dealer.deal_late([1], {"a": 1, "b": 1}) == [TakeBack("a", job(1))]


def test_job_that_is_given_back_when_its_target_is_gone_is_dealt_to_any_node():
    dealer = busy_and_idle()
    dealer.deal_late([1], {"a": 1, "b": 1})
    dealer.lost("b")
    assert dealer.taken(1) == []
    assert dealer.wanted("a", 1) == [Give("a", job(1))]
