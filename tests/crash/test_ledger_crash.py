"""Real processes on one pool directory, killed at every point, and the world asserted afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_launcher.boot import Origin
from gpu_launcher.leases import FileLedger, mutex, resolve_pool_directory
from gpu_launcher.leases.file_format import LeaseRecord, TicketName, TicketRecord, decode
from gpu_launcher.leases.grant_policy import Candidate, Demand
from gpu_launcher.model import WHOLE, Device, DeviceKind, Owner, Request, Share
from gpu_launcher.text import one_line
from gpu_launcher.users import user_name
from tests.security.accounts import protections
from tests.waiting import until
from tests.warm import Warm

# One process with a ledger, told what to do line by line. `die` is the step at which it kills itself.
PROGRAM = """
import json, os, signal, sys, time
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from gpu_launcher.model import Device, DeviceKind, Owner, Request

settings = json.loads(sys.argv[1])
os.umask(settings["umask"])
if settings["user"]:
    os.setgroups([])
    os.setgid(settings["user"])
    os.setuid(settings["user"])
visited = []

def checkpoint(step):
    visited.append(step)
    if step == settings["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == settings["stop"]:
        os.kill(os.getpid(), signal.SIGSTOP)

directory = resolve_pool_directory(settings["directory"])
ledger = FileLedger(directory, checkpoint=checkpoint)
owner = Owner(os.getpid(), str(os.getuid()), "test")
tickets, leases = {}, {}
print("ready", flush=True)
for line in sys.stdin:
    order, name, *rest = json.loads(line)
    answer = None
    if order == "enqueue":
        devices = [Device(uuid, 0, "simulated", DeviceKind.SIMULATED) for uuid in rest[1]]
        tickets[name] = ledger.enqueue(Request.of(rest[0]), devices, owner)
    elif order == "claim":
        lease = ledger.claim(tickets[name], *rest)
        if lease:
            leases[name] = lease
            answer = lease.uuids
    elif order == "release":
        ledger.release(leases[name])
    elif order == "cancel":
        ledger.cancel(tickets[name])
    elif order == "close":
        ledger.close()
    elif order == "visited":
        answer = visited
    elif order in ("job", "server"):
        answer = os.fork()
        if not answer:
            os.close(0), os.close(1), os.close(2)
            if order == "server":
                ledger.close_in_child()
            time.sleep(60)
            os._exit(0)
    print(json.dumps(answer), flush=True)
"""

STEPS = [
    *(f"enqueue: {step}" for step in ("created", "locked", "written", "published")),
    *(f"claim: {step}" for step in ("created", "locked", "written", "linked", "published")),
    "claim: old edition removed",
    *("claim: ticket removed", "claim: ticket closed", "cancel: ticket removed", "cancel: ticket closed"),
    *("release: closed", "release: name removed"),
]


class Died(Exception):
    pass


class Process:
    def __init__(
        self, warm: Warm, directory: Path, die: str = "", stop: str = "", umask: int = 0o022, user: int = 0
    ) -> None:
        settings = {"directory": str(directory), "die": die, "stop": stop, "umask": umask, "user": user}
        script = directory.parent / "program.py"
        script.write_text(PROGRAM)
        orders, told = os.pipe()
        heard, answers = os.pipe()
        self._process = warm.start(
            [str(script), json.dumps(settings)], os.environ, stdin=orders, stdout=answers, stderr=2
        )
        os.close(orders)
        os.close(answers)
        self._stdin, self._stdout = open(told, "w"), open(heard)
        self.started = self._stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        return self._process.pid

    def __call__(self, order: str, name: str = "", *rest: object) -> object:
        self.send(order, name, *rest)
        return self.answer()

    def send(self, order: str, name: str = "", *rest: object) -> None:
        try:
            self._stdin.write(json.dumps([order, name, *rest]) + "\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise Died from None

    def answer(self) -> object:
        answer = self._stdout.readline()
        if not answer:
            raise Died
        return json.loads(answer)

    def kill(self) -> int:
        """Return how it ended."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        return self._process.wait()


Start = Callable[..., Process]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return resolve_pool_directory(str(tmp_path / "pool"))


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """Forks programs that have imported the ledger."""
    warm = Warm(["gpu_launcher.leases"], os.environ)
    yield warm
    warm.close()


@pytest.fixture
def start(directory: Path, warm: Warm) -> Iterator[Start]:
    processes: list[Process] = []

    def begin(where: Path = directory, **settings: object) -> Process:
        processes.append(Process(warm, where, **settings))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()


@pytest.fixture
def ledger(directory: Path) -> Iterator[FileLedger]:
    with FileLedger(directory) as ledger:
        yield ledger


OWNER = Owner(pid=os.getpid(), user="ada", command="test")


def devices(uuids: str) -> list[Device]:
    return [Device(uuid, 0, "simulated", DeviceKind.SIMULATED) for uuid in uuids]


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "queue").iterdir())


def kill_job(pid: int) -> None:
    """It is not our child: its parent may be dead, so wait until it is gone, or a zombie of somebody else's."""
    os.kill(pid, signal.SIGKILL)

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    until(gone)


@pytest.mark.smoke
def test_the_devices_of_a_killed_process_are_free_at_once(start, ledger):
    holder = start()
    holder("enqueue", "1", 2, "AB")
    assert holder("claim", "1") == ["A", "B"]
    holder("enqueue", "2", 2, "AB")
    ticket = ledger.enqueue(Request(2), devices("AB"), OWNER)
    assert ledger.claim(ticket) is None
    assert holder.kill() == -signal.SIGKILL
    assert ledger.claim(ticket) is not None


@pytest.mark.smoke
def test_a_killed_process_wakes_those_who_wait(start, ledger):
    holder = start()
    holder("enqueue", "1", 1, "A")
    holder("claim", "1")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    ledger.drain()
    for _ in range(10):
        assert ledger.claim(ticket) is None
    assert ledger.poll_interval == 0.25
    assert not select.select([ledger], [], [], 0)[0]
    holder.kill()
    assert select.select([ledger], [], [], 100)[0]
    ledger.drain()
    assert ledger.poll_interval < 0.01
    assert ledger.claim(ticket) is not None


@pytest.mark.smoke
def test_a_job_keeps_its_devices_after_its_launcher_was_killed_until_it_ends(start, ledger):
    launcher = start()
    launcher("enqueue", "1", 1, "AB")
    assert launcher("claim", "1") == ["A"]
    job = launcher("job")
    launcher.kill()
    ticket = ledger.enqueue(Request(2), devices("AB"), OWNER)
    assert ledger.claim(ticket) is None
    assert [view.uuids for view in ledger.snapshot().leases] == [("A",)]
    ledger.drain()
    kill_job(job)
    assert select.select([ledger], [], [], 100)[0]
    assert ledger.claim(ticket) is not None


def test_releasing_while_the_job_lives_keeps_the_devices_leased(start, ledger):
    launcher = start()
    launcher("enqueue", "1", 1, "A")
    launcher("claim", "1")
    job = launcher("job")
    launcher("release", "1")
    launcher("close")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    assert ledger.claim(ticket) is None
    kill_job(job)
    assert ledger.claim(ticket) is not None


def test_a_forked_server_that_outlives_its_launcher_keeps_nothing_alive(start, ledger):
    launcher = start()
    launcher("enqueue", "1", 1, "A")
    launcher("claim", "1")
    launcher("enqueue", "2", 1, "A")
    server = launcher("server")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    assert ledger.claim(ticket) is None
    launcher.kill()
    until(lambda: not ledger.snapshot().leases)
    assert ledger.claim(ticket) is not None
    kill_job(server)


def test_in_a_forked_child_a_ledger_refuses_to_work_and_closing_it_harms_nobody(ledger, directory):
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    child = subprocess.run(
        [sys.executable, "-c", FORKED, str(directory)], capture_output=True, text=True, timeout=500, check=False
    )
    assert child.stdout == "refused\nstill waiting, still leased\n", child.stderr
    assert ledger.claim(ticket) is not None


FORKED = """
import os, sys
from pathlib import Path
from gpu_launcher.leases import FileLedger
from gpu_launcher.model import Device, DeviceKind, Owner, Request
ledger = FileLedger(Path(sys.argv[1]))
device = [Device("B", 0, "", DeviceKind.CPU)]
lease = ledger.claim(ledger.enqueue(Request(1), device, Owner(1, "", "")))
ticket = ledger.enqueue(Request(1), device, Owner(1, "", ""))
if not os.fork():
    try:
        ledger.snapshot()
    except RuntimeError:
        print("refused", flush=True)
    ledger.close()
    os._exit(0)
os.wait()
view = ledger.snapshot()
if ticket.id in [t.id for t in view.tickets] and [v.id for v in view.leases] == [lease.id]:
    print("still waiting, still leased")
"""


def go_through_every_step(process: Process) -> None:
    process("enqueue", "given up", 1, "AB")
    process("cancel", "given up")
    process("enqueue", "1", 2, "EF")
    process("claim", "1", "E")
    process("claim", "1")
    process("release", "1")


@pytest.mark.parametrize("die", STEPS)
@pytest.mark.smoke
def test_a_process_killed_at_any_step_leaves_a_working_pool(start, ledger, directory, die):
    """One that waits behind the victim, one that holds devices beside it, and one that comes afterwards."""
    bystander = start()
    bystander("enqueue", "1", 1, "D")
    assert bystander("claim", "1") == ["D"]
    bystander("enqueue", "2", 4, "ABCD")
    victim = start(die=die)
    with pytest.raises(Died):
        go_through_every_step(victim)
    assert victim.kill() == -signal.SIGKILL
    assert bystander("claim", "2") is None
    ticket = ledger.enqueue(Request(2), devices("EF"), OWNER)
    assert ledger.claim(ticket).uuids == ("E", "F")
    assert [view.uuids for view in ledger.snapshot().leases] == [("D",), ("E", "F")]
    bystander("release", "1")
    assert bystander("claim", "2") == list("ABCD")
    bystander("close")
    ledger.close()
    assert files(directory) == []


def test_every_step_there_is_was_tried(start):
    process = start()
    go_through_every_step(process)
    assert set(process("visited")) == set(STEPS)


def test_a_job_that_was_handed_its_lease_keeps_it_when_its_launcher_dies_in_release(start, ledger):
    launcher = start(die="release: closed")
    launcher("enqueue", "1", 1, "A")
    launcher("claim", "1")
    job = launcher("job")
    with pytest.raises(Died):
        launcher("release", "1")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    assert ledger.claim(ticket) is None
    kill_job(job)
    assert ledger.claim(ticket) is not None


def test_processes_are_served_in_the_order_in_which_they_came(start):
    processes = [start() for _ in range(4)]
    for process in processes:
        process("enqueue", "1", 2, "AB")
    for turn, process in enumerate(processes):
        for later in processes[turn + 1 :]:
            assert later("claim", "1") is None
        assert process("claim", "1") == ["A", "B"]
        process("release", "1")


# Takes and gives back devices, a dot for each time, until told to stop. The witness is a POSIX record lock on one byte
# per device: those vanish in close(2) itself, so before the lease's lock when a process is killed.
HAMMER = """
import fcntl, os, random, select, sys, time
from pathlib import Path
from gpu_launcher.leases import FileLedger
from gpu_launcher.model import Device, DeviceKind, Owner, Request

directory, chance = Path(sys.argv[1]), random.Random(sys.argv[2])
pool = [Device(str(n), n, "simulated", DeviceKind.SIMULATED) for n in range(6)]
mine = pool[chance.randrange(3):]
ledger = FileLedger(directory / "pool")
witness = os.open(directory / "witness", os.O_RDWR)
while not (directory / "stop").exists():
    count = chance.choice([1, 1, 2, 3])
    ticket = ledger.enqueue(Request(count), chance.sample(mine, len(mine)), Owner(os.getpid(), "", ""))
    if chance.random() < 0.05:
        ledger.cancel(ticket)
        continue
    while (lease := ledger.claim(ticket)) is None:
        if select.select([ledger], [], [], ledger.poll_interval)[0]:
            ledger.drain()
    for uuid in lease.uuids:
        try:
            fcntl.lockf(witness, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(uuid))
        except OSError:
            os.write(2, f"device {uuid} is held twice\\n".encode())
            os._exit(3)
    assert len(set(lease.uuids)) == count
    time.sleep(chance.random() * 0.004)
    for uuid in lease.uuids:
        fcntl.lockf(witness, fcntl.LOCK_UN, 1, int(uuid))
    ledger.release(lease)
    os.write(1, b".")
ledger.close()
"""


@pytest.mark.parametrize("killing", [False, True], ids=["in peace", "under fire"])
def test_eight_processes_at_once_all_get_on_and_never_hold_a_device_twice(tmp_path, killing):
    resolve_pool_directory(str(tmp_path / "pool"))
    (tmp_path / "witness").touch()
    chance = random.Random()

    def hammer() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HAMMER, str(tmp_path), str(chance.random())]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    running = [hammer() for _ in range(8)]
    ended = []
    try:
        for _ in range(16 if killing else 0):
            victim = running.pop(chance.randrange(8))
            os.read(victim.stdout.fileno(), 1)
            time.sleep(chance.random() * 0.02)
            victim.kill()
            ended.append(victim)
            running.append(hammer())
        for process in running:
            for _ in range(20):
                os.read(process.stdout.fileno(), 1)
    finally:
        (tmp_path / "stop").touch()
    for process in ended + running:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == (-signal.SIGKILL if process in ended else 0), errors
        assert errors == b""
    with FileLedger(tmp_path / "pool") as ledger:
        view = ledger.snapshot()
        assert (view.tickets, view.leases) == ((), ())
    assert files(tmp_path / "pool") == []


# Files that are lost, broken, or not ours.


def test_one_lost_file_of_a_live_lease_frees_nothing(start, ledger, directory):
    for prefix in ("lease-", "twin-"):
        holder = start()
        holder("enqueue", "1", 1, "A")
        holder("claim", "1")
        (name,) = [name for name in files(directory) if name.startswith(prefix)]
        (directory / "queue" / name).unlink()
        ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
        assert ledger.claim(ticket) is None
        holder("release", "1")
        ledger.release(ledger.claim(ticket))


def test_a_process_knows_its_own_leases_though_all_their_files_are_lost(ledger, directory):
    ledger.claim(ledger.enqueue(Request(1), devices("A"), OWNER))
    for name in files(directory):
        (directory / "queue" / name).unlink()
    assert ledger.claim(ledger.enqueue(Request(1), devices("A"), OWNER)) is None


def test_a_ticket_whose_file_is_lost_keeps_its_place(start, ledger, directory):
    holder, other = start(), start()
    holder("enqueue", "1", 1, "A")
    holder("claim", "1")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    other("enqueue", "1", 1, "A")
    for name in files(directory):
        if ticket.id in name:
            (directory / "queue" / name).unlink()
    assert ledger.claim(ticket) is None
    holder("release", "1")
    assert other("claim", "1") is None
    assert ledger.claim(ticket) is not None


def locked(path: Path, content: bytes) -> int:
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


HERE = Origin.here()
LEASE = LeaseRecord({"A": WHOLE}, 0.0, None, os.getpid(), "train.py", 0.0, HERE)
TICKET = TicketRecord(Demand(Request(1), (Candidate("A"),)), os.getpid(), "train.py", 0.0, HERE)
ID = "0" * 32


def changed(record: LeaseRecord | TicketRecord, **fields: object) -> bytes:
    return json.dumps({**json.loads(record.encode(ID)), **fields}).encode()


UNREADABLE = [b"", b"\xff\x00", b"[]", b"{}", b"[" * 100_000, b'{"format": 2}', changed(LEASE, format=4)]
UNREADABLE += [changed(LEASE, shares=value) for value in ([], [["A", 0, 7]], [["A", 2_000_000, 0]], [["A", 1]], None)]
UNREADABLE += [changed(LEASE, **{name: None}) for name in ("pid", "started", "boot", "since", "id")]
UNREADABLE += [changed(TICKET, count=0), changed(TICKET, candidates=[["A", -1, False]]), changed(TICKET, share=[0, 0])]


@pytest.mark.parametrize("content", UNREADABLE, ids=lambda content: repr(content[:60]))
def test_a_locked_lease_that_cannot_be_read_holds_everything_until_it_ends(ledger, directory, content):
    holder = locked(directory / "queue" / f"lease-{'0' * 32}", content)
    ticket = ledger.enqueue(Request(1), devices("XYZ"), OWNER)
    assert ledger.claim(ticket) is None
    assert [view.uuids for view in ledger.snapshot().leases] == [None]
    os.close(holder)
    assert ledger.claim(ticket) is not None


@pytest.mark.parametrize("content", UNREADABLE, ids=lambda content: repr(content[:60]))
def test_a_locked_ticket_that_cannot_be_read_holds_nobody_up_and_is_named(ledger, directory, content):
    before = ledger.enqueue(Request(1), devices("A"), OWNER)
    name = str(TicketName(0, 2, ID, 0))
    waiting = locked(directory / "queue" / name, content)
    behind = ledger.enqueue(Request(1), devices("A"), OWNER)
    view = ledger.snapshot()
    assert [view.id for view in view.tickets] == [before.id, behind.id]
    assert [(one.name, one.user, one.lease) for one in view.unreadable] == [(name, user_name(os.geteuid()), False)]
    ledger.release(ledger.claim(before))
    assert ledger.claim(behind) is not None
    os.close(waiting)


def test_whatever_else_lies_in_the_queue_directory_is_passed_by(ledger, directory):
    queue = directory / "queue"
    ids = [f"{n:032x}" for n in range(10)]
    os.mkfifo(queue / f"lease-{ids[0]}")
    os.mkfifo(queue / str(TicketName(0, 1, ids[1], 0)))
    (queue / f"lease-{ids[2]}").mkdir()
    (queue / f"twin-{ids[3]}").symlink_to("/etc/passwd")
    (queue / f"lease-{ids[4]}").symlink_to("nowhere")
    (queue / ".new-x").touch()
    (queue / "README").write_text("hello")
    (queue / f"ticket-500000-{'9' * 30}-{ids[5]}-000000").touch()
    foreign = files(directory)
    stale = [f"lease-{ids[6]}", f"twin-{ids[7]}", str(TicketName(0, 10**12 - 1, ids[8], 7)), f".new-{ids[9]}"]
    for name in stale:
        (queue / name).write_bytes(b"garbage")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    assert [view.sequence for view in ledger.snapshot().tickets] == [1]
    assert ledger.claim(ticket) is not None
    left = [name for name in files(directory) if "garbage" not in name]
    assert set(foreign) <= set(left)
    assert not set(stale) & set(left)
    ledger.close()
    assert files(directory) == foreign


ODD = (1, 'ä\udcff x="{\\n', 1.5)
FULL = Request(2, Share(250_000, 20 << 30), priority=-3, timeout=90.5, stagger=5.0)
CANDIDATES = (Candidate("GPU-1", 80 << 30, exclusive=True), Candidate("MIG-GPU-2/1/0", None))
RECORDS = [
    TicketRecord(Demand(FULL, CANDIDATES, frozenset({"GPU-1"})), *ODD, HERE),
    LeaseRecord({"GPU-1": Share(1, 5), "MIG-GPU-2/1/0": WHOLE}, 12.5, 90.5, *ODD, Origin("", "elsewhere")),
    LEASE,
    TICKET,
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_is_read_back_as_it_was_written(record):
    priority = record.demand.request.priority if isinstance(record, TicketRecord) else 0
    name = str(TicketName(priority, 5, ID, 0)) if isinstance(record, TicketRecord) else f"twin-{ID}"
    assert decode(name, record.encode(ID)) == replace(record, command=one_line(record.command))
    assert decode(name, record.encode("1" * 32)) is None


def test_tickets_sorted_by_name_are_in_queue_order():
    places = [(499_999, 7), (3, 1), (3, 999_999_999_999), (0, 5), (-1, 1), (-499_999, 1)]
    names = [TicketName(priority, sequence, "a" * 32, 0) for priority, sequence in places]
    assert sorted(map(str, names)) == list(map(str, names))
    assert [TicketName.parse(str(name)) for name in names] == names


# Other boots, other machines.

EARLIER = Origin("an earlier boot", HERE.machine)
OTHER = Origin("another machine's boot", "another machine")


def test_what_a_restart_left_behind_is_removed(ledger, directory):
    left = [f"lease-{'1' * 32}", f"twin-{'1' * 32}", str(TicketName(0, 1, "2" * 32, 0))]
    for name in left:
        (directory / "queue" / name).write_bytes(replace(LEASE, origin=EARLIER).encode("1" * 32))
    ledger.release(ledger.claim(ledger.enqueue(Request(1), devices("A"), OWNER)))
    assert files(directory) == []


def test_what_another_machine_writes_into_the_directory_is_left_alone_and_named(ledger, directory):
    theirs = {f"lease-{'1' * 32}": LEASE, str(TicketName(0, 1, "2" * 32, 0)): TICKET}
    for name, record in theirs.items():
        id = "1" * 32 if record is LEASE else "2" * 32
        (directory / "queue" / name).write_bytes(replace(record, origin=OTHER).encode(id))
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    view = ledger.snapshot()
    assert (view.leases, [one.id for one in view.tickets]) == ((), [ticket.id])
    assert view.elsewhere == ("another machine",)
    ledger.release(ledger.claim(ticket))
    assert files(directory) == sorted(theirs)


def test_a_container_with_a_host_name_of_its_own_is_no_other_machine(ledger, directory):
    (directory / "queue" / f"lease-{'1' * 32}").write_bytes(
        replace(LEASE, origin=Origin(HERE.boot, "container")).encode("1" * 32)
    )
    assert ledger.snapshot().elsewhere == ()
    assert files(directory) == []


def test_a_declared_end_of_another_boot_lets_nobody_pass(directory):
    """The clocks of two boots cannot be compared, so a job that lives through it all may end at any moment."""
    for origin, passes in ((HERE, True), (EARLIER, False)):
        name = directory / "queue" / f"lease-{'1' * 32}"
        holder = locked(name, replace(LEASE, started=100.0, timeout=50.0, origin=origin).encode("1" * 32))
        with FileLedger(directory, clock=lambda: 110.0) as ledger:
            ledger.enqueue(Request(2), devices("AB"), OWNER)
            short = ledger.enqueue(Request(1, timeout=40.0), devices("B"), OWNER)
            assert (ledger.claim(short) is not None) is passes
            assert [view.left for view in ledger.snapshot().leases if view.id == "1" * 32] == (
                [40.0] if passes else [None]
            )
        os.close(holder)


# A mutex that is not given back.


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_who_keeps_the_mutex_is_named_and_nobody_hangs(start, directory, monkeypatch):
    monkeypatch.setattr(mutex, "NAMED_AFTER_SECONDS", math.inf)
    said: list[str] = []
    ledger = FileLedger(directory, warn=said.append)
    held = ledger.claim(ledger.enqueue(Request(1), devices("B"), OWNER))
    waiting = ledger.enqueue(Request(1), devices("C"), OWNER)
    given_up = ledger.enqueue(Request(1), devices("C"), OWNER)
    stopped = start(stop="claim: locked")
    stopped("enqueue", "1", 1, "A")
    stopped.send("claim", "1")
    until(lambda: state_of(stopped.pid) == "T")

    late = ledger.enqueue(Request(1), devices("B"), OWNER)
    assert ledger.claim(waiting) is None
    ledger.cancel(given_up)
    ledger.release(held)
    assert {view.owner.pid for view in ledger.snapshot().tickets} == {OWNER.pid, stopped.pid}
    assert said == []
    monkeypatch.setattr(mutex, "NAMED_AFTER_SECONDS", 0.5)
    until(lambda: ledger.claim(waiting) or said)
    assert ledger.claim(late) is None
    (sentence,) = said
    assert f"process {stopped.pid} (" in sentence
    assert "which is stopped" in sentence
    assert f"kill -CONT {stopped.pid}" in sentence

    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.answer() == ["A"]
    assert ledger.claim(late).uuids == ("B",)
    assert ledger.claim(waiting).uuids == ("C",)
    ledger.close()


def test_a_mutex_whose_stopped_holder_is_killed_is_free(start, ledger):
    stopped = start(stop="enqueue: written")
    stopped.send("enqueue", "1", 1, "A")
    until(lambda: state_of(stopped.pid) == "T")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    assert ledger.claim(ticket) is None
    stopped.kill()
    assert ledger.claim(ticket) is not None


def test_a_process_that_waits_in_vain_does_not_touch_the_mutex(start, ledger, directory, monkeypatch):
    monkeypatch.setattr(mutex, "LOCK_SECONDS", 600)  # longer than a test may take
    holder = start()
    holder("enqueue", "1", 1, "A")
    holder("claim", "1")
    ticket = ledger.enqueue(Request(1), devices("A"), OWNER)
    descriptor = os.open(directory / "queue", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for _ in range(20):
        assert ledger.claim(ticket) is None
    os.close(descriptor)


LOCKS = """\
1: POSIX  ADVISORY  WRITE 11 00:31:7 0 EOF
2: FLOCK  ADVISORY  READ  12 {device} 0 EOF
3: FLOCK  ADVISORY  WRITE 13 ff:ff:{inode} 0 EOF
3: -> FLOCK  ADVISORY  WRITE 14 {device} 0 EOF
4: FLOCK  ADVISORY  WRITE {pid} {device} 0 EOF
"""


@pytest.mark.parametrize(
    ("device", "pid", "found"),
    [
        ("{major:02x}:{minor:02x}:{inode}", 999_999_999, [12, 999_999_999]),
        ("fe:dc:1", 0, [13]),
        ("fe:dc:{inode}", 15, [12, 13, 15]),
    ],
    ids=["by device and inode", "by inode alone", "all that match"],
)
def test_who_took_the_mutex_is_found_in_proc_locks(tmp_path, device, pid, found):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    status = os.fstat(descriptor)
    numbers = {"major": os.major(status.st_dev), "minor": os.minor(status.st_dev), "inode": status.st_ino}
    text = LOCKS.format(device=device.format(**numbers), pid=pid, inode=status.st_ino)
    (tmp_path / "locks").write_text(text)
    assert [process.pid for process in mutex.blame(descriptor, tmp_path / "locks").takers] == found
    assert mutex.blame(descriptor, tmp_path / "none").takers == ()
    os.close(descriptor)


# Several users.


@pytest.fixture
def common(start) -> Iterator[Path]:
    """A pool directory that other users can reach, which those of pytest's are not."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as several users")
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        yield resolve_pool_directory(str(Path(parent) / "pool"))


@pytest.fixture(params=[False, True], ids=["unprotected", "protected"])
def protected_regular(request: pytest.FixtureRequest) -> Iterator[None]:
    """With fs.protected_regular, O_CREAT fails on another user's file in a sticky directory, even for root."""
    if os.geteuid() != 0:
        pytest.skip("only root can set fs.protected_*")
    with protections(request.param) as problem:
        if problem:
            pytest.skip(f"fs.protected_* {problem}")
        yield


@pytest.mark.root
@pytest.mark.usefixtures("protected_regular")
@pytest.mark.parametrize("umasks", [(0o077, 0o000), (0o000, 0o077), (0o777, 0o777)])
def test_users_with_any_umask_share_one_pool(start, common, umasks):
    ada = start(common, umask=umasks[0], user=60001)
    grace = start(common, umask=umasks[1], user=60002)
    ada("enqueue", "1", 2, "AB")
    assert ada("claim", "1") == ["A", "B"]
    grace("enqueue", "1", 1, "AB")
    assert grace("claim", "1") is None
    assert {path.stat().st_mode & 0o7777 for path in (common / "queue").iterdir()} == {0o644}
    ada("enqueue", "2", 2, "AB")
    ada("release", "1")
    assert grace("claim", "1") == ["A"]
    assert ada("claim", "2") is None
    grace("release", "1")
    assert ada("claim", "2") == ["A", "B"]


@pytest.mark.root
@pytest.mark.usefixtures("protected_regular")
def test_what_a_dead_process_of_another_user_left_blocks_nobody_and_goes_when_its_user_returns(start, common):
    for path in (common, common / "queue"):
        os.chown(path, 60003, 60003)
    ada = start(common, user=60001)
    grace = start(common, user=60002)
    ada("enqueue", "1", 1, "A")
    ada("claim", "1")
    ada("enqueue", "2", 1, "A")
    grace("enqueue", "1", 1, "A")
    assert grace("claim", "1") is None
    ada.kill()
    assert grace("claim", "1") == ["A"]
    assert len(files(common)) == 3 + 2
    grace("release", "1")
    assert len(files(common)) == 3
    again = start(common, user=60001)
    again("enqueue", "1", 1, "A")
    again("cancel", "1")
    assert files(common) == []


@pytest.mark.root
def test_a_lease_that_this_user_may_not_open_holds_everything(start, common):
    ada = start(common, user=60001)
    grace = start(common, user=60002)
    ada("enqueue", "1", 1, "A")
    ada("claim", "1")
    for path in (common / "queue").iterdir():
        path.chmod(0)
    grace("enqueue", "1", 1, "B")
    assert grace("claim", "1") is None
    for path in (common / "queue").iterdir():
        path.chmod(0o644)
    assert grace("claim", "1") == ["B"]
