"""Messages between processes: whole, in order, with their descriptors, and never lost by the end of the sender."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from gpu_launcher.processes.messages import (
    ChannelClosedError,
    JobExited,
    KillJob,
    channel,
    receive,
    send,
)
from tests.descriptors import open_descriptors


@pytest.fixture
def ends():
    one, other = channel()
    with one, other:
        yield one, other


def test_messages_arrive_whole_and_in_order(ends):
    one, other = ends
    for number in range(5):
        send(one, ("message", number))
    assert [receive(other) for _ in range(5)] == [(("message", number), ()) for number in range(5)]


@pytest.mark.parametrize("size", [0, 1, 65_000, 65_536, 66_000, 300_000, 20_000_000])
def test_a_message_may_be_of_any_size(ends, size):
    one, other = ends
    message = os.urandom(size)
    before = open_descriptors()
    send(one, message)
    assert receive(other) == (message, ())
    assert open_descriptors() <= before


@pytest.mark.parametrize("size", [10, 300_000])
def test_descriptors_travel_with_a_message_whatever_its_size(ends, size):
    one, other = ends
    readers, writers = zip(*[os.pipe() for _ in range(8)], strict=True)
    send(one, b"x" * size, writers)
    message, received = receive(other)
    assert message == b"x" * size
    assert len(received) == 8
    for number, descriptor in enumerate(received):
        assert not os.get_inheritable(descriptor)
        os.write(descriptor, b"received")
        os.write(writers[number], b" and sent")
        assert os.read(readers[number], 99) == b"received and sent"
    for descriptor in (*readers, *writers, *received):
        os.close(descriptor)


def test_a_descriptor_in_an_unread_message_stays_open_though_its_sender_closed_it(ends):
    one, other = ends
    reader, writer = os.pipe()
    send(one, "lease", (writer,))
    os.close(writer)
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    _, (received,) = receive(other)
    os.close(received)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_nobody_at_the_other_end_is_an_error_of_its_own(ends):
    one, other = ends
    other.close()
    with pytest.raises(ChannelClosedError):
        send(one, "hello")
    with pytest.raises(ChannelClosedError):
        send(one, b"x" * 300_000)
    with pytest.raises(ChannelClosedError):
        receive(one)


def test_what_was_sent_before_the_end_is_received(ends):
    one, other = ends
    send(other, "last words")
    other.close()
    assert receive(one) == ("last words", ())
    with pytest.raises(ChannelClosedError):
        receive(one)


def test_last_words_are_received_also_from_one_who_left_messages_unread(ends):
    """The kernel then says ECONNRESET first. A job's end was lost in it, when it crossed an order to kill the job."""
    one, other = ends
    send(one, KillJob())
    send(other, JobExited(0))
    other.close()
    assert receive(one) == (JobExited(0), ())
    with pytest.raises(ChannelClosedError):
        receive(one)


def test_the_end_is_seen_also_of_one_who_left_messages_unread_and_said_nothing(ends):
    one, other = ends
    send(one, KillJob())
    other.close()
    with pytest.raises(ChannelClosedError):
        receive(one)


def test_nothing_to_read_does_not_block_a_channel_that_must_not_block(ends):
    one, _ = ends
    one.setblocking(False)
    with pytest.raises(BlockingIOError):
        receive(one)


def test_a_message_that_cannot_be_pickled_leaves_the_channel_as_it_was(ends):
    one, other = ends
    with pytest.raises((AttributeError, TypeError)):
        send(one, lambda: None)
    send(one, "next")
    assert receive(other) == ("next", ())


TOO_MANY_FILES = """
import os, resource
from gpu_launcher.processes.messages import channel, receive, send
one, other = channel()
pipes = os.pipe()
send(one, "lease", pipes)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1, hard))
try:
    receive(other)
except OSError as error:
    print(error)
"""


def test_a_message_whose_descriptors_do_not_fit_into_this_process_says_what_to_do():
    done = subprocess.run([sys.executable, "-c", TOO_MANY_FILES], capture_output=True, text=True, timeout=500)
    assert "too many open files (`ulimit -n`)" in done.stdout, done.stderr


def test_a_message_that_one_call_cannot_read_arrives_whole(ends, monkeypatch):
    """Linux reads less than 2 GiB with one call."""
    one, other = ends
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 100_000), offset))
    message = os.urandom(333_333)
    send(one, message)
    assert receive(other) == (message, ())


def test_a_channel_is_not_inherited_by_programs_that_are_started_meanwhile(ends):
    assert not any(os.get_inheritable(end.fileno()) for end in ends)
    assert all(end.type == socket.SOCK_SEQPACKET for end in ends)


def test_receive_does_not_wait_if_it_is_not_to(ends):
    one, other = ends
    with pytest.raises(BlockingIOError):
        receive(one, wait=False)
    send(other, "hello")
    assert receive(one, wait=False) == ("hello", ())
    other.close()
    with pytest.raises(ChannelClosedError):
        receive(one, wait=False)
