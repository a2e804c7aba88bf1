"""The handshake and the frames of a connection, without sockets: what is accepted, and every forgery that is not."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.nodes.authentication import (
    KEY_BYTES,
    MAX_CONTENT,
    AuthenticationError,
    FrameOpener,
    FrameSealer,
    Handshake,
    Session,
    Side,
    new_key,
)

KEY = bytes(range(KEY_BYTES))


def shake_hands(key: bytes = KEY, other: bytes = KEY) -> tuple[Session, Session, list[bytes]]:
    """The sessions of the listener and the connector, and their messages."""
    listener, connector = Handshake(key, Side.LISTENER), Handshake(other, Side.CONNECTOR)
    answer = connector.receive(listener.greeting)
    proof = listener.receive(answer)
    assert connector.receive(proof) == b""
    assert listener.session is not None
    assert connector.session is not None
    return listener.session, connector.session, [listener.greeting, answer, proof]


@pytest.fixture
def pair() -> tuple[FrameSealer, FrameOpener]:
    listener, connector, _ = shake_hands()
    return listener.sealer, connector.opener


# The handshake


def test_ends_with_the_same_key_understand_each_other():
    listener, connector, _ = shake_hands()
    assert connector.opener.open(listener.sealer.seal(b"there")) == [b"there"]
    assert listener.opener.open(connector.sealer.seal(b"back")) == [b"back"]


def test_keys_are_random():
    assert len({new_key() for _ in range(100)}) == 100
    assert len(new_key()) == KEY_BYTES


def test_no_message_shows_the_key_and_no_handshake_is_like_another():
    _, _, first = shake_hands()
    _, _, second = shake_hands()
    assert all(KEY not in message for message in first)
    assert not set(first) & set(second)


def test_connector_with_another_key_is_refused_and_learns_nothing():
    listener, connector = Handshake(KEY, Side.LISTENER), Handshake(new_key(), Side.CONNECTOR)
    answer = connector.receive(listener.greeting)
    with pytest.raises(AuthenticationError, match="does not have the key"):
        listener.receive(answer)
    assert listener.session is None


def test_listener_with_another_key_is_refused():
    listener, connector = Handshake(KEY, Side.LISTENER), Handshake(KEY, Side.CONNECTOR)
    connector.receive(listener.greeting)
    with pytest.raises(AuthenticationError, match="does not have the key"):
        connector.receive(bytes(32))
    assert connector.session is None


def test_listener_of_something_else_is_refused():
    connector = Handshake(KEY, Side.CONNECTOR)
    with pytest.raises(AuthenticationError, match="is not gpu-launcher"):
        connector.receive(b"SSH-2.0-OpenSSH_9.2".ljust(connector.missing))


def test_answer_of_an_earlier_handshake_is_refused():
    _, _, (_, answer, _) = shake_hands()
    listener = Handshake(KEY, Side.LISTENER)
    with pytest.raises(AuthenticationError):
        listener.receive(answer)


def test_proof_of_an_earlier_handshake_is_refused():
    _, _, (greeting, _, proof) = shake_hands()
    connector = Handshake(KEY, Side.CONNECTOR)
    connector.receive(greeting)
    with pytest.raises(AuthenticationError):
        connector.receive(proof)


def test_proof_sent_back_to_its_maker_is_refused():
    listener, connector = Handshake(KEY, Side.LISTENER), Handshake(KEY, Side.CONNECTOR)
    answer = connector.receive(listener.greeting)
    with pytest.raises(AuthenticationError):
        connector.receive(answer[-32:])


def test_answer_that_repeats_the_nonce_of_the_listener_is_refused():
    listener = Handshake(KEY, Side.LISTENER)
    with pytest.raises(AuthenticationError):
        listener.receive((listener.greeting[-32:] * 2)[: listener.missing])


@given(st.data())
def test_handshake_with_any_bit_changed_is_refused(data):
    listener, connector = Handshake(KEY, Side.LISTENER), Handshake(KEY, Side.CONNECTOR)
    which = data.draw(st.integers(0, 2))

    def deliver(number: int, message: bytes) -> bytes:
        if number != which:
            return message
        bit = data.draw(st.integers(0, 8 * len(message) - 1))
        return bytes(byte ^ (1 << bit % 8) if place == bit // 8 else byte for place, byte in enumerate(message))

    def run() -> None:
        answer = connector.receive(deliver(0, listener.greeting))
        proof = listener.receive(deliver(1, answer))
        connector.receive(deliver(2, proof))

    with pytest.raises(AuthenticationError):
        run()


@given(st.lists(st.integers(1, 20), min_size=30))
def test_handshake_in_pieces_is_the_same(sizes):
    listener, connector = Handshake(KEY, Side.LISTENER), Handshake(KEY, Side.CONNECTOR)
    rest = iter(sizes + [1] * 500)

    def deliver(message: bytes, receiver: Handshake) -> bytes:
        answer = b""
        while message:
            size = min(next(rest), receiver.missing)
            assert not answer
            answer, message = receiver.receive(message[:size]), message[size:]
        return answer

    deliver(deliver(deliver(listener.greeting, connector), listener), connector)
    assert listener.session is not None
    assert connector.session is not None


# Frames


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=10), st.integers(1, 200))
def test_frames_arrive_whole_and_in_order(contents, size):
    listener, connector, _ = shake_hands()
    stream = b"".join(map(listener.sealer.seal, contents))
    arrived = []
    for begin in range(0, len(stream), size):
        arrived += connector.opener.open(stream[begin : begin + size])
    assert arrived == contents


def test_largest_frame_arrives(pair):
    sealer, opener = pair
    assert opener.open(sealer.seal(bytes(MAX_CONTENT))) == [bytes(MAX_CONTENT)]


@given(st.binary(min_size=1, max_size=100), st.data())
def test_frame_with_any_bit_changed_is_never_delivered(content, data):
    listener, connector, _ = shake_hands()
    frame = listener.sealer.seal(content)
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    forged = bytes(byte ^ (1 << bit % 8) if place == bit // 8 else byte for place, byte in enumerate(frame))
    try:
        assert connector.opener.open(forged) == []  # its length is larger, and more would have to follow
        connector.opener.open(bytes(MAX_CONTENT + 36))
    except AuthenticationError:
        return
    pytest.fail("it is accepted")


def refused(opener: FrameOpener, *frames: bytes) -> None:
    """Expect that the last of the frames is refused."""
    *others, last = frames
    for frame in others:
        assert opener.open(frame)
    with pytest.raises(AuthenticationError, match="a frame is not the next one that the other end sent"):
        opener.open(last)


def test_repeated_frame_is_refused(pair):
    sealer, opener = pair
    frame = sealer.seal(b"once")
    refused(opener, frame, frame)


def test_reordered_frame_is_refused(pair):
    sealer, opener = pair
    _, second = sealer.seal(b"1"), sealer.seal(b"2")
    refused(opener, second)


def test_frame_after_one_that_was_left_out_is_refused(pair):
    sealer, opener = pair
    first, _, third = sealer.seal(b"1"), sealer.seal(b"2"), sealer.seal(b"3")
    refused(opener, first, third)


def test_frame_returned_to_its_sender_is_refused():
    listener, _, _ = shake_hands()
    refused(listener.opener, listener.sealer.seal(b"mine"))


def test_frame_of_another_connection_is_refused():
    first, _, _ = shake_hands()
    _, second, _ = shake_hands()
    refused(second.opener, first.sealer.seal(b"theirs"))


def test_truncated_frame_is_not_delivered_and_the_next_is_refused(pair):
    sealer, opener = pair
    assert opener.open(sealer.seal(b"x" * 100)[:-1]) == []
    refused(opener, sealer.seal(b"y" * 100))


@pytest.mark.parametrize("length", [0, MAX_CONTENT + 1, 10**9, 2**32 - 1])
def test_length_out_of_bounds_is_refused_before_anything_else_arrives(pair, length):
    _, opener = pair
    with pytest.raises(AuthenticationError, match=f"a frame has {length} bytes, but must have 1 to {MAX_CONTENT}"):
        opener.open(struct.pack(">I", length))
