"""What `Sweep` says if a sweep cannot be steered."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs import steering
from gpu_launcher.jobs.control import MAX_LINE, write_answer, write_refusal
from gpu_launcher.jobs.directory import DirectoryLock
from gpu_launcher.jobs.event_lines import write_event, write_state
from gpu_launcher.jobs.events import JobEnded, Notice, Outcome
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.recorder import Recorder, record_end
from gpu_launcher.jobs.steering import Sweep
from gpu_launcher.jobs.sweep_overview import describe


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a sweep that has ended."""
    monkeypatch.chdir(tmp_path)
    Recorder(tmp_path / "sweep", [Job(0, "", [])], "train.py", how_to_resume="python train.py -m").close()
    return tmp_path / "sweep"


def launched(sweep: Path, identity: ProcessIdentity) -> Path:
    """Let the sweep have a launch of this process. Returns the path of its socket."""
    content = {**identity.to_json(), "command": "train.py"}
    (sweep / DIRECTORY / "launch-abc.json").write_text(json.dumps(content))
    return sweep / DIRECTORY / "launch-abc.sock"


@contextmanager
def answering(path: Path, answer: bytes | None) -> Iterator[None]:
    """A head that gives this answer to one client, or ends the connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(MAX_LINE)
                with suppress(OSError):  # more than is read
                    client.sendall(answer or b"")

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def problem(directory: Path | None = None, seconds: float = 10.0) -> str:
    with pytest.raises(SteeringError) as caught:
        Sweep(directory).status(seconds=seconds)
    return str(caught.value)


def test_sweep_that_has_ended(sweep: Path) -> None:
    assert problem() == "sweep has ended; to run the rest: python train.py -m"
    os.chdir(sweep)
    assert problem(sweep) == f". has ended; to run the rest: cd {sweep.parent} && python train.py -m"


def test_sweep_whose_jobs_have_all_completed_has_no_rest(sweep: Path) -> None:
    record_end(sweep, 0)
    assert problem() == "sweep has ended"
    record_end(sweep, 1)
    assert problem() == "sweep has ended; to run the rest: python train.py -m"


def test_directory_without_a_sweep(sweep: Path, tmp_path: Path) -> None:
    instead = "give the directory that hydra.sweep.dir or --dir named"
    (tmp_path / "other").mkdir()
    assert problem(tmp_path) == ". is not the directory of a sweep: the newest sweep in it is sweep"
    assert problem(tmp_path / "other") == f"other is not the directory of a sweep: {instead}"
    assert problem(tmp_path / "missing") == f"missing does not exist: {instead}"
    os.chdir(tmp_path / "other")
    assert problem() == "there is no sweep below the current directory: give the directory of a sweep"


def test_sweep_that_was_removed_meanwhile(sweep: Path) -> None:
    held = Sweep(sweep)
    shutil.rmtree(sweep)
    with pytest.raises(SteeringError, match="sweep cannot be read: No such file or directory"):
        held.stop()


def test_running_sweep_is_steered_although_another_has_written_since(sweep: Path, tmp_path: Path) -> None:
    Recorder(tmp_path / "other", [Job(0, "", [])], "train.py").close()
    assert Sweep().directory == tmp_path / "other"
    launched(sweep, ProcessIdentity.here())
    assert Sweep().directory == sweep


def test_sweep_of_another_machine(sweep: Path) -> None:
    launched(sweep, replace(ProcessIdentity.here(), boot="another", host="gpu7"))
    assert f"sweep is run by process {os.getpid()} (train.py) on gpu7, which cannot be reached from here" in problem()


def test_sweep_without_a_socket(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "BEGIN_SECONDS", 0.1)
    launched(sweep, ProcessIdentity.here())
    assert f"sweep is run by process {os.getpid()} (train.py), which has no control socket" in problem()


@pytest.mark.parametrize("bound", [False, True])
def test_sweep_whose_head_is_about_to_listen_is_waited_for(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    monkeypatch.setattr(steering, "BEGIN_SECONDS", 100.0)
    path = launched(sweep, ProcessIdentity.here())
    tried = threading.Event()
    connect = steering.connect

    def try_to_connect(path: Path, seconds: float) -> socket.socket:
        try:
            return connect(path, seconds)
        finally:
            tried.set()

    monkeypatch.setattr(steering, "connect", try_to_connect)
    with socket.socket(socket.AF_UNIX) as listener:
        if bound:
            listener.bind(str(path))

        def serve() -> None:
            tried.wait()
            if not bound:
                listener.bind(str(path))
            listener.listen()
            client, _ = listener.accept()
            with client:
                client.recv(MAX_LINE)
                client.sendall(write_refusal("heard"))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert problem(sweep) == "sweep: heard"
        finally:
            tried.set()
            thread.join()


def test_sweep_that_has_not_begun(sweep: Path) -> None:
    lock = DirectoryLock.take(sweep, "train.py", "")
    assert f"is being run by process {os.getpid()} (train.py): try again in a moment" in problem()
    lock.close()
    assert "has ended" in problem()


def test_stale_socket_of_a_dead_head(sweep: Path) -> None:
    path = launched(sweep, replace(ProcessIdentity.here(), start=1))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert "sweep has ended" in problem()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "sweep has ended"),
        (b"", "sweep has ended"),
        (b'{"version": 1, "ok"', "sweep has ended"),
        (b"\xff\xfe\n", "answers in a way that this gpu-launcher does not know"),
        (b'{"version": 2, "ok": true}\n', "answers in a way that this gpu-launcher does not know"),
        (b'{"version": 1, "ok": true}\n', "answers in a way that this gpu-launcher does not know"),
        (b'{"version": 1, "ok": false, "problem": "not\\u001b[31m now"}\n', "sweep: not now"),
        (b"x" * 2 * MAX_LINE, "answers in a way that this gpu-launcher does not know"),
    ],
    ids=str,
)
def test_strange_answers(sweep: Path, answer: bytes | None, said: str) -> None:
    path = launched(sweep, ProcessIdentity.here())
    with answering(path, answer):
        assert said in problem()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stopping", 1),
        ("paused", None),
        ("devices", "2"),
        ("total", "\x1b[31m"),
        ("running", float("inf")),
        ("ended", []),
        ("ended", {"exploded": 1}),
        ("ended", {"failed": "1"}),
        ("facts", [1]),
        ("facts", [["best", 1]]),
    ],
)
def test_answer_of_a_fake_head_is_not_believed(sweep: Path, name: str, value: object) -> None:
    status = {"stopping": None, "paused": False, "devices": None, "total": 2, "running": 1, "ended": {}, "facts": []}
    path = launched(sweep, ProcessIdentity.here())
    with answering(path, write_answer(status)):
        assert Sweep(sweep).status() == status
    path.unlink()
    with answering(path, write_answer({**status, name: value})):
        assert "answers in a way that this gpu-launcher does not know" in problem()
    path.unlink()
    with answering(path, write_answer({**status, name: value})):
        described = describe(sweep)
    assert described is not None
    assert described.state == "running"


def test_jobs_that_are_to_come_are_known(sweep: Path) -> None:
    path = launched(sweep, ProcessIdentity.here())
    answer = {"ending": [], "dropped": [[5, 5]], "already": [], "coming": [[1, 6], [8, 9]], "grace": 10.0}
    with answering(path, write_answer(answer)), pytest.raises(SteeringError) as caught:
        Sweep(sweep).cancel(5, 99)
    assert str(caught.value) == "job 5 cancelled before the start; sweep has no job 99 (its 0-6, 8-9)"


def test_stop_of_a_sweep_without_running_jobs(sweep: Path) -> None:
    path = launched(sweep, ProcessIdentity.here())
    with answering(path, write_answer({"already": False, "running": 0, "grace": 10.0})):
        assert Sweep(sweep).stop() == "sweep stops: no job is running"


def test_head_that_does_not_answer(sweep: Path) -> None:
    path = launched(sweep, ProcessIdentity.here())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        said = f"process {os.getpid()} (train.py), which runs sweep, has not answered for 0.1 s"
        assert said in problem(seconds=0.1)
        assert said in problem(seconds=0.1), "there is no room to connect now"


@pytest.mark.parametrize(
    ("already", "said"),
    [
        ([[5, 5]], "job 5 was cancelled already, and may take 10.0 s to end"),
        ([[5, 6]], "jobs 5-6 were cancelled already, and may take 10.0 s to end"),
    ],
)
def test_second_cancel_says_that_the_job_is_ending(sweep: Path, already: list[list[int]], said: str) -> None:
    path = launched(sweep, ProcessIdentity.here())
    answer = {"ending": [], "dropped": [], "already": already, "coming": [], "grace": 10.0}
    with answering(path, write_answer(answer)):
        assert Sweep(sweep).cancel(*range(already[0][0], already[0][1] + 1)) == said


def test_watching_returns_the_state_and_the_events(sweep: Path) -> None:
    path = launched(sweep, ProcessIdentity.here())
    tally = SweepTally(total=3)
    with answering(path, write_answer({}) + write_state(tally) + write_event(Notice(1.0, "a")) + b'{"half'):
        watch = Sweep(sweep).watch()
        received = []
        while not watch.is_over:
            select.select([watch], [], [], 60)
            received += watch.receive()
    watch.close()
    state, event = received
    assert isinstance(state, SweepTally)
    assert state.total == 3
    assert event == Notice(1.0, "a")


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"event": "JobEnded"}\n', b"x" * 100], ids=str)
def test_strange_events_of_a_fake_head_are_refused(sweep: Path, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "MAX_WATCHED_LINE", 99)
    path = launched(sweep, ProcessIdentity.here())
    with answering(path, write_answer({}) + line):
        watch = Sweep(sweep).watch()
        with pytest.raises(SteeringError, match="answers in a way that this gpu-launcher does not know"):  # noqa: PT012
            while True:
                select.select([watch], [], [], 60)
                watch.receive()
    watch.close()


def test_sweep_of_an_older_version_cannot_be_watched(sweep: Path) -> None:
    path = launched(sweep, ProcessIdentity.here())
    refusal = write_refusal("this sweep's gpu-launcher has no control request 'watch'")
    with answering(path, refusal), pytest.raises(SteeringError, match=r"sweep: .* no control request 'watch'$"):
        Sweep(sweep).watch()


EARLIER = "job 2 ended in an earlier batch or launch of the sweep"


@pytest.mark.parametrize(
    ("jobs", "answer", "said"),
    [
        ((7,), {"over": True}, "sweep starts no more jobs; to run the rest: python train.py -m"),
        ((), {}, "sweep has no job that has failed"),
        ((0,), {"unfinished": [[0, 0]]}, "job 0 has not ended yet"),
        ((0, 9), {"again": [[0, 0]]}, "job 0 runs again; sweep has no job 9 (its job 0)"),
        ((1,), {}, "job 1 has completed: only other jobs can run again"),
        ((2,), {}, f"{EARLIER}; when it has ended, to run the rest: python train.py -m"),
    ],
    ids=str,
)
def test_retry_says_why_jobs_do_not_run_again(
    tmp_path: Path, sweep: Path, jobs: tuple[int, ...], answer: dict[str, Any], said: str
) -> None:
    if jobs in ((1,), (2,)):
        recorder = Recorder(sweep, [Job(1, "", []), Job(2, "", [])], "train.py")
        recorder.handle(JobEnded(0.0, 1, "", (), Outcome.COMPLETED, 1.0, None, None))
        recorder.handle(JobEnded(0.0, 2, "", (), Outcome.FAILED, 1.0, "broke", None))
        recorder.close()
    path = launched(sweep, ProcessIdentity.here())
    full = {"over": False, "again": [], "ahead": [], "unfinished": [], **answer}
    with answering(path, write_answer(full)), pytest.raises(SteeringError) as caught:
        Sweep(sweep).retry(*jobs, failed=not jobs)
    assert str(caught.value).startswith(said)


def test_retry_of_a_trial_of_an_earlier_launch_names_rerun(tmp_path: Path) -> None:
    search = tmp_path / "search"
    recorder = Recorder(search, [Job(2, "", [])], "train.py")
    recorder.handle(JobEnded(0.0, 2, "", (), Outcome.FAILED, 1.0, "broke", None))
    recorder.close()
    answer = write_answer({"over": False, "again": [], "ahead": [], "unfinished": []})
    with answering(launched(search, ProcessIdentity.here()), answer), pytest.raises(SteeringError) as caught:
        Sweep(search).retry(2)
    assert str(caught.value) == f"{EARLIER}: `gpu-launcher rerun 2` prints the command that runs it alone"


def test_retry_says_what_runs_again(sweep: Path) -> None:
    path = launched(sweep, ProcessIdentity.here())
    answer = {"over": False, "again": [[0, 0]], "ahead": [[4, 5]], "unfinished": [[1, 2]]}
    with answering(path, write_answer(answer)):
        assert Sweep(sweep).retry(0, 4, 5) == "job 0 runs again; jobs 4-5 are not cancelled any more"
