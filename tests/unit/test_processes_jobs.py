"""Jobs in processes of their own, started as the loop starts them: by a real fork server, in both ways."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.errors import OptionError, ServerDiedError
from gpu_launcher.model import Request
from gpu_launcher.processes import fork_server as server_module
from gpu_launcher.processes import supervisor as supervisor_module
from gpu_launcher.processes import tree as tree_module
from gpu_launcher.processes.fork_server_client import SUPERVISOR_DIED, ForkServer, JobProcess, Lost
from gpu_launcher.processes.job_output import MAX_EARLY_OUTPUT
from gpu_launcher.processes.messages import (
    ChannelClosedError,
    Grant,
    JobExited,
    JobPrepared,
    LogFile,
    Report,
    ResultLost,
    receive,
    send,
)
from tests.waiting import alive, until

PATIENCE = 60.0
"""Seconds until a test gives up on what should happen at once."""


def report(value: object = None) -> Report:
    """What the programs of these tests return. In spawn mode they and all they use travel by value."""
    return Report(True, None, pickle.dumps(value))


@dataclass
class Started:
    """A job's process, and what has been heard from it."""

    process: JobProcess
    result: Path
    log: Path

    def say(self, source: str) -> Any:
        end = getattr(self.process, source)
        assert select.select([end], [], [], PATIENCE)[0], f"{source} says nothing"
        return receive(end)[0]

    def prepared(self) -> JobPrepared:
        message = self.say("job")
        assert isinstance(message, JobPrepared), message
        if message.log is not None:
            send(self.process.job, LogFile(message.log))
        return message

    def exited(self) -> JobExited:
        message = self.say("supervisor")
        assert isinstance(message, JobExited), message
        return message

    def run(self, environment: dict[str, str] | None = None, lease: tuple[int, ...] = ()) -> JobExited:
        self.prepared()
        self.process.grant(Grant(environment or {}), lease)
        return self.exited()

    def report(self) -> Report:
        return Report.load(self.result.read_bytes())

    def value(self) -> Any:
        written = self.report()
        assert written.ok, written
        return pickle.loads(written.payload)


def fork_server() -> psutil.Process:
    """The only child of this process is the guard, and its only child the fork server."""
    (guard,) = psutil.Process().children()
    (server,) = guard.children()
    return server


def supervisors() -> list[psutil.Process]:
    return fork_server().children()


class Launch:
    """A launching program."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._servers: list[ForkServer] = []
        self._jobs: list[Started] = []

    def server(self, program: Callable[..., Report], method: str = "fork") -> ForkServer:
        server = ForkServer(program, method)  # type: ignore[arg-type]
        self._servers.append(server)
        return server

    def start(self, server: ForkServer, number: int = 0, spec: object = None) -> Started:
        log = self._directory / f"{number}.log"
        result = self._directory / f"{number}.result"
        started = Started(server.start(number, spec if spec is not None else str(log), result), result, log)
        self._jobs.append(started)
        return started

    def one(self, program: Callable[..., Report], method: str = "fork", **run: Any) -> tuple[Started, JobExited]:
        started = self.start(self.server(program, method))
        return started, started.run(**run)

    def close(self) -> None:
        for job in self._jobs:
            job.process.close()
        for server in self._servers:
            server.close()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    before = psutil.Process().children(recursive=True)
    launch = Launch(tmp_path)
    yield launch
    launch.close()
    assert psutil.Process().children(recursive=True) == before


@pytest.fixture(params=["fork", "spawn"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


# What a job is


def test_a_job_prepares_itself_waits_works_and_reports(launch, method):
    def program(number, spec, context):
        import os
        import pickle
        from pathlib import Path

        from gpu_launcher.model import Request
        from gpu_launcher.processes.messages import Report

        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        context.prepared(Request(2), Path(spec))
        context.wait()
        return Report(True, None, pickle.dumps((number, before, os.environ["CUDA_VISIBLE_DEVICES"])))

    job = launch.start(launch.server(program, method), 7)
    prepared = job.prepared()
    place = job.log.parent.stat()
    assert prepared == JobPrepared(Request(2), str(job.log), prepared.pid, None, (place.st_dev, place.st_ino))
    assert psutil.Process(prepared.pid).parent() in supervisors()
    assert not select.select([job.process.supervisor, job.process.job], [], [], 0.1)[0], "it waits"
    job.process.grant(Grant({"CUDA_VISIBLE_DEVICES": "1,3"}), ())
    assert job.exited() == JobExited(0)
    assert job.value() == (7, None, "1,3")


def test_waiting_again_points_the_job_at_its_devices_again(launch):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        os.environ["CUDA_VISIBLE_DEVICES"] = "changed"
        context.wait()
        return report(os.environ["CUDA_VISIBLE_DEVICES"])

    job, _ = launch.one(program, environment={"CUDA_VISIBLE_DEVICES": "2"})
    assert job.value() == "2"


def test_a_job_is_the_leader_of_a_session_of_its_own_and_has_no_terminal_input(launch):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        return report((os.getsid(0) == os.getpid(), str(Path("/proc/self/fd/0").readlink()), os.read(0, 1)))

    job, _ = launch.one(program)
    assert job.value() == (True, "/dev/null", b"")


def test_forked_jobs_have_what_the_program_has_without_pickling_anything(launch):
    lock = threading.Lock()
    module = types.ModuleType("not_on_disk")
    module.lock = lock

    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        return report(module.lock is lock)

    job, _ = launch.one(program)
    assert job.value() is True


# Where its output goes


def test_output_before_the_log_is_known_goes_to_the_log_first_and_a_log_is_continued(launch, method, tmp_path):
    def program(number, spec, context):
        import os
        import subprocess
        import sys
        from pathlib import Path

        from gpu_launcher.model import Request
        from gpu_launcher.processes.messages import Report

        print("early print")
        os.write(1, b"early write\n")
        subprocess.run(["echo", "early child"], check=True)
        print("early error", file=sys.stderr)
        sys.stdout.write("half a line, ")
        context.prepared(Request(1), Path(spec))
        context.wait()
        print("late print")
        subprocess.run(["echo", "late child"], check=True)
        sys.stderr.write("late error without an end of line")
        return Report(True, None, b"")

    (tmp_path / "0.log").write_text("of an earlier run\n")
    job, _ = launch.one(program, method)
    assert job.log.read_text().splitlines() == [
        "of an earlier run",
        "early print",
        "early write",
        "early child",
        "early error",
        "half a line, late print",
        "late child",
        "late error without an end of line",
    ]


def test_what_a_job_prints_that_dies_before_it_has_a_log_is_told_with_its_end(launch, method):
    def program(number, spec, context):
        import os

        print("x" * 5000)
        print("early")
        os.abort()

    job = launch.start(launch.server(program, method))
    exited = job.exited()
    assert os.waitstatus_to_exitcode(exited.status) == -signal.SIGABRT
    assert len(exited.printed) == MAX_EARLY_OUTPUT
    assert exited.printed.endswith(b"x\nearly\n")


def test_output_goes_to_the_log_also_where_the_program_had_replaced_its_streams(launch, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdout", io.StringIO("of the parent\n"))
    monkeypatch.setattr(sys, "stderr", None)

    def program(number, spec, context):
        context.prepared(Request(1), Path(spec))
        context.wait()
        print("to the log: ä \udcff")
        print("as well", file=sys.stderr)
        return report()

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    job, _ = launch.one(program)
    assert job.log.read_text() == "to the log: ä \\udcff\nas well\n"


def test_what_the_parent_had_not_flushed_is_not_written_by_its_jobs(launch, tmp_path):
    stream = (tmp_path / "unflushed").open("w")

    def program(number, spec, context):
        context.prepared(Request(1), Path(spec))
        context.wait()
        return report()

    sys.stdout.write("of the parent")
    job, _ = launch.one(program)
    assert job.log.read_text() == ""
    stream.close()


# How it ends


def test_what_the_program_raises_is_reported_and_printed(launch, method):
    def program(number, spec, context):
        from pathlib import Path

        from gpu_launcher.model import Request

        context.prepared(Request(1), Path(spec))
        raise ValueError("too large")

    job = launch.start(launch.server(program, method))
    job.prepared()
    assert os.waitstatus_to_exitcode(job.exited().status) == 1
    report = job.report()
    assert (report.ok, report.message, report.payload) == (False, "raised ValueError: too large", b"")
    assert report.origin.startswith(f"{__file__}:")
    assert "Traceback" in job.log.read_text()


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda: os._exit(3), 3),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), -signal.SIGUSR1),
    ],
    ids=["os._exit", "SIGKILL", "SIGUSR1"],
)
def test_a_job_that_ends_without_a_report_is_told_with_its_status(launch, end, status):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        end()

    job, exited = launch.one(program)
    assert os.waitstatus_to_exitcode(exited.status) == status
    assert not job.result.exists()


def test_a_job_may_end_before_it_is_prepared(launch, method):
    def program(number, spec, context):
        import os

        os._exit(4)

    job = launch.start(launch.server(program, method))
    assert os.waitstatus_to_exitcode(job.exited().status) == 4
    with pytest.raises(ChannelClosedError):
        job.process.grant(Grant({}), ())


def test_a_result_that_cannot_be_written_is_told_by_word(launch, tmp_path):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        Path(spec).rmdir()
        return report()

    directory = tmp_path / "removed"
    directory.mkdir()
    server = launch.server(program)
    process = server.start(0, str(directory), directory / "result")
    job = Started(process, directory / "result", tmp_path / "log")
    job.prepared()
    process.grant(Grant({}), ())
    lost = job.say("job")
    assert isinstance(lost, ResultLost)
    assert lost.problem == f"{directory}: No such file or directory"
    assert os.waitstatus_to_exitcode(job.exited().status) == 1
    process.close()


def test_a_full_disk_is_told_though_the_log_is_on_it_and_no_part_of_the_result_stays(launch, tmp_path):
    def program(number, spec, context):
        import resource

        context.prepared(Request(1), Path(spec))
        context.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # every write to a file fails, as on a full disk
        return report()

    job = launch.start(launch.server(program))
    job.prepared()
    job.process.grant(Grant({}), ())
    lost = job.say("job")
    assert lost == ResultLost(f"{job.result.parent}: {os.strerror(errno.EFBIG)}")
    assert os.waitstatus_to_exitcode(job.exited().status) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["0.log"]


def test_a_child_that_the_program_forked_cannot_report_in_its_place(launch):
    def program(number, spec, context):
        context.prepared(Request(1), Path(spec))
        context.wait()
        child = os.fork()
        if child == 0:
            raise SystemExit(3)
        return report(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    job, _ = launch.one(program)
    assert job.value() == 3
    assert job.log.read_text() == ""


def test_a_job_that_is_interrupted_while_it_waits_for_its_threads_still_runs_its_exit_handlers(launch):
    def program(number, spec, context):
        import atexit

        context.prepared(Request(1), Path(spec))
        context.wait()
        atexit.register(print, "exit handler")
        threading.Thread(target=lambda: (until(Path(spec + ".go").exists), os.kill(os.getpid(), signal.SIGINT))).start()
        return report()

    job = launch.start(launch.server(program))
    job.prepared()
    job.process.grant(Grant({}), ())
    until(job.result.exists)
    Path(f"{job.log}.go").touch()
    assert job.exited() == JobExited(0)
    assert "KeyboardInterrupt" in job.log.read_text()
    assert job.log.read_text().endswith("exit handler\n")


def test_a_job_that_is_interrupted_while_it_writes_its_report_leaves_it(launch):
    def program(number, spec, context):
        import atexit

        from gpu_launcher.processes import worker

        write = worker.write_whole

        def write_interrupted(path, data):
            os.kill(os.getpid(), signal.SIGINT)
            write(path, data)

        context.prepared(Request(1), Path(spec))
        context.wait()
        atexit.register(print, "exit handler")
        worker.write_whole = write_interrupted  # in the job's process only
        return report()

    job, exited = launch.one(program)
    assert exited == JobExited(0)
    assert job.result.exists()
    assert "KeyboardInterrupt" in job.log.read_text()
    assert job.log.read_text().endswith("exit handler\n")


def test_threads_that_are_not_daemons_are_waited_for_and_exit_handlers_are_run(launch):
    def program(number, spec, context):
        import atexit

        context.prepared(Request(1), Path(spec))
        context.wait()
        atexit.register(print, "exit handler")
        go = threading.Event()

        def late():
            go.wait()
            time.sleep(0.1)
            print("thread")

        threading.Thread(target=late).start()
        go.set()
        return report()

    job, exited = launch.one(program)
    assert exited == JobExited(0)
    assert job.log.read_text() == "thread\nexit handler\n"


def test_the_parents_exit_handlers_and_finalizers_are_the_parents_alone(launch, tmp_path):
    import atexit
    import tempfile

    witness = tmp_path / "handlers"
    witness.touch()

    def note(what: str) -> None:
        with witness.open("a") as file:
            file.write(f"{what} in {'the parent' if os.getpid() == me else 'a job'}\n")

    class Thing:
        pass

    me = os.getpid()
    thing = Thing()
    finalizer = weakref.finalize(thing, note, "finalizer")
    atexit.register(note, "exit handler")
    try:
        with tempfile.TemporaryDirectory() as scratch:

            def program(number, spec, context):
                context.prepared(Request(1), None)
                context.wait()
                mine = Thing()
                weakref.finalize(mine, note, "finalizer of its own")
                globals()["kept_until_the_end"] = mine
                return report(Path(scratch).is_dir())

            job, _ = launch.one(program)
            assert job.value() is True
            assert Path(scratch).is_dir()
        assert witness.read_text() == "finalizer of its own in a job\n"
    finally:
        atexit.unregister(note)
        finalizer.detach()


def test_a_job_can_use_multiprocessing_and_leaves_nothing_of_it(launch):
    def program(number, spec, context):
        import multiprocessing

        context.prepared(Request(1), None)
        context.wait()
        forking = multiprocessing.get_context("fork")
        queue = forking.Queue()
        children = [forking.Process(target=queue.put, args=(n,)) for n in range(3)]
        for child in children:
            child.start()
        values = sorted(queue.get() for _ in children)
        for child in children:
            child.join()
        return report(values)

    job, exited = launch.one(program)
    assert job.value() == [0, 1, 2]
    assert exited == JobExited(0)


# What comes from the parent, and what does not


def test_signal_handlers_are_those_that_the_program_had(launch):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        return report([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)])

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server = launch.server(program)
    finally:
        signal.signal(signal.SIGTERM, before)
    job = launch.start(server)
    job.run()
    assert job.value() == [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL]


def test_a_handler_that_python_does_not_know_becomes_the_default_one(launch, monkeypatch):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        return report()

    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda signum: None)
        server = launch.server(program)
    job = launch.start(server)
    assert os.waitstatus_to_exitcode(job.run().status) == -signal.SIGTERM


def test_a_job_is_interrupted_as_from_a_terminal_with_all_of_its_process_group(launch, method):
    def program(number, spec, context):
        import pickle
        import subprocess
        import time
        from pathlib import Path

        from gpu_launcher.model import Request
        from gpu_launcher.processes.messages import Report

        child = subprocess.Popen(["sleep", "60"])
        context.prepared(Request(1), None)
        context.wait()
        try:
            Path(spec).touch()
            time.sleep(60)
        except KeyboardInterrupt:
            return Report(True, None, pickle.dumps(child.wait()))

    job = launch.start(launch.server(program, method))
    job.prepared()
    job.process.grant(Grant({}), ())
    until(job.log.exists)
    job.process.signal(signal.SIGINT)
    assert job.exited() == JobExited(0)
    assert job.value() == -signal.SIGINT


def test_jobs_draw_different_random_numbers_from_numpy_unless_the_program_seeded_it(launch):
    numpy = pytest.importorskip("numpy")

    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        return report((numpy.random.rand(), random.random()))

    def draw() -> list[tuple[float, float]]:
        server = launch.server(program)
        jobs = [launch.start(server, number) for number in range(3)]
        for job in jobs:
            job.run()
        server.close()
        return [job.value() for job in jobs]

    state, state_of_random = numpy.random.get_state(), random.getstate()
    try:
        numpy.random.mtrand._rand._bit_generator.__init__()  # as if nobody had seeded it
        random.seed()  # pytest's plugin for a random order has seeded it
        unseeded = draw()
        numpy.random.seed(1)
        seeded = draw()
    finally:
        numpy.random.set_state(state)
        random.setstate(state_of_random)
    assert len({first for first, _ in unseeded}) == 3
    assert len({first for first, _ in seeded}) == 1
    assert len({second for _, second in unseeded + seeded}) == 6


# What it leaves behind


def sleeper_with_the_lease(number, spec, context):
    """Leaves a forked child that has a copy of the lease and ignores SIGTERM. Returns once `SPEC.go` exists."""
    context.prepared(Request(1), None)
    context.wait()
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(spec).write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    until(lambda: Path(spec).exists() and Path(spec).read_text())
    until(Path(f"{spec}.go").exists)
    return report()


def test_a_lease_is_held_until_the_last_descendant_is_gone_and_that_is_ended(launch):
    job = launch.start(launch.server(sleeper_with_the_lease))
    held, lease = os.pipe()
    job.prepared()
    job.process.grant(Grant({}), (lease,))
    os.close(lease)
    until(lambda: job.log.exists() and job.log.read_text())
    child = psutil.Process(int(job.log.read_text()))
    (supervisor,) = supervisors()
    main = next(process for process in supervisor.children() if process != child)
    supervisor.suspend()  # which would end the child
    Path(f"{job.log}.go").touch()
    until(lambda: not alive(main))
    assert not select.select([held], [], [], 0)[0]
    assert alive(child)
    supervisor.resume()
    exited = job.exited()
    assert exited == JobExited(0, left_behind=exited.left_behind)
    (left,) = exited.left_behind
    assert left.endswith(f" (pid {child.pid})")
    assert not alive(child)
    assert select.select([held], [], [], 0)[0], "nobody has the lease any more"
    os.close(held)


def test_killing_ends_the_whole_tree_also_what_is_stopped_or_ignores_signals(launch):
    def program(number, spec, context):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        subprocess.Popen(["sleep", "60"], start_new_session=True)
        context.prepared(Request(1), None)
        os.kill(os.getpid(), signal.SIGSTOP)

    job = launch.start(launch.server(program))
    job.prepared()
    (supervisor,) = supervisors()
    tree = supervisor.children(recursive=True)
    until(lambda: tree[0].status() == psutil.STATUS_STOPPED)
    job.process.kill()
    assert os.waitstatus_to_exitcode(job.exited().status) == -signal.SIGKILL
    assert len(tree) == 2
    assert not any(alive(process) for process in tree)


def test_killing_waits_in_peace_for_processes_that_proc_does_not_show(launch, monkeypatch, tmp_path):
    looks = tmp_path / "looks"

    def children():
        with looks.open("a") as file:
            file.write("!")
        return []

    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        return report()

    monkeypatch.setattr(tree_module, "children", children)
    job = launch.start(launch.server(program))
    job.prepared()
    began = time.monotonic()
    job.process.kill()
    until(lambda: looks.exists() and len(looks.read_text()) >= 4)
    assert time.monotonic() - began > 0.25
    job.process.grant(Grant({}), ())
    assert job.exited() == JobExited(0)


def test_closing_the_server_ends_all_jobs_and_leaves_no_process(launch, method):
    def program(number, spec, context):
        import subprocess
        import time

        from gpu_launcher.model import Request

        subprocess.Popen(["sleep", "60"], start_new_session=True)
        context.prepared(Request(1), None)
        time.sleep(60)

    server = launch.server(program, method)
    for number in range(3):
        launch.start(server, number).prepared()
    tree = psutil.Process().children(recursive=True)
    assert len(tree) == 2 + 3 * 3
    server.close()
    assert not any(alive(process) for process in tree)
    server.close()


def test_closing_does_not_wait_for_a_supervisor_that_is_stopped_for_long(launch):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        time.sleep(60)

    server = launch.server(program)
    launch.start(server).prepared()
    (supervisor,) = supervisors()
    supervisor.suspend()
    server.close()  # returns
    assert not alive(supervisor)


# When those who watch are killed


def waiting(number, spec, context):
    subprocess.Popen(["sleep", "60"])
    subprocess.Popen(["sleep", "60"], start_new_session=True)
    context.prepared(Request(1), None)
    context.wait()
    return report(number)


def test_when_a_supervisor_is_killed_its_tree_is_ended_before_that_is_told_and_the_others_go_on(launch):
    server = launch.server(waiting)
    jobs = [launch.start(server, number) for number in range(2)]
    for job in jobs:
        job.prepared()
    victim = supervisors()[0]
    tree = victim.children(recursive=True)
    assert len(tree) == 3
    victim.kill()
    assert select.select([server], [], [], PATIENCE)[0]
    lost = server.receive()
    assert lost is not None
    assert lost.problem == SUPERVISOR_DIED
    assert not any(alive(process) for process in tree)
    other = jobs[1 - lost.number]
    other.process.grant(Grant({}), ())
    assert other.exited().status == 0
    with pytest.raises(ChannelClosedError):
        receive(jobs[lost.number].process.supervisor)


def say_all(server: ForkServer) -> None:
    """A fork server may see the end of a supervisor before its own."""
    while select.select([server], [], [], PATIENCE)[0]:
        assert isinstance(server.receive(), Lost)


@pytest.mark.parametrize(
    "who", ["server", "guard", "server and guard", "server and supervisor", "guard and supervisor"]
)
def test_when_the_fork_server_is_killed_nothing_of_it_lives_and_another_can_be_started(launch, who):
    server = launch.server(waiting)
    jobs = [launch.start(server, number) for number in range(2)]
    for job in jobs:
        job.prepared()
    guard = psutil.Process().children()[0]
    tree = [guard, *guard.children(recursive=True)]
    assert len(tree) == 2 + 2 * 4
    victims = {"server": fork_server(), "guard": guard, "supervisor": supervisors()[0]}
    for process in tree:  # all at once, as far as anybody can tell
        if process in [victims[name] for name in who.split(" and ")]:
            process.suspend()
    for name in who.split(" and "):
        victims[name].kill()
    with pytest.raises(ServerDiedError):
        say_all(server)
    with pytest.raises(ServerDiedError):
        server.start(2, None, jobs[0].result)
    server.restart(lambda: None)
    until(lambda: not any(alive(process) for process in tree))
    again = launch.start(server, 3)
    assert again.run().status == 0
    assert again.value() == 3


def test_a_job_is_told_to_have_been_abandoned_when_the_fork_server_was_killed(launch):
    server = launch.server(waiting)
    job = launch.start(server)
    job.prepared()
    fork_server().kill()
    exited = job.exited()
    assert exited.abandoned
    assert os.waitstatus_to_exitcode(exited.status) == -signal.SIGKILL


def test_those_who_watch_go_on_when_they_are_asked_to_end_as_by_systemd_while_the_launching_program_lives(
    launch, method
):
    def program(number, spec, context):
        from gpu_launcher.model import Request
        from gpu_launcher.processes.messages import Report

        context.prepared(Request(1), None)
        context.wait()
        return Report(True, None, b"")

    job = launch.start(launch.server(program, method))
    job.prepared()
    guard = psutil.Process().children()[0]
    for process in (guard, fork_server(), *supervisors()):
        process.terminate()
    job.process.grant(Grant({}), ())
    assert job.exited() == JobExited(0)


def test_the_other_side_of_a_restart_drops_what_is_the_launching_programs_alone(launch):
    server = launch.server(waiting)
    reader, writer = os.pipe()
    server.restart(lambda: os.close(writer))
    launch.start(server).prepared()
    os.close(writer)
    assert os.read(reader, 1) == b"", "neither the server nor its job has a copy"
    os.close(reader)


NO_FORK = "could not be started: fork failed: Resource temporarily unavailable"


def no_fork(main: Any) -> int:
    """What `fork_child` does on a machine that has no memory left."""
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


def test_a_job_for_which_the_server_cannot_fork_is_told_and_the_server_lives(launch, monkeypatch):
    monkeypatch.setattr(server_module, "fork_child", no_fork)
    server = launch.server(waiting)
    for number in range(2):
        launch.start(server, number)
        assert select.select([server], [], [], PATIENCE)[0]
        assert server.receive() == Lost(number, NO_FORK, started=False)


def test_a_job_that_its_supervisor_cannot_fork_could_not_be_started_and_nothing_is_printed(launch, monkeypatch, capfd):
    monkeypatch.setattr(supervisor_module, "fork_child", no_fork)
    server = launch.server(waiting)
    job = launch.start(server)
    assert select.select([server], [], [], PATIENCE)[0]
    assert server.receive() == Lost(0, NO_FORK, started=False)
    with pytest.raises(ChannelClosedError):
        job.say("supervisor")
    assert capfd.readouterr().err == ""


# One job after another


def talking(number, spec, context):
    """Prints, and reports what it found of its predecessors."""
    import os
    import pickle
    from pathlib import Path

    from gpu_launcher.model import Request
    from gpu_launcher.processes.messages import Report

    print(f"job {number}")
    found = (
        os.getpid(),
        os.getppid(),
        os.environ.get("LEFT_BEHIND"),
        sorted(map(str, Path("/proc/self/fd").iterdir())),
    )
    os.environ["LEFT_BEHIND"] = str(number)
    context.prepared(Request(1), None)
    context.wait()
    return Report(True, None, pickle.dumps(found))


def test_a_supervisor_whose_job_has_ended_runs_the_next_one_which_finds_nothing_of_it(launch, method):
    server = launch.server(talking, method)
    found = []
    reader, writer = os.pipe()
    for number in range(3):
        job = launch.start(server, number)
        assert job.run(lease=(writer,)) == JobExited(0, printed=f"job {number}\n".encode())
        found.append(job.value())
        server.finished(job.process)
    pids, parents, left_behind, descriptors = zip(*found, strict=True)
    assert len(set(pids)) == 3
    assert len(set(parents)) == 1
    assert set(left_behind) == {None}
    assert descriptors[0] == descriptors[1] == descriptors[2]
    os.close(writer)
    assert os.read(reader, 1) == b"", "the supervisor holds no lease between jobs"
    os.close(reader)


def test_what_was_said_to_a_job_that_had_ended_is_not_done_to_the_next_one(launch):
    server = launch.server(waiting)
    job = launch.start(server)
    assert job.run().status == 0
    reader, writer = os.pipe()
    with contextlib.suppress(ChannelClosedError):
        job.process.grant(Grant({}), (writer,))  # before it is known here that the job has ended
    job.process.signal(signal.SIGKILL)
    job.process.kill()
    server.finished(job.process)
    (supervisor,) = supervisors()
    following = launch.start(server, 1)
    following.prepared()
    assert supervisors() == [supervisor]
    os.close(writer)
    assert os.read(reader, 1) == b"", "a lease that came too late is not held"
    os.close(reader)
    following.process.grant(Grant({}), ())
    assert following.exited().status == 0


def test_a_supervisor_that_was_killed_between_two_jobs_is_replaced_and_no_job_is_lost(launch):
    server = launch.server(waiting)
    first = launch.start(server)
    first.run()
    server.finished(first.process)
    (supervisor,) = supervisors()
    supervisor.kill()
    until(lambda: not alive(supervisor))
    assert select.select([server], [], [], PATIENCE)[0]
    assert server.receive() is None
    assert launch.start(server, 1).run().status == 0


def test_a_job_is_lost_when_its_supervisor_is_killed_that_had_another_before(launch):
    server = launch.server(waiting)
    first = launch.start(server)
    first.run()
    server.finished(first.process)
    second = launch.start(server, 1)
    second.prepared()
    (supervisor,) = supervisors()
    supervisor.kill()
    assert select.select([server], [], [], PATIENCE)[0]
    assert server.receive() == Lost(1, SUPERVISOR_DIED)


def test_a_supervisor_of_a_lost_server_gets_no_more_jobs(launch):
    server = launch.server(waiting)
    jobs = [launch.start(server, number) for number in range(2)]
    for job in jobs:
        assert job.run().status == 0
    server.finished(jobs[0].process)
    processes = supervisors()
    fork_server().kill()
    with pytest.raises(ServerDiedError):
        say_all(server)
    server.restart(lambda: None)
    until(lambda: not any(alive(process) for process in processes))
    server.finished(jobs[1].process)
    assert jobs[1].process.supervisor.fileno() == -1, "its channel was closed"
    assert launch.start(server, 2).run().status == 0


def test_supervisors_without_a_job_end_with_the_launching_program(tmp_path):
    code = f"""
import select, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_processes_jobs import Grant, Launch, Path, waiting
launch = Launch(Path({str(tmp_path)!r}))
server = launch.server(waiting)
job = launch.start(server)
job.run()
server.finished(job.process)
print("idle", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"idle\n"
        tree = psutil.Process(program.pid).children(recursive=True)
        assert len(tree) == 3, "guard, fork server, supervisor"
        program.kill()
        until(lambda: not any(alive(process) for process in tree))


# How jobs are started


def anything(number, spec, context):
    context.prepared(Request(1), None)
    context.wait()
    return report()


@pytest.fixture
def thread() -> Iterator[threading.Thread]:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    yield thread
    go.set()
    thread.join()


def test_jobs_are_forked_where_that_is_safe(launch):
    server = launch.server(anything, "auto")
    assert (server.method, server.reason) == ("fork", None)


def test_jobs_are_spawned_where_a_thread_runs_and_the_reason_names_it(launch, thread):
    def program(number, spec, context):
        from gpu_launcher.model import Request
        from gpu_launcher.processes.messages import Report

        context.prepared(Request(1), None)
        context.wait()
        return Report(True, None, b"")

    server = launch.server(program, "auto")
    assert server.method == "spawn"
    assert server.reason == f"1 other thread(s) run in this program ({thread.name})"
    assert len(psutil.Process().children()) == 1, "the fork that found out is gone"
    job = launch.start(server)
    assert job.run().status == 0


def test_forking_can_be_asked_for_where_a_thread_runs(launch, thread):
    server = launch.server(anything, "fork")
    assert (server.method, server.reason) == ("fork", None)
    assert launch.start(server).run().status == 0


def test_spawning_can_be_asked_for(launch):
    def program(number, spec, context):
        import sys

        from gpu_launcher.model import Request
        from gpu_launcher.processes.messages import Report

        context.prepared(Request(1), None)
        context.wait()
        return Report(True, None, b"pytest" if "pytest" in sys.modules else b"fresh")

    server = launch.server(program, "spawn")
    assert (server.method, server.reason) == ("spawn", "start_method=spawn")
    job = launch.start(server)
    job.run()
    assert job.report().payload == b"fresh"


def test_what_a_spawned_program_uses_of_main_can_be_pickled_by_name_there_and_here(launch, monkeypatch):
    main = types.ModuleType("__main__")
    main.__file__ = "/nonexistent/train.py"
    script = """
class Unused:
    pass

class Net:
    pass

def double(number):
    return 2 * number

def program(number, spec, context):
    import pickle
    import sys
    from multiprocessing import get_context
    from gpu_launcher.model import Request
    from gpu_launcher.processes.messages import Report

    context.prepared(Request(1), None)
    context.wait()
    assert b"Net" in pickle.dumps(Net())
    with get_context("fork").Pool(1) as pool:
        doubled = pool.map(double, [1, 2])
    names = [name for name in ("Unused", "Net", "double", "program") if hasattr(sys.modules["__main__"], name)]
    return Report(True, None, pickle.dumps((doubled, names, Net())))
"""
    exec(script, vars(main))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", main)
        job, _ = launch.one(main.program, "spawn")
        doubled, names, net = job.value()
    assert doubled == [2, 4]
    assert names == ["Net", "double", "program"]
    assert type(net) is main.Net


def test_nothing_in_the_working_directory_disturbs_a_spawned_interpreter(launch, monkeypatch, tmp_path):
    def program(number, spec, context):
        import pickle
        import sys

        from gpu_launcher.model import Request
        from gpu_launcher.processes.messages import Report

        context.prepared(Request(1), None)
        context.wait()
        return Report(True, None, pickle.dumps((sys.path, sys.modules["gpu_launcher"].__file__)))

    for module in ("pickle", "socket", "importlib", "types", "gpu_launcher"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    job, exited = launch.one(program, "spawn")
    assert exited == JobExited(0)
    assert job.value() == (sys.path, sys.modules["gpu_launcher"].__file__)


def test_a_program_that_cannot_be_pickled_cannot_be_spawned_and_the_error_names_option_and_remedy(launch):
    lock = threading.Lock()

    def program(number, spec, context):
        lock.acquire()

    with pytest.raises(
        OptionError, match=r"^start_method: .*spawn: .*lock, a variable that program\(\).*=fork$"
    ) as raised:
        launch.server(program, "spawn")
    assert raised.value.option == "start_method"


DECISION = """
import sys
{work}
from gpu_launcher.processes.fork_server_client import ForkServer
def program(number, spec, context):
    raise NotImplementedError
server = ForkServer(program)
print(server.method, server.reason, sep="|")
server.close()
"""
OPENBLAS = "import numpy; a = numpy.ones((1000, 1000)); b = a @ a"
OPENMP = """
import os
os.environ["OMP_NUM_THREADS"] = "2"
import numpy
from sklearn.metrics import pairwise_distances_argmin
a = numpy.random.rand(5000, 8)
pairwise_distances_argmin(a, a)
"""


def decision(work: str) -> str:
    code = DECISION.format(work=work)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_linear_algebra_before_the_launch_does_not_keep_jobs_from_being_forked():
    pytest.importorskip("numpy")
    assert decision(OPENBLAS) == "fork|None"


def test_a_gnu_openmp_pool_from_before_the_launch_makes_jobs_be_spawned():
    if importlib.util.find_spec("sklearn") is None:  # and not imported: that changes the environment
        pytest.skip("needs sklearn")
    method, reason = decision(OPENMP).split("|")
    assert method == "spawn"
    assert "other thread(s) run in this program" in reason
