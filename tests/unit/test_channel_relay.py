"""The relay of channels between a head and the processes of jobs, with both of its ends in this process."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gpu_launcher.nodes.agent_messages import Beat
from gpu_launcher.nodes.channel_relay import MAX_PENDING, WINDOW, ChannelRelay, FarEnd
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.processes.messages import channel, receive, send


class End:
    """One end of a connection with its relay."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        descriptor = os.dup(connection.fileno())
        self.stream = FrameStream(descriptor, descriptor)
        self.poll = select.epoll()
        self.relay = ChannelRelay(self.stream, self.poll)
        self.far: dict[int, FarEnd] = {}
        self.near: dict[int, socket.socket] = {}
        self.others: list[object] = []

    def open(self, number: int, channel_number: int | None = None) -> int:
        self.near[number], far = channel()
        self.far[number] = FarEnd(far)
        return self.relay.open(number, self.far[number], channel_number)

    def turn(self) -> list[int]:
        """Take, deliver and send what there is."""
        for message in self.stream.receive():
            if isinstance(message, Beat):
                self.others.append(message)
            else:
                self.relay.take(message)
        self.relay.deliver()
        over = self.relay.send()
        for number in over:
            self.relay.forget(number)
        self.stream.flush()
        return over

    def say(self, number: int, message: object) -> None:
        send(self.near[number], message, wait=False)

    def heard(self, number: int) -> list[Any]:
        messages = []
        while True:
            try:
                messages.append(receive(self.near[number], wait=False)[0])
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self.relay.close()
        for end in self.far.values():
            end.socket.close()
        for one in (*self.near.values(), self.stream, self.connection, self.poll):
            one.close()


class Both:
    def __init__(self) -> None:
        self.head, self.agent = map(End, socket.socketpair())

    def open(self, *numbers: int) -> None:
        for number in numbers:
            self.agent.open(number, self.head.open(number))

    def settle(self, turns: int = 20) -> None:
        """Take turns until nothing has moved for some."""
        still = 0
        before = (-1, -1)
        while still < turns:
            self.head.turn()
            self.agent.turn()
            now = (self.head.stream.received, self.agent.stream.received)
            still = still + 1 if now == before else 0
            before = now


@pytest.fixture
def both() -> Iterator[Both]:
    both = Both()
    yield both
    both.head.close()
    both.agent.close()


def test_messages_arrive_whole_and_in_order_in_both_directions(both: Both) -> None:
    both.open(7, 8)
    rng = random.Random(0)
    sizes = [0, 1, 100, 65_000, 70_000, WINDOW, 3 * WINDOW + 1, 5]
    messages = [rng.randbytes(size) for size in sizes]
    for here, there in ((both.head, both.agent), (both.agent, both.head)):
        heard: dict[int, list[Any]] = {7: [], 8: []}
        for message in [*messages, None]:
            for number, one in heard.items():
                if message is not None:
                    here.say(number, (number, message))
                both.settle(3)
                one += there.heard(number)
        both.settle()
        for number, one in heard.items():
            assert one + there.heard(number) == [(number, message) for message in messages]


def test_a_reader_that_does_not_read_keeps_a_message_and_a_window_at_most(both: Both) -> None:
    both.open(1, 2)
    message = b"x" * 60_000
    sent = 0
    for _ in range(100):
        try:
            both.agent.say(1, message)
            sent += 1
        except BlockingIOError:
            both.settle(3)
    kept = both.head.relay._channels[0]
    assert sent < 100
    assert sum(map(len, kept.ready)) + len(kept.incoming) <= WINDOW
    assert both.agent.stream.pending == both.head.stream.pending == 0
    both.agent.say(2, "the other channel is free")
    both.settle()
    assert both.head.heard(2) == ["the other channel is free"]
    heard = 0
    while heard < sent:
        heard += len(both.head.heard(1))
        both.settle(3)
    assert heard == sent


def test_large_messages_leave_room_for_others(both: Both) -> None:
    large = {number: os.urandom(640 * 1024) for number in range(20)}
    both.open(*large, 20)
    for number, message in large.items():
        both.agent.say(number, message)
    most = 0
    for _ in range(8):
        both.agent.turn()
        most = max(most, both.agent.stream.pending)
        both.head.turn()
    assert most <= MAX_PENDING + 100_000
    both.agent.say(20, "small")
    both.agent.stream.send(Beat())
    for _ in range(12):
        both.agent.turn()
        both.head.turn()
    assert both.head.heard(20) == ["small"]
    assert len(both.head.others) == 1
    assert [both.head.heard(number) for number in large] == [[]] * 20, "the large messages are still under way"
    both.settle()
    assert [both.head.heard(number) for number in large] == [[message] for message in large.values()]


def test_what_a_job_said_before_it_ended_is_delivered_before_its_end(both: Both) -> None:
    both.open(3)
    for number in range(9):
        both.agent.say(3, (number, b"x" * 50_000))
        both.settle(1)
        if number % 3 == 2:
            assert not both.head.relay.has_ended(3)
    both.agent.near[3].close()
    both.agent.relay.end(3)
    heard: list[Any] = []
    over: list[int] = []
    for _ in range(200):
        over += both.agent.turn()
        both.head.turn()
        if both.head.relay.has_ended(3):
            break
        heard += both.head.heard(3)
    heard += both.head.heard(3)
    assert over == [3]
    assert [number for number, _ in heard] == list(range(9))


def test_a_channel_says_whether_anything_was_delivered(both: Both) -> None:
    both.open(3)
    assert not both.head.far[3].has_delivered
    both.head.say(3, "to the job")
    both.settle()
    assert not both.head.far[3].has_delivered
    both.agent.say(3, "from the job")
    both.settle()
    assert both.head.far[3].has_delivered


def test_a_job_that_is_offered_again_gets_nothing_of_its_earlier_channel(both: Both) -> None:
    first = both.head.open(5)
    both.agent.open(5, first)
    both.agent.say(5, "late")
    both.agent.turn()
    both.head.relay.forget(5)
    far = both.head.far[5]
    both.agent.relay.forget(5)
    both.agent.far[5].socket.close()
    both.agent.near[5].close()
    second = both.head.relay.open(5, far)
    both.agent.open(5, second)
    assert second != first
    both.settle()
    assert both.head.heard(5) == []
    both.agent.say(5, "new")
    both.settle()
    assert both.head.heard(5) == ["new"]


def test_a_program_that_does_not_listen_any_more_blocks_nothing(both: Both) -> None:
    both.open(1)
    both.head.near[1].close()
    for _ in range(20):
        both.agent.say(1, b"x" * 60_000)
        both.settle(2)
    both.agent.near[1].close()
    both.agent.relay.end(1)
    assert 1 in [number for _ in range(20) for number in both.agent.turn()]
    both.settle()
    assert both.head.relay.has_ended(1)


def test_poll_is_idle_when_nothing_can_be_done(both: Both) -> None:
    both.open(1)
    assert both.head.poll.poll(0) == []
    both.head.say(1, b"x" * 60_000)
    assert both.head.poll.poll(0) != []
    both.head.relay.rest()
    assert both.head.poll.poll(0) == [], "nothing may be sent now"
    both.settle()
    assert both.agent.heard(1) == [b"x" * 60_000]
    assert both.head.poll.poll(0) == []
    for _ in range(50):  # nothing is read at the other end
        both.settle(2)
        with contextlib.suppress(BlockingIOError):
            both.head.say(1, b"x" * 60_000)
    both.settle()
    assert both.head.poll.poll(0) == both.agent.poll.poll(0) == []
    both.head.near[1].close()
    both.settle()
    assert both.head.poll.poll(0) == []
