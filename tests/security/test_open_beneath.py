"""Tests that files beneath a directory are opened by no symbolic link, and that nothing outside it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_launcher.safe_files import open_beneath


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "root"
    (root / "job" / "deep").mkdir(parents=True)
    (root / "job" / "log").write_text("log")
    (root / "job" / "out").symlink_to(tmp_path / "secret")
    (root / "job" / "in").symlink_to("log")
    (root / "up").symlink_to(tmp_path)
    (root / "same").symlink_to("job")
    os.mkfifo(root / "job" / "fifo")
    return root


def test_a_file_beneath_is_opened(root: Path) -> None:
    descriptor = open_beneath(root, ("job", "log"))
    assert os.read(descriptor, 10) == b"log"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_a_directory_beneath_is_opened(root: Path) -> None:
    for parts in ((), ("job",), ("job", "deep")):
        descriptor = open_beneath(root, parts, directory=True)
        assert os.path.samestat(os.fstat(descriptor), root.joinpath(*parts).stat())
        os.close(descriptor)


def test_the_directory_itself_may_be_named_by_a_link(root: Path) -> None:
    descriptor = open_beneath(root / "same", ("log",))
    os.close(descriptor)


@pytest.mark.parametrize(
    "parts",
    [
        ("..", "secret"),
        ("job", "..", "..", "secret"),
        ("job/../../secret",),
        ("/etc/passwd",),
        ("", "etc", "passwd"),
        (".", "job", "log"),
        ("job", "log\0"),
        ("job", "out"),
        ("job", "in"),
        ("up", "secret"),
        ("same", "log"),
        ("job", "fifo"),
        ("job", "deep"),
        ("job", "log", "more"),
        ("job", "none"),
        ("n" * 300,),
    ],
)
def test_nothing_else_is_opened(root: Path, parts: tuple[str, ...]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError):  # noqa: PT011
        open_beneath(root, parts)
    with pytest.raises(OSError):  # noqa: PT011
        open_beneath(root, (*parts, "x"), directory=True)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
