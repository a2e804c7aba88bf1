"""What another user can put into the pool's queue: it stops nobody for longer than that user's process lives."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_launcher.boot import Origin
from gpu_launcher.leases import FileLedger, HeldLease, scan
from gpu_launcher.leases.file_format import (
    MAX_ENTRY_BYTES,
    LeaseRecord,
    TicketName,
    TicketRecord,
    decode,
    lease_names,
    unpublished_name,
)
from gpu_launcher.leases.grant_policy import Candidate, Demand
from gpu_launcher.model import WHOLE, Device, DeviceKind, Owner, Request
from gpu_launcher.users import user_name
from tests.security.accounts import ADA, GRACE, MALLORY, acting_as

ID = "a" * 32
HERE = Origin.here()
TICKET = TicketRecord(Demand(Request(1), (Candidate("A"),)), 1, "mine", 0.0, HERE)
LEASE = LeaseRecord({"A": WHOLE}, 0.0, None, 1, "/usr/bin/backup", 0.0, HERE)
FIRST = str(TicketName(0, 1, ID, 0))
NAMES = {"ticket": FIRST, "lease": f"lease-{ID}", "twin": f"twin-{ID}", "unpublished": unpublished_name(ID)}
OWNER = Owner(os.getpid(), "ada", "train.py")


def devices(uuids: str) -> list[Device]:
    return [Device(uuid, 0, "simulated", DeviceKind.SIMULATED) for uuid in uuids]


def gets(queue: Path, uuid: str = "A", user: int = ADA) -> bool:
    """Whether a user who comes now gets the device; it is given back."""
    with acting_as(user), FileLedger(queue.parent) as ledger:
        ledger.snapshot()
        return ledger.claim(ledger.enqueue(Request(1), devices(uuid), OWNER)) is not None


def changed(record: TicketRecord | LeaseRecord, **fields: object) -> bytes:
    return json.dumps({**json.loads(record.encode(ID)), **fields}).encode()


def write(path: Path, content: bytes = b"", *, lock: int = 0, mode: int = 0o644) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    os.write(descriptor, content)
    if lock:
        fcntl.flock(descriptor, lock)
    path.chmod(mode)
    return descriptor


def with_file_lease(path: Path, kind: int, content: bytes = b"") -> int:
    os.close(write(path, content))
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, kind)
    return descriptor


def unix_socket(path: Path) -> socket.socket:
    """Its address may be too long, so it is made where that is not."""
    made = socket.socket(socket.AF_UNIX)
    os.chdir(path.parent)
    made.bind(path.name)
    return made


def large(path: Path) -> int:
    descriptor = write(path, lock=fcntl.LOCK_EX)
    os.ftruncate(descriptor, 1 << 40)
    return descriptor


HARMLESS: dict[str, Callable[[Path], object]] = {
    "an exclusive file lease": lambda path: with_file_lease(path, fcntl.F_WRLCK),
    "a shared file lease": lambda path: with_file_lease(path, fcntl.F_RDLCK),
    "a file without permissions": lambda path: write(path, mode=0),
    "a write-only file": lambda path: write(path, b"x" * 100, mode=0o222),
    "a FIFO": os.mkfifo,
    "a socket": unix_socket,
    "a directory": Path.mkdir,
    "a closed directory": lambda path: path.mkdir(mode=0),
    "a link to another file": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("/nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "garbage": lambda path: write(path, b"\xff\x00{" * 1000),
    "a shared lock": lambda path: write(path, b"{}", lock=fcntl.LOCK_SH),
}


@pytest.mark.root
@pytest.mark.usefixtures("protected")
@pytest.mark.parametrize("what", HARMLESS)
def test_an_entry_that_nobody_holds_stops_nobody(queue, start, what):
    def attack() -> list[object]:
        paths = [queue / name for name in NAMES.values()]
        return [HARMLESS[what](path) for path in (*paths, queue / "README")]

    mallory = start(MALLORY, attack)
    assert gets(queue)
    assert gets(queue, user=0)
    mallory.kill()
    assert gets(queue)


IMPOSSIBLE = {
    "nothing": b"",
    "not JSON": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "another version's": changed(TICKET, format=99),
    "an endless time limit": changed(TICKET, timeout=1).replace(b'"timeout": 1', b'"timeout": Infinity'),
    "no number as time limit": changed(TICKET, timeout=1).replace(b'"timeout": 1', b'"timeout": NaN'),
    "a negative time limit": changed(TICKET, timeout=-1),
    "too large a time limit": changed(TICKET, timeout=1).replace(b'"timeout": 1', b'"timeout": 1e400'),
    "a number of 400 digits": changed(TICKET, since=1).replace(b'"since": 1', b'"since": ' + b"9" * 400),
    "more devices than candidates": changed(TICKET, count=2),
    "a million devices": changed(TICKET, count=10**6),
    "10,000 candidates": changed(TICKET, candidates=[[f"{n}", None, False] for n in range(10_000)]),
    "a name of 5,000 digits": changed(TICKET, candidates=[["9" * 5000, None, False]]),
    "a name with an escape sequence": changed(TICKET, candidates=[["\x1b[2J", None, False]]),
    "a flag that is none": changed(TICKET, candidates=[["A", None, "no"]]),
    "a share of nothing": changed(TICKET, share=[0, 0]),
    "a share of more than all": changed(TICKET, share=[1_000_001, 0]),
    "a huge share": changed(TICKET, share=[10**18, 10**30]),
    "another priority than its name's": changed(TICKET, priority=7),
    "true for a number": changed(TICKET, count=True),
    "a fraction for a number": changed(TICKET, pid=1.5),
    "a negative process": changed(TICKET, pid=-1),
    "a megabyte of command": changed(TICKET, command="x" * (1 << 20)),
    "another ticket's id": changed(TICKET, id="b" * 32),
}


@pytest.mark.root
@pytest.mark.parametrize("content", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_forged_ticket_keeps_nobody_waiting_and_is_named(queue, start, content):
    start(MALLORY, lambda: write(queue / FIRST, content, lock=fcntl.LOCK_EX))
    with acting_as(ADA), FileLedger(queue.parent) as ledger:
        ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
        (named,) = ledger.snapshot().unreadable
        assert (named.name, named.user) == (FIRST, user_name(MALLORY))
        assert ledger.claim(ticket) is not None


def locked_lease(content: bytes, mode: int = 0o644) -> Callable[[Path], object]:
    def attack(queue: Path) -> list[int]:
        first, second = lease_names(ID)
        kept = [write(queue / first, content, lock=fcntl.LOCK_EX, mode=mode)]
        os.link(queue / first, queue / second)
        return kept

    return attack


def leased_lease(queue: Path) -> int:
    descriptor = write(queue / f"lease-{ID}", LEASE.encode(ID), lock=fcntl.LOCK_EX)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    return descriptor


HOLDING = {
    "garbage": locked_lease(b"garbage"),
    "empty": locked_lease(b""),
    "no permissions": locked_lease(b"", mode=0),
    "another version": locked_lease(changed(LEASE, format=99)),
    "impossible shares": locked_lease(changed(LEASE, shares=[["A", 10**9, 0]])),
    "a valid lease": locked_lease(LEASE.encode(ID)),
    "an enormous file": lambda queue: large(queue / f"lease-{ID}"),
    "a file lease": leased_lease,
}


@pytest.mark.root
@pytest.mark.parametrize("how", HOLDING)
def test_a_forged_lease_holds_no_longer_than_its_process_lives(queue, start, how):
    mallory = start(MALLORY, lambda: HOLDING[how](queue))
    assert not gets(queue)
    with acting_as(ADA), FileLedger(queue.parent) as ledger:
        (lease, *_) = ledger.snapshot().leases
        assert lease.owner.user == user_name(MALLORY)
        mallory.kill()
        assert ledger.claim(ledger.enqueue(Request(1), devices("A"), OWNER)) is not None
    assert gets(queue)


@pytest.mark.root
def test_an_unopenable_file_counts_for_minutes_where_locks_are_unseen(queue, start, monkeypatch):
    start(MALLORY, lambda: write(queue / f"lease-{ID}", mode=0)).kill()
    monkeypatch.setattr(scan, "sees_all_locks", lambda: False)
    assert not gets(queue)
    monkeypatch.setattr(scan, "BLIND_SECONDS", 0.0)
    assert gets(queue)


@pytest.mark.root
def test_user_and_process_are_the_kernels_whatever_the_file_says(queue, start):
    forged = changed(LEASE, pid=1, user="root", owner={"pid": 1, "user": "root", "command": "backup"})
    mallory = start(MALLORY, lambda: locked_lease(forged)(queue))
    with acting_as(ADA), FileLedger(queue.parent) as ledger:
        (lease,) = ledger.snapshot().leases
    assert (lease.owner.user, lease.owner.pid) == (user_name(MALLORY), 0)
    mallory.kill()
    for name in lease_names(ID):
        (queue / name).unlink()
    start(MALLORY, lambda: locked_lease(changed(LEASE, pid=os.getpid()))(queue))
    with acting_as(ADA), FileLedger(queue.parent) as ledger:
        (lease,) = ledger.snapshot().leases
    assert lease.owner.pid > 1


def hold(queue: Path, uuids: str = "A") -> tuple[FileLedger, HeldLease | None]:
    ledger = FileLedger(queue.parent)
    return ledger, ledger.claim(ledger.enqueue(Request(len(uuids)), devices(uuids), Owner(os.getpid(), "", "ada.py")))


@pytest.mark.root
@pytest.mark.parametrize("mode", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["exclusive", "shared"])
def test_a_lock_on_a_dead_programs_lease_is_its_holders(queue, start, mode):
    ada = start(ADA, lambda: hold(queue))
    (name,) = queue.glob("lease-*")

    def attack() -> threading.Thread:
        descriptor = os.open(name, os.O_RDONLY)
        thread = threading.Thread(target=fcntl.flock, args=(descriptor, mode), daemon=True)
        thread.start()  # it blocks until the victim is dead
        return thread

    start(MALLORY, attack)
    ada.kill()
    deadline = time.monotonic() + 200
    with acting_as(GRACE), FileLedger(queue.parent) as ledger:
        while mode == fcntl.LOCK_EX:
            leases = ledger.snapshot().leases
            if leases and leases[0].owner.user == user_name(MALLORY):
                break
            assert time.monotonic() < deadline, leases
            time.sleep(0.01)
        if mode == fcntl.LOCK_SH:
            assert ledger.claim(ledger.enqueue(Request(1), devices("A"), OWNER)) is not None


@pytest.mark.root
def test_a_rank_is_the_readers_to_honour(queue, start):
    urgent = TicketRecord(Demand(Request(1, priority=9), (Candidate("A"),)), 1, "urgent", 0.0, HERE)

    def forge(user: int, sequence: int) -> TicketName:
        name = TicketName(9, sequence, f"{user:032x}", 0)
        start(user, lambda: write(queue / str(name), urgent.encode(name.id), lock=fcntl.LOCK_EX))
        return name

    with acting_as(ADA), FileLedger(queue.parent) as ledger:
        ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
        late = forge(MALLORY, 500)
        view = ledger.snapshot()
        assert [(one.id, one.priority) for one in view.tickets] == [(ticket.id, 0), (late.id, 0)]
        roots = forge(0, 501)
        view = ledger.snapshot()
        assert [(one.id, one.priority) for one in view.tickets] == [(roots.id, 9), (ticket.id, 0), (late.id, 0)]
        assert ledger.claim(ticket) is None


@pytest.mark.root
def test_an_impossible_sequence_moves_nobodys_place(queue, start):
    name = TicketName(0, 10**12 - 2, ID, 0)
    start(MALLORY, lambda: write(queue / str(name), TICKET.encode(ID), lock=fcntl.LOCK_EX))
    with acting_as(ADA), FileLedger(queue.parent) as ledger:
        first, second = (ledger.enqueue(Request(1), devices("A"), OWNER) for _ in range(2))
        assert [(one.id, one.sequence) for one in ledger.snapshot().tickets] == [(first.id, 1), (second.id, 2)]


@pytest.mark.root
@pytest.mark.usefixtures("protected")
def test_many_links_to_one_large_file_cost_neither_memory_nor_a_place(queue, start):
    content = changed(TICKET, candidates=[[f"{n}", None, False] for n in range(4000)], command="x" * 300_000)

    def attack() -> int:
        descriptor = write(queue / FIRST, content, lock=fcntl.LOCK_EX)
        for number in range(30):
            for name in (str(TicketName(0, 2, f"{number:032x}", 0)), f"lease-{number:032x}"):
                os.link(queue / FIRST, queue / name)
        return descriptor

    start(MALLORY, attack)
    tracemalloc.start()
    try:
        assert gets(queue)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.root
@pytest.mark.parametrize("form", ["lease-{0}", "ticket-500000-{1:012}-{0}-000000", "ticket-000009-{1:012}-{0}-000000"])
def test_beyond_a_limit_a_users_entries_do_not_count_and_others_do(queue, start, form, monkeypatch):
    monkeypatch.setattr(scan, "MAX_ENTRIES", 20)

    def attack() -> list[int]:
        return [write(queue / form.format(uuid.uuid4().hex, n), b"x") for n in range(200)]

    ada = start(ADA, lambda: hold(queue))
    start(MALLORY, attack)
    looked: list[str] = []
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: looked.append(str(path)) or opened(path, *rest, **more))
    with acting_as(GRACE), FileLedger(queue.parent) as ledger:
        ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
        assert ledger.claim(ticket) is None
        assert [lease.owner.user for lease in ledger.snapshot().leases] == [user_name(ADA)]
        assert ledger.snapshot().excessive == (user_name(MALLORY),)
        assert len([path for path in looked if path.startswith(("lease", "ticket"))]) < 60
        ada.kill()
        assert ledger.claim(ticket) is not None


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("form", ["lease-{0}", "ticket-500000-{1:012}-{0}-000000", ".new-{0}", "junk-{0}"])
def test_100000_entries_of_one_user_delay_others_by_less_than_a_second(queue, start, form):
    def attack() -> None:
        directory = os.open(queue, os.O_RDONLY)
        for number in range(100_000):
            name = form.format(f"{number:032x}", number)
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=directory))

    start(MALLORY, attack)
    with acting_as(ADA), FileLedger(queue.parent) as ledger:
        before = time.process_time()  # the machine may be busy
        ledger.enqueue(Request(1), devices("A"), OWNER)
        assert time.process_time() - before < 1


# Decoding.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FIELDS = sorted({*json.loads(TICKET.encode(ID)), *json.loads(LEASE.encode(ID))})


@given(st.binary(max_size=2000), st.sampled_from(sorted(NAMES.values())))
def test_no_content_makes_decoding_fail(content, name):
    assert decode(name, content) is None


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_decoded_can_be_encoded_and_is_within_limits(fields, lease):
    name, record = (f"lease-{ID}", LEASE) if lease else (FIRST, TICKET)
    found = decode(name, changed(record, **fields))
    if found is not None:
        assert decode(name, found.encode(ID)) == found
        assert len(found.encode(ID)) <= MAX_ENTRY_BYTES


@given(st.sampled_from(["[", '{"a":', "9", '"', "\\ud800", "1e9"]), st.integers(1, 200_000))
@settings(max_examples=50, deadline=5000)
def test_repeated_fragments_are_decoded_in_bounded_time(fragment, times):
    assert decode(FIRST, (fragment * times).encode()) is None


@given(st.text(max_size=60))
def test_no_name_makes_parsing_fail(text):
    name = TicketName.parse(text)
    assert name is None or str(name) == text


@given(st.integers(0, 10**6 - 1), st.integers(0, 10**12 - 1), st.integers(0, 10**6 - 1))
def test_a_tickets_name_has_a_possible_rank(rank, sequence, edition):
    name = TicketName.parse(f"ticket-{rank:06}-{sequence:012}-{ID}-{edition:06}")
    assert (name is None) == (rank == 0)
    assert name is None or str(name) == f"ticket-{rank:06}-{sequence:012}-{ID}-{edition:06}"
