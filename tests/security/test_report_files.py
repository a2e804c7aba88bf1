"""Reports and other files of ours in directories that somebody else can write to."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import socket
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.errors import ReportError
from gpu_launcher.jobs.reports import read_header, read_report
from gpu_launcher.processes import rank_decisions
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.rank_decisions import RankDecisions
from gpu_launcher.safe_files import make_directories, open_regular, read_lines, read_regular, why_untrusted

NOBODY = 65534
GOOD = Report(True, None, b"payload", values={"values_0": 0.5, "values_1": 2.0})


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.mark,)


@given(
    st.builds(
        Report,
        st.booleans(),
        st.none() | st.text(),
        st.binary(),
        st.booleans(),
        st.booleans(),
        st.text(),
        st.dictionaries(
            st.text(max_size=9),
            st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=9),
            max_size=9,
        ),
    ),
    st.integers(0, 10**6),
)
def test_report_is_read_as_it_was_written(report: Report, number: int) -> None:
    data = report.dump(number)
    assert Report.load(data) == report
    assert json.loads(data.partition(b"\n")[0])["number"] == number


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("format", "number", "ok", "message", "out_of_memory", "pruned", "origin", "values")


@given(st.binary() | st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda header: json.dumps(header).encode()))
def test_other_bytes_are_a_value_error(data: bytes) -> None:
    for content in (data, data + b"\n", data + b"\n" + zlib.compress(b"x")):
        try:
            Report.load_header(content)
            Report.load(content)
        except ValueError:
            pass


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"format": 1, "values": {"value": ' + b"9" * 400 + b"}}",
        b'{"format": 1, "values": {"value": ' + b"9" * 5000 + b"}}",
        b'{"format": 1, "ok": true, "out_of_memory": false, "pruned": false, "origin": "", "values": {"value": 1'
        + b"0" * 400
        + b"}}",
    ],
    ids=["nested", "400 digits", "5000 digits", "out of range"],
)
def test_forged_header_is_a_value_error(header: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Report.load_header(header + b"\n")


def test_pickled_report_of_another_version_is_not_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "0.report").write_bytes(zlib.compress(pickle.dumps(Trap(mark))))
    assert read_header(tmp_path / "0.report") is None
    with pytest.raises(ReportError, match="no header"):
        read_report(tmp_path / "0.report")
    assert not mark.exists()


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o777])
def test_report_that_others_can_write_needs_its_digest(tmp_path: Path, mode: int) -> None:
    report = tmp_path / "0.report"
    report.write_bytes(GOOD.dump(0))
    report.chmod(mode)
    digest = hashlib.sha256(report.read_bytes()).digest()
    with pytest.raises(ReportError, match=rf"can be written by other users \(mode {mode:o}\)"):
        read_report(report)
    assert read_report(report, digest) == GOOD
    with pytest.raises(ReportError, match="is not what the job wrote"):
        read_report(report, hashlib.sha256(b"").digest())
    assert read_header(report) == Report(True, None, b"", values={"values_0": 0.5, "values_1": 2.0})


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as several users")
def test_report_of_another_user_is_not_loaded(tmp_path: Path) -> None:
    report = tmp_path / "0.report"
    report.write_bytes(GOOD.dump(0))
    os.chown(report, NOBODY, NOBODY)
    with pytest.raises(ReportError, match=f"belongs to user {NOBODY}"):
        read_report(report)


def _unusual(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nowhere"))
    else:
        target = path.with_name("target")
        target.write_bytes(b"content\n")
        path.symlink_to(target) if kind == "link" else path.hardlink_to(target)


KINDS = ["fifo", "directory", "socket", "dangling link", "link"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_read(tmp_path: Path, kind: str) -> None:
    _unusual(tmp_path / "file", kind)
    with pytest.raises(OSError, match=r"not a regular file|symbolic links|No such device"):
        read_regular(tmp_path / "file", 100)
    assert read_header(tmp_path / "file") is None
    with pytest.raises(ReportError):
        read_report(tmp_path / "file")


@pytest.mark.parametrize("kind", [*KINDS, "hard link"])
def test_only_a_regular_file_with_one_name_is_written(tmp_path: Path, kind: str) -> None:
    _unusual(tmp_path / "file", kind)
    for flags in (os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        with pytest.raises(OSError, match=r".") as caught:
            open_regular(tmp_path / "file", flags)
        assert caught.value.errno in (errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EMLINK)
    assert not (tmp_path / "nowhere").exists()
    if "link" in kind and kind != "dangling link":
        assert (tmp_path / "target").read_bytes() == b"content\n"


def test_sparse_file_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        read_regular(tmp_path / "file", 1000)
    with pytest.raises(ReportError, match="larger than"):
        read_report(tmp_path / "file")
    assert read_header(tmp_path / "file") is None


def test_overlong_line_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_launcher.safe_files.MAX_LINE", 8)
    (tmp_path / "file").write_bytes(b"first\n" + b"x" * 20 + b"\nmiddle\n" + b"y" * 8 + b"\nlast")
    assert list(read_lines(tmp_path / "file")) == [b"first\n", b"middle\n", b"last"]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_made_is_not_writable_for_others(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_directories(tmp_path / "a" / "b")
        os.close(open_regular(tmp_path / "a" / "b" / "file", os.O_WRONLY | os.O_CREAT))
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "file"):
        assert not path.stat().st_mode & 0o022
    with open(tmp_path / "a" / "b" / "file", "rb") as file:
        assert why_untrusted(file.fileno()) is None


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in rank_decisions.VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
    RankDecisions.publish(tmp_path / "0.trial", "about")
    return tmp_path / "0.trial"


def test_bulletin_that_was_replaced_is_not_unpickled(published: Path, tmp_path: Path) -> None:
    found = RankDecisions.find()
    assert found is not None
    assert found.about == "about"
    published.write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    with pytest.raises(PermissionError, match="not what the job's main process wrote"):
        RankDecisions.find()
    assert not (tmp_path / "mark").exists()
