"""Who a process is, as far as /proc tells, and when it does not."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from gpu_launcher.devices.origin import origin_of

FIRST = "pid:[4026531836]"


class Proc:
    """A made-up /proc."""

    def __init__(self, root: Path, namespace: str = FIRST) -> None:
        self.root = root
        (root / "proc/self/ns").mkdir(parents=True)
        (root / "proc/self/ns/pid").symlink_to(namespace)

    def process(self, pid: int, parent: int, command: bytes = b"", name: str = "python", *opened: str) -> None:
        directory = self.root / f"proc/{pid}"
        (directory / "fd").mkdir(parents=True)
        (directory / "stat").write_text(f"{pid} ({name}) S {parent} 1 1 0 -1")
        (directory / "comm").write_text(f"{name}\n")
        (directory / "cmdline").write_bytes(command)
        for number, path in enumerate(opened):
            (directory / f"fd/{number}").symlink_to(path)


def test_a_process_has_a_user_a_command_and_ancestors(tmp_path: Path) -> None:
    proc = Proc(tmp_path)
    proc.process(1, 0)
    proc.process(50, 1)
    proc.process(60, 50, b"/usr/bin/python3\0train.py\0lr=0.1\0")
    origin = origin_of(60, tmp_path)
    assert origin is not None
    assert origin.command == "python3 train.py lr=0.1"
    assert origin.ancestors == (50, 1)
    assert origin.user == pwd.getpwuid(os.getuid()).pw_name


@pytest.mark.parametrize(
    ("command", "name", "shown"),
    [
        (b"", "odd) name (x", "odd) name (x"),
        (b"a\0b\n\x1b[31m\0", "a", "a b"),
        (b"python\0t.py\0--password\0hush", "a", "python t.py --password ***"),
        (b"\xff\0", "a", "\ufffd"),
        (b"python\0" + b"x" * 500, "a", "python " + "x" * 72 + "…"),
    ],
)
def test_odd_commands_are_shown_on_one_short_line(tmp_path: Path, command: bytes, name: str, shown: str) -> None:
    Proc(tmp_path).process(60, 0, command, name)
    origin = origin_of(60, tmp_path)
    assert origin is not None
    assert origin.command == shown
    assert origin.ancestors == ()


def test_a_process_that_is_not_there_or_whose_ancestors_are_hidden_cannot_be_attributed(tmp_path: Path) -> None:
    proc = Proc(tmp_path)
    proc.process(60, 50)
    assert origin_of(60, tmp_path) is None
    assert origin_of(61, tmp_path) is None
    assert origin_of(60, tmp_path / "nothing") is None


def test_in_another_namespace_a_process_counts_only_if_it_holds_a_gpu(tmp_path: Path) -> None:
    proc = Proc(tmp_path, "pid:[4026532000]")
    proc.process(1, 0)
    proc.process(60, 1, b"sleep\0", "sleep", "/dev/null", "socket:[1]")
    proc.process(61, 1, b"train\0", "train", "/dev/null", "/dev/nvidia0")
    assert origin_of(60, tmp_path) is None
    origin = origin_of(61, tmp_path)
    assert origin is not None
    assert origin.ancestors == (1,)


def test_this_process_can_be_told(first_namespace: Path) -> None:
    origin = origin_of(os.getpid(), first_namespace)
    assert origin is not None
    assert origin.ancestors[0] == os.getppid()
