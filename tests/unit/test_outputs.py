"""Outputs of jobs that are brought back from a node: whole, in small pieces, and never outside the job's directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.node_messages import Ended, Wanted
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.nodes import agent, outputs
from gpu_launcher.nodes.agent_messages import (
    OutputData,
    OutputDirectory,
    OutputFile,
    OutputLink,
    OutputPiece,
    OutputsBegin,
    OutputsEnd,
    Setup,
    Timing,
)
from gpu_launcher.nodes.frames import READ_BYTES, FrameStream
from gpu_launcher.nodes.output_receiver import STAGING, Fetched, OutputReceiver, remove_leftovers
from gpu_launcher.nodes.outputs import (
    MAX_JOBS_IN_TURN,
    MAX_PENDING,
    PIECE_BYTES,
    PIECES_AT_ONCE,
    OutputSender,
    PrivateDirectory,
)
from gpu_launcher.processes.messages import Report
from gpu_launcher.safe_files import open_regular

REPORT = Report(ok=True, message=None, payload=b"value").dump(0)
BEGIN = OutputsBegin(0, "0", 0, "job.log", 1)
END = OutputsEnd(0, None, 0)


class Both:
    """A node and a head, each with a sweep's directory of its own, and the connection between them."""

    def __init__(self, directory: Path) -> None:
        self.there, self.here = directory / "there" / "sweep", directory / "here" / "sweep"
        scratch = directory / "scratch"
        for path in (self.there, self.here / DIRECTORY, scratch):
            path.mkdir(parents=True)
        self.reports_there, self.reports = ReportFiles(scratch), ReportFiles(self.here / DIRECTORY, "launch")
        self._sockets = socket.socketpair()
        self.node, self.head = (FrameStream(os.dup(end.fileno()), os.dup(end.fileno())) for end in self._sockets)
        self.sender = OutputSender(self.node, self.there, self.reports_there)
        self.receiver = OutputReceiver(self.here, self.reports)
        self.heard: list[object] = []

    def job(self, number: int = 0, **files: str | bytes) -> Path:
        """Make the directory of a job on the node."""
        directory = self.there / str(number)
        directory.mkdir()
        for name, content in {"log": f"log of {number}\n", **files}.items():
            (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return directory

    def ends(self, number: int = 0, outcome: Outcome = Outcome.COMPLETED, report: bytes | None = REPORT) -> None:
        """A job ends on the node."""
        if report is not None:
            self.reports_there.path(number).write_bytes(report)
        log = str(self.there / str(number) / "log")
        self.sender.add(Ended(JobResult(number, "", outcome, b"value", None, (), 1.0, log)))

    def turn(self) -> None:
        """Send a little, and take what has arrived."""
        self.sender.send()
        self.node.flush()
        for message in self.head.receive():
            self.heard.append(message)
            if isinstance(message, OutputPiece) and not self.receiver.take(message):
                self.sender.stop(message.number)

    def transfer(self) -> None:
        while self.sender.busy or self.node.pending or self.head.readable:
            self.turn()

    def results(self) -> list[JobResult]:
        return [message.result for message in self.heard if isinstance(message, Ended)]

    def close(self) -> None:
        self.receiver.discard()
        for stream in (self.node, self.head):
            stream.close()
        for end in self._sockets:
            end.close()


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    both = Both(tmp_path)
    yield both
    both.close()


def tree(directory: Path) -> dict[str, str]:
    """The files, links and empty directories below a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name] = "empty"
    return found


def test_whole_directory_arrives_before_the_result(both: Both) -> None:
    directory = both.job(program="#!/bin/sh\n")
    (directory / "program").chmod(0o777)
    (directory / "a" / "deep").mkdir(parents=True)
    (directory / "a" / "deep" / "file").write_text("deep")
    (directory / "empty").mkdir()
    (directory / "last").symlink_to("a/deep/file")
    both.ends()
    both.transfer()
    expected = {"log": "log of 0\n", "program": "#!/bin/sh\n", "a/deep/file": "deep", "empty": "empty"}
    assert tree(both.here / "0") == {**expected, "last": "-> a/deep/file"}
    assert (both.here / "0" / "program").stat().st_mode & 0o777 == 0o755, "others cannot write to it"
    assert isinstance(both.heard[-1], Ended)
    assert both.results()[0].payload is None, "it is in the report"
    assert read_report(both.reports.path(0)).payload == b"value"
    assert both.receiver.finish(0) == Fetched(None, 0, str(both.here / "0" / "log"))
    assert not list(both.reports_there.directory.iterdir())


def test_result_that_left_nothing_is_sent_at_once(both: Both) -> None:
    both.sender.add(Ended(JobResult(0, "", Outcome.CANCELLED, None, None, (), None, None)))
    assert not both.sender.busy
    both.transfer()
    assert len(both.results()) == 1


def test_links_that_lead_elsewhere_and_special_files_are_left_out(both: Both) -> None:
    directory = both.job()
    for name, target in {"absolute": "/etc/passwd", "up": "../1/log", "down-and-up": "a/../../1"}.items():
        (directory / name).symlink_to(target)
    os.mkfifo(directory / "fifo")
    both.ends()
    both.transfer()
    assert tree(both.here / "0") == {"log": "log of 0\n"}
    assert both.receiver.finish(0).left_out == 4


EVIL: dict[str, list[OutputPiece]] = {
    "path above": [OutputFile(0, "../evil", 0o644)],
    "absolute path": [OutputFile(0, "/tmp/evil", 0o644)],
    "path in the middle": [OutputDirectory(0, "a"), OutputFile(0, "a/../../evil", 0o644)],
    "null character": [OutputFile(0, "a\0b", 0o644)],
    "no name": [OutputFile(0, "", 0o644)],
    "link above": [OutputLink(0, "link", "../..")],
    "absolute link": [OutputLink(0, "link", "/etc")],
    "through a link": [OutputDirectory(0, "a"), OutputLink(0, "link", "a"), OutputFile(0, "link/evil", 0o644)],
    "a file twice": [OutputFile(0, "file", 0o644), OutputFile(0, "file", 0o644)],
    "content of nothing": [OutputData(0, b"evil")],
}


@pytest.mark.parametrize("pieces", EVIL.values(), ids=EVIL)
def test_what_a_node_sends_stays_in_the_directory_of_the_job(both: Both, pieces: list[OutputPiece]) -> None:
    before = tree(both.here.parent.parent)
    assert both.receiver.take(BEGIN)
    assert [both.receiver.take(piece) for piece in pieces][-1] is False
    assert both.receiver.take(END), "the rest is ignored"
    assert both.receiver.finish(0).problem is not None
    both.receiver.discard()
    assert tree(both.here.parent.parent) == before


@pytest.mark.parametrize("directory", ["..", "../other", "/tmp/evil", DIRECTORY, f"{DIRECTORY}/0", "a//b", ""])
def test_outputs_for_another_place_are_refused(both: Both, directory: str) -> None:
    assert both.receiver.take(replace(BEGIN, directory=directory)) is False
    assert both.receiver.finish(0).problem is not None


def test_link_at_the_place_of_a_directory_is_not_followed(both: Both, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (both.here / "0").symlink_to(tmp_path / "elsewhere")
    for piece in (BEGIN, OutputFile(0, "file", 0o644)):
        assert both.receiver.take(piece)
    assert both.receiver.take(END) is False
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_link_above_the_place_of_a_directory_is_not_followed(both: Both, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (both.here / "above").symlink_to(tmp_path / "elsewhere")
    assert both.receiver.take(replace(BEGIN, directory="above/a/0"))
    assert both.receiver.take(END) is False
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_half_a_directory_is_not_taken_for_a_result(both: Both) -> None:
    both.job(model=b"x" * 4 * READ_BYTES)
    both.ends()
    while not any(isinstance(message, OutputData) for message in both.heard):
        both.turn()
    assert not (both.here / "0").exists()
    assert not both.reports.path(0).exists()
    both.receiver.discard()
    assert list((both.here / DIRECTORY).iterdir()) == []


def test_what_a_killed_head_has_received_in_part_is_removed(both: Both) -> None:
    both.receiver.take(BEGIN)
    assert list((both.here / DIRECTORY).glob(f"{STAGING}*"))
    remove_leftovers(both.here)
    assert list((both.here / DIRECTORY).iterdir()) == []


def test_outputs_without_their_end_are_not_all(both: Both) -> None:
    both.receiver.take(BEGIN)
    assert both.receiver.finish(0) == Fetched("its node did not send all of them", 0)
    assert both.receiver.finish(1) == Fetched("its node did not send them", 0)


def test_little_waits_to_be_sent_and_other_messages_pass(both: Both) -> None:
    both.job(0, model=b"x" * 64 * PIECE_BYTES)
    both.job(1)
    both.ends(0)
    both.ends(1)
    most = 0
    for turn in range(1000):
        both.sender.send()
        most = max(most, both.node.pending)
        if turn == 2:
            both.node.send(Wanted(1))
        if turn % 3 == 2:  # the head is slow
            both.turn()
        if not both.sender.busy:
            break
    both.transfer()
    assert most < MAX_PENDING + 2 * PIECE_BYTES
    assert [result.number for result in both.results()] == [1, 0], "a small job does not wait for a large one"
    assert both.heard.index(Wanted(1)) < both.heard.index(both.heard[-1]) - 10
    assert (both.here / "0" / "model").stat().st_size == 64 * PIECE_BYTES


def test_something_else_is_done_after_a_few_pieces(both: Both) -> None:
    both.job(model=b"x" * (PIECES_AT_ONCE + 50))
    for number in range(100):
        (both.there / "0" / f"file-{number}").touch()
    both.ends()
    both.sender.send()
    assert both.sender.busy


def test_job_whose_directory_does_not_fit_is_told_from_one_that_was_fetched(both: Both) -> None:
    assert both.receiver.take(replace(BEGIN, size=2**62)) is False
    (problem,) = [both.receiver.finish(0).problem]
    assert problem is not None
    assert "they are 4294967296 GiB, and" in problem
    assert problem.endswith("left")


def test_file_system_that_does_not_know_its_size_is_not_full(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (0, 0, 0))
    both.job()
    both.ends()
    both.transfer()
    assert both.receiver.finish(0).problem is None


def test_full_disk_ends_the_transfer_of_one_job_alone(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if STAGING in path and path.endswith("/model"):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(outputs.os, "write", full)
    both.job(0, model=b"x" * 100 * PIECE_BYTES)
    both.job(1)
    both.ends(0)
    both.ends(1)
    both.transfer()
    assert both.receiver.finish(0) == Fetched("No space left on device", 0)
    assert both.receiver.finish(1).problem is None
    assert sum(isinstance(message, OutputData) for message in both.heard) < 50, "it is sent in vain"
    assert not (both.here / "0").exists()
    assert not both.reports.path(0).exists()
    assert (both.here / "1" / "log").exists()


def test_file_that_cannot_be_read_is_a_problem(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(outputs, "open_regular", refuse)
    both.job()
    both.ends()
    both.transfer()
    problem = both.receiver.finish(0).problem
    assert problem == f"Permission denied: {both.there}/0/log"


def test_directory_that_cannot_be_read_is_a_problem(both: Both) -> None:
    both.ends()  # the job has removed its directory
    both.transfer()
    problem = both.receiver.finish(0).problem
    assert problem == f"No such file or directory: {both.there}/0"


def test_few_files_are_open_however_many_jobs_have_ended(both: Both, tmp_path: Path) -> None:
    for number in range(20):
        both.job(number, model=b"x" * 20 * PIECE_BYTES)
        both.ends(number)
    most = 0
    while len(both.results()) < 10:
        both.turn()
        links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        most = max(most, sum(link.startswith(str(tmp_path)) for link in links))
    assert 0 < most <= 3 * MAX_JOBS_IN_TURN
    assert [result.number for result in both.results()[:4]] == [0, 1, 2, 3]


def test_logs_of_earlier_attempts_are_kept(both: Both) -> None:
    (both.here / "0" / "a").mkdir(parents=True)
    (both.here / "0" / "log").write_text("first attempt\n")
    (both.here / "0" / "a" / "kept").write_text("kept")
    (both.there / "0" / "a").mkdir(parents=True)
    (both.there / "0" / "a" / "new").write_text("new")
    (both.there / "0" / "log").write_text("second attempt\n")
    both.reports_there.path(0).write_bytes(REPORT)
    log = str(both.there / "0" / "log")
    both.sender.add(Ended(JobResult(0, "", Outcome.COMPLETED, b"", None, (), 1.0, log, attempts=2)))
    both.transfer()
    logs = {"log": "second attempt\n", "log.attempt-1": "first attempt\n"}
    assert tree(both.here / "0") == {**logs, "a/kept": "kept", "a/new": "new"}


def test_only_the_log_is_fetched_of_a_job_without_a_directory_of_its_own(both: Both) -> None:
    (both.there / "0.job.log").write_text("said")
    (both.there / "other").write_text("of another job")
    both.sender.add(Ended(JobResult(0, "", Outcome.FAILED, b"", None, (), 1.0, str(both.there / "0.job.log"))))
    both.transfer()
    assert sorted(path.name for path in both.here.iterdir()) == [DIRECTORY, "0.job.log"]


def test_job_that_writes_elsewhere_has_a_problem(both: Both, tmp_path: Path) -> None:
    both.sender.add(Ended(JobResult(0, "", Outcome.FAILED, b"", None, (), 1.0, str(tmp_path / "job.log"))))
    both.transfer()
    problem = both.receiver.finish(0).problem
    assert problem == f"its directory {tmp_path} is not below that of the sweep, {both.there}"


def test_directory_is_found_though_a_link_leads_to_that_of_the_sweep(both: Both, tmp_path: Path) -> None:
    both.job()
    (tmp_path / "link").symlink_to(both.there.parent)
    both.sender = OutputSender(both.node, tmp_path / "link" / both.there.name, both.reports_there)
    both.ends()
    both.transfer()
    assert both.receiver.finish(0) == Fetched(None, 0, str(both.here / "0" / "log"))
    assert tree(both.here / "0") == {"log": "log of 0\n"}


def test_results_are_sent_without_outputs_when_these_are_given_up(both: Both) -> None:
    both.job(model=b"x" * 100 * PIECE_BYTES)
    both.ends()
    both.turn()
    both.sender.give_up()
    both.transfer()
    assert len(both.results()) == 1
    assert both.receiver.finish(0).problem == "its node did not send all of them"


# The directory on the node


def test_private_directory_is_removed_with_the_parents_that_were_made(tmp_path: Path) -> None:
    private = PrivateDirectory(tmp_path / "multirun" / "today" / "now", b"sweep")
    (private.path / "0").mkdir()
    private.remove()
    private.remove()
    assert list(tmp_path.iterdir()) == []


def test_last_of_several_agents_removes_the_directory(tmp_path: Path) -> None:
    agents = [PrivateDirectory(tmp_path / "sweep", b"sweep") for _ in range(2)]
    (tmp_path / "sweep" / "0").mkdir()
    agents[0].remove()
    assert (tmp_path / "sweep" / "0").exists()
    agents[1].remove()
    assert list(tmp_path.iterdir()) == []


def test_private_directory_of_another_sweep_is_refused(tmp_path: Path) -> None:
    first = PrivateDirectory(tmp_path / "sweep", b"first")
    with pytest.raises(OSError, match="another sweep uses it"):
        PrivateDirectory(tmp_path / "sweep", b"second")
    first.remove()


def test_directory_that_another_agent_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [PrivateDirectory(tmp_path / "sweep", b"sweep")]

    def late(path: Path, *flags: int) -> int:
        if others:
            others.pop().remove()
        return open_regular(path, *flags)

    monkeypatch.setattr(outputs, "open_regular", late)
    private = PrivateDirectory(tmp_path / "sweep", b"sweep")
    assert (tmp_path / "sweep").exists()
    private.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_agents_left_is_removed(tmp_path: Path) -> None:
    killed = PrivateDirectory(tmp_path / "sweep", b"first")
    (tmp_path / "sweep" / "0").mkdir()
    (tmp_path / "sweep" / "file").touch()
    os.close(killed._descriptor)
    killed._descriptor = -1
    private = PrivateDirectory(tmp_path / "sweep", b"second")
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == [DIRECTORY]
    private.remove()


def keeps(directory: Path) -> None:
    (directory / "0").mkdir(parents=True)


def is_a_sweep(directory: Path) -> None:
    (directory / DIRECTORY).mkdir(parents=True)
    (directory / DIRECTORY / "manifest.jsonl").touch()


def test_shared_directory_that_is_seen_late_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_a_sweep(tmp_path / "sweep")
    probe = tmp_path / "sweep" / DIRECTORY / "nodes-1"
    probe.write_bytes(b"sweep")
    sees, asked = agent._sees, []

    def late(probe: str, content: bytes) -> bool:
        asked.append(probe)
        return len(asked) > 1 and sees(probe, content)

    monkeypatch.setattr(agent, "_sees", late)
    setup = Setup(Timing(), "/", (), b"", None, (str(probe), b"sweep"), "auto", "", fetches=True)
    assert agent._private_directory(setup) is None
    assert {path.name for path in probe.parent.iterdir()} == {"manifest.jsonl", "nodes-1"}


@pytest.mark.parametrize("make", [keeps, is_a_sweep])
def test_directory_with_other_files_is_refused_and_kept(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "sweep")
    before = {path for path in tmp_path.rglob("*") if path.name != DIRECTORY}
    for _ in range(2):
        with pytest.raises(OSError, match="other files are there"):
            PrivateDirectory(tmp_path / "sweep", b"sweep")
    assert {path for path in tmp_path.rglob("*") if path.name != DIRECTORY} == before
