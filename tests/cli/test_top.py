"""Tests `gpu-launcher top` in a real terminal: what it shows, and that it restores the terminal however it ends."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Cli, Lab, Terminal  # type: ignore[import-not-found]

CLI = (sys.executable, "-m", "gpu_launcher.cli")
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def painted(top: Terminal, text: str) -> Callable[[], bool]:
    return lambda: bool(top.frames) and any(text in line for line in top.frames[-1])


@pytest.mark.smoke
def test_it_shows_what_status_shows_and_changes_with_it(lab: Lab, terminal: Callable[..., Terminal]) -> None:
    top = terminal("top")
    top.read_until(painted(top, "train.py #0 lr=0.1"))
    top.read_until(painted(top, "busy: it is used by jupyter"))
    top.read_until(painted(top, "waits for 2 more of GPU 0"))
    lab.machine.now("0.utilisation 12")
    top.read_until(painted(top, " 12%  1 "))
    lab.cli.started[1].communicate()  # the holder ends
    top.read_until(painted(top, "the queue is empty"))
    assert not painted(top, "train.py")()
    top.press("q")
    assert top.wait() == 0


def test_who_is_busy_is_judged_by_the_memory_that_is_given(lab: Lab, terminal: Callable[..., Terminal]) -> None:
    top = terminal("top", "--busy-memory", "null", size=(100, 24))
    top.read_until(painted(top, "free, though used from outside the pool by jupyter"))
    assert not painted(top, "busy: ")()
    top.press("q")
    assert top.wait() == 0


def test_it_paints_every_second_and_fits_into_the_terminal(lab: Lab, terminal: Callable[..., Terminal]) -> None:
    top = terminal("top", size=(72, 16))
    top.read_until(lambda: len(top.frames) >= 4)
    top.press("q")
    assert top.wait() == 0
    for frame in top.frames[:-1]:
        assert len(frame) == 16
        assert max(map(len, frame)) <= 71
    clocks = [re.match(r"\d\d:\d\d:\d\d", frame[-1]) for frame in top.frames[1:3]]
    assert all(clocks)
    assert any("more lines" in line for line in top.frames[-1])


def test_a_pool_that_comes_into_being_is_seen(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    top = terminal("top", "--devices", "simulated:4", size=(200, 24))
    top.read_until(painted(top, "not there yet"))
    cli.hold(["simulated:4", 1, None, 0, "train.py #0"])
    top.read_until(painted(top, "train.py #0"))
    top.press("q")
    assert top.wait() == 0


def test_a_larger_terminal_is_filled_at_once(lab: Lab, terminal: Callable[..., Terminal]) -> None:
    top = terminal("top", size=(72, 10))
    top.read_until(painted(top, "more lines"))
    top.resize(130, 40)
    top.read_until(lambda: len(top.frames[-1]) == 40 and "NVIDIA H100" in "".join(top.frames[-1]))
    top.press("q")
    assert top.wait() == 0


@pytest.mark.parametrize(
    ("end", "code"),
    [("q", 0), ("Q", 0), ("\x03", 0), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)],
)
def test_the_terminal_is_as_before_whatever_ends_it(
    cli: Cli, terminal: Callable[..., Terminal], end: str | signal.Signals, code: int
) -> None:
    top = terminal("top")
    before = top.initial_attributes
    top.read_until(lambda: len(top.frames) >= 1)
    assert top.attributes() != before
    if isinstance(end, str):
        top.press(end)
    else:
        os.kill(top.pid, end)
    top.read_until(lambda: LEAVE in top.text)
    until(lambda: top.attributes() == before, "the terminal is not as before")
    assert top.wait() == code
    assert top.text.count(ENTER) == top.text.count(LEAVE) == 1
    assert "Traceback" not in top.text


def test_the_terminal_is_as_before_when_the_pool_is_lost_and_the_reason_is_told(
    cli: Cli, terminal: Callable[..., Terminal]
) -> None:
    cli.hold(["simulated:1", 1, None, 0, "train.py #0"])
    top = terminal("top")
    top.read_until(painted(top, "train.py #0"))
    cli.pool.rename(cli.pool.with_name("elsewhere"))
    cli.pool.touch()
    assert top.wait() == 1
    assert re.search(r"gpu-launcher: pool directory .*: is not a directory", top.text[top.text.index(LEAVE) :])


def test_a_pool_that_is_removed_and_made_anew_is_followed(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    cli.hold(["simulated:1", 1, None, 0, "old.py"])
    top = terminal("top", size=(200, 24))
    top.read_until(painted(top, "old.py"))
    cli.pool.rename(cli.pool.with_name("elsewhere"))
    top.read_until(painted(top, "not there yet"))
    cli.hold(["simulated:1", 1, None, 0, "new.py"])
    top.read_until(painted(top, "new.py"))
    top.press("q")
    assert top.wait() == 0


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    shell = terminal("--norc", "--noprofile", "-i", within=("bash",), PS1="ready> ")
    shell.read_until(lambda: "ready> " in shell.text)
    before = shell.attributes()
    shell.press(f"{' '.join(CLI)} top\r")
    shell.read_until(lambda: len(shell.frames) >= 1)
    shell.press("\x1a")
    shell.read_until(lambda: "ready> " in shell.text.partition("Stopped")[2])
    assert LEAVE in shell.text
    assert shell.attributes() == before
    shell.press("fg\r")
    shell.read_until(lambda: shell.text.count(ENTER) == 2 and shell.text.rindex("\x1b[H") > shell.text.rindex(ENTER))
    shell.press("q")
    shell.read_until(lambda: shell.text.count(LEAVE) == 2 and "ready> " in shell.text[shell.text.rindex(LEAVE) :])
    shell.press("exit $?\r")
    assert shell.wait() == 0


def test_a_terminal_that_hangs_up_ends_it(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    top = terminal("top")
    top.read_until(lambda: len(top.frames) >= 1)
    os.close(top.master)
    top.master = os.open(os.devnull, os.O_RDONLY)
    _, status = until(lambda: ended if any(ended := os.waitpid(top.pid, os.WNOHANG)) else None, "it does not end")
    top.status = os.waitstatus_to_exitcode(status)
    assert top.status in (0, 128 + signal.SIGHUP)


@pytest.mark.parametrize("environ", [{}, {"TERM": "dumb"}])
def test_without_a_terminal_it_shows_one_status_and_says_so(cli: Cli, environ: dict[str, str]) -> None:
    cli.hold(["simulated:1", 1, None, 0, "train.py #0"])
    done = cli("top", **environ)
    assert done.returncode == 0
    assert "train.py #0" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == "gpu-launcher top: this terminal cannot show a live view, so this is a single status\n"


def test_no_process_is_left_that_watched_the_gpus(lab: Lab, terminal: Callable[..., Terminal]) -> None:
    top = terminal("top")
    top.read_until(painted(top, "97%"))
    children = Path(f"/proc/{top.pid}/task/{top.pid}/children").read_text().split()
    assert len(children) == 1
    top.press("q")
    assert top.wait() == 0
    assert not Path(f"/proc/{children[0]}").exists()
