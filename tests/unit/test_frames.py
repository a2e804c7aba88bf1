"""Messages over byte streams: whole, in order, without waiting, whatever surrounds them and however they are cut."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_launcher.nodes.frames import MAGIC, MAX_NOISE, READ_BYTES, FrameStream
from gpu_launcher.processes.messages import ChannelClosedError

PIPE_BYTES = 4096
"""The capacity of the pipes, which is the least that Linux gives."""


def small_pipe() -> tuple[int, int]:
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reads, writes


class Wire:
    """A stream that receives, and the raw end of the pipe that it reads from."""

    def __init__(self, *, after_magic: bool = False) -> None:
        reads, self.raw = os.pipe()
        self.answers, writes = os.pipe()
        self.stream = FrameStream(reads, writes, after_magic=after_magic)

    def put(self, data: bytes) -> list[object]:
        """Write bytes, and return the messages that they complete."""
        messages: list[object] = []
        for start in range(0, len(data), PIPE_BYTES):
            part = data[start : start + PIPE_BYTES]
            assert os.write(self.raw, part) == len(part)
            messages += self.stream.receive()
        return messages

    def end(self) -> None:
        os.close(self.raw)
        self.raw = -1

    def close(self) -> None:
        self.stream.close()
        os.close(self.answers)
        if self.raw >= 0:
            os.close(self.raw)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


@pytest.fixture
def noisy() -> Iterator[Wire]:
    """An end that waits for MAGIC."""
    wire = Wire(after_magic=True)
    yield wire
    wire.close()


@pytest.fixture(params=["pipes", "socket"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[FrameStream, FrameStream]]:
    """Two connected streams, over two small pipes or over one pair of sockets, as sshd may use."""
    if request.param == "pipes":
        (there, here), (back, forth) = small_pipe(), small_pipe()
        one, other = FrameStream(back, here), FrameStream(there, forth)
    else:
        left, right = (end.detach() for end in socket.socketpair())
        one, other = FrameStream(left, left), FrameStream(right, right)
    yield one, other
    one.close()
    other.close()


def bytes_of(*messages: object) -> bytes:
    """The messages as a stream writes them."""
    reads, writes = os.pipe()
    unused, other = os.pipe()
    stream = FrameStream(unused, writes)
    try:
        for message in messages:
            stream.send(message)
        assert stream.pending == 0
        return os.read(reads, 1 << 16)
    finally:
        stream.close()
        os.close(reads)
        os.close(other)


def pump(sender: FrameStream, receiver: FrameStream, expected: int) -> list[object]:
    """Flush one end and read the other until as many messages have arrived."""
    arrived: list[object] = []
    while len(arrived) < expected:
        sender.flush()
        arrived += receiver.receive()
    return arrived


# Whole and in order


def test_messages_arrive_whole_and_in_order(ends):
    one, other = ends
    for number in range(5):
        one.send(("message", number))
    assert pump(one, other, 5) == [("message", number) for number in range(5)]
    assert other.receive() == []


@pytest.mark.parametrize(
    "size", [0, 1, PIPE_BYTES - 1, PIPE_BYTES, READ_BYTES - 9, READ_BYTES, READ_BYTES + 1, 3_000_000]
)
def test_message_may_be_larger_than_what_the_pipe_holds(ends, size):
    one, other = ends
    message = os.urandom(size)
    one.send(message)
    one.send("next")
    assert pump(one, other, 2) == [message, "next"]
    assert one.pending == 0


def test_both_ends_may_send_more_than_the_pipes_hold(ends):
    one, other = ends
    for number in range(50):
        one.send((number, "o" * 10_000))
        other.send((number, "t" * 10_000))
    there: list[object] = []
    here: list[object] = []
    while len(there) < 50 or len(here) < 50:
        one.flush()
        other.flush()
        there += other.receive()
        here += one.receive()
    assert there == [(number, "o" * 10_000) for number in range(50)]
    assert here == [(number, "t" * 10_000) for number in range(50)]


def test_what_does_not_fit_is_kept_in_order_and_sent_as_there_is_room(ends):
    one, other = ends
    one.send("x" * 2_000_000)
    one.send("second")
    kept = one.pending
    assert kept > 1_000_000, "the sender waits for nobody"
    one.flush()
    assert one.pending == kept, "nothing was read, so there is no more room"
    poll = select.poll()
    poll.register(one.writes, select.POLLOUT)
    assert poll.poll(0) == []
    assert other.receive() == [], "a part of a message is not a message"
    assert [number for number, _ in poll.poll(0)] == [one.writes]
    assert pump(one, other, 2) == ["x" * 2_000_000, "second"]


def test_messages_may_be_cut_anywhere(wire):
    messages = ["first", b"\0" * 300, {"third": 3}]
    data = bytes_of(*messages)
    arrived: list[object] = []
    for position in range(len(data)):
        arrived += wire.put(data[position : position + 1])
    assert arrived == messages


def test_several_messages_may_arrive_at_once(wire):
    messages = list(range(100))
    assert wire.put(bytes_of(*messages)) == messages


def test_nothing_new_is_not_the_end_of_the_connection(wire):
    assert wire.stream.receive() == []
    assert wire.put(bytes_of("late")) == ["late"]


def test_nothing_is_lost_between_ends_that_wait_for_each_other(ends):
    one, other = ends
    arrived: list[object] = []

    def read() -> None:
        poll = select.poll()
        poll.register(other, select.POLLIN)
        while len(arrived) < 200:
            assert poll.poll(60_000)
            arrived.extend(other.receive())

    reader = threading.Thread(target=read)
    reader.start()
    poll = select.poll()
    poll.register(one.writes, select.POLLOUT)
    for number in range(200):
        one.send((number, "x" * 1000))
    while one.pending:
        assert poll.poll(60_000)
        one.flush()
    reader.join(60)
    assert [message[0] for message in arrived] == list(range(200))


# Noise before MAGIC


def test_what_comes_before_magic_is_noise(noisy):
    assert noisy.put(b"Welcome to gpu2\nLast login: today\n") == []
    assert noisy.stream.noise == b"Welcome to gpu2\nLast login: today\n"
    assert noisy.put(MAGIC + bytes_of("hello")) == ["hello"]
    assert noisy.stream.noise == b"Welcome to gpu2\nLast login: today\n"
    assert noisy.put(bytes_of("more")) == ["more"]


@pytest.mark.parametrize("cut", range(len(MAGIC) + 1))
def test_magic_may_be_cut_anywhere(noisy, cut):
    assert noisy.put(b"noise" + MAGIC[:cut]) == []
    assert noisy.put(MAGIC[cut:]) == []
    assert noisy.put(bytes_of("hello")) == ["hello"]
    assert noisy.stream.noise == b"noise"


def test_magic_may_be_cut_into_bytes_behind_a_false_start(noisy):
    data = MAGIC[:-2] + MAGIC[:5] + MAGIC + bytes_of("hello")
    arrived: list[object] = []
    for position in range(len(data)):
        arrived += noisy.put(data[position : position + 1])
    assert arrived == ["hello"]
    assert noisy.stream.noise == MAGIC[:-2] + MAGIC[:5]


@pytest.mark.parametrize("cut", [0, 3, 7, 8, 7 + len(MAGIC) - 1, 7 + len(MAGIC), -1])
def test_only_the_end_of_much_noise_is_kept(noisy, cut):
    for number in range(5):
        assert noisy.put(bytes([number]) * (MAX_NOISE // 2)) == []
        assert len(noisy.stream.noise) <= MAX_NOISE
    last = b"the end" + MAGIC + bytes_of("hello")
    assert noisy.put(last[:cut]) + noisy.put(last[cut:]) == ["hello"]
    assert noisy.stream.noise.endswith(b"\4" * 1000 + b"the end")
    assert len(noisy.stream.noise) <= MAX_NOISE


def test_noise_without_magic_is_kept_when_the_connection_ends(noisy):
    assert noisy.put(b"Permission denied") == []
    noisy.end()
    with pytest.raises(ChannelClosedError):
        noisy.stream.receive()
    assert noisy.stream.noise == b"Permission denied"


def test_greeting_precedes_the_first_message(ends):
    one, other = ends
    one.greet()
    one.send("hello")
    awaits = FrameStream(os.dup(other.fileno()), os.dup(other.writes), after_magic=True)
    try:
        assert pump(one, awaits, 1) == ["hello"]
        assert awaits.noise == b""
    finally:
        awaits.close()


def test_magic_within_a_message_is_data(noisy):
    assert noisy.put(MAGIC + bytes_of(MAGIC, "after")) == [MAGIC, "after"]


# The end


def test_messages_before_the_end_are_received_first(wire):
    assert os.write(wire.raw, bytes_of("one", "two"))
    wire.end()
    assert wire.stream.receive() == ["one", "two"]
    for _ in range(3):
        with pytest.raises(ChannelClosedError):
            wire.stream.receive()


@pytest.mark.parametrize("length", [1, 7, 8, 9, -1])
def test_incomplete_message_is_dropped_at_the_end(wire, length):
    whole, cut = bytes_of("whole"), bytes_of("this one is cut")
    assert wire.put(whole + cut[:length]) == ["whole"]
    wire.end()
    with pytest.raises(ChannelClosedError):
        wire.stream.receive()


def test_sending_to_a_closed_reader_fails_silently(wire):
    os.close(wire.answers)
    try:
        wire.stream.send("nobody reads this")
        wire.stream.greet()
        wire.stream.flush()
        assert wire.stream.pending == 0
        assert wire.put(bytes_of("but this arrives")) == ["but this arrives"]
    finally:
        wire.answers = os.open(os.devnull, os.O_RDONLY)


def test_reader_may_close_while_a_message_is_sent(ends):
    one, other = ends
    one.send("x" * 3_000_000)
    assert one.pending
    other.close()
    one.flush()
    assert one.pending == 0
    one.send("y")
    assert one.pending == 0
    with pytest.raises(ChannelClosedError):
        one.receive()


def test_sending_over_a_reset_connection_fails_silently():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
    descriptor = here.detach()
    one = FrameStream(descriptor, descriptor)
    try:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()  # resets the connection
        poll = select.poll()
        poll.register(one, 0)
        assert poll.poll(60_000), "it is reset"
        one.send("nobody reads this")
        assert one.pending == 0
        with pytest.raises(ChannelClosedError):
            one.receive()
    finally:
        there.close()
        one.close()


def test_end_that_closes_without_reading_everything_is_closed(ends):
    """A socket then reports that the connection was reset."""
    one, other = ends
    one.send("nobody reads this")
    other.close()
    for _ in range(2):
        with pytest.raises(ChannelClosedError):
            one.receive()


def test_close_is_idempotent_and_closes_each_descriptor_once(ends):
    one, _ = ends
    numbers = {one.fileno(), one.writes}
    one.close()
    one.close()
    assert not [number for number in numbers if Path(f"/proc/self/fd/{number}").exists()]


def test_closed_stream_is_not_readable(ends):
    one, other = ends
    other.send("unread")
    assert one.readable
    one.close()
    assert not one.readable
