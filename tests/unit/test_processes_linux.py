"""The kernel's features that keep a process tree together, on real processes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gpu_launcher.processes import linux
from tests.waiting import until


@contextmanager
def child(name: str | None = None) -> Iterator[int]:
    """A child of this process that sleeps, under a command name of its own."""
    ready, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if name is not None:
            ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME
        os.write(ready_write, b"!")
        time.sleep(60)
        os._exit(0)
    os.close(ready_write)
    os.read(ready, 1)
    os.close(ready)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def by_scan() -> list[int]:
    return linux._children_by_scan(os.getpid())


@pytest.fixture(params=[linux.children, by_scan], ids=["children file", "scan"])
def children(request):
    if request.param is linux.children and not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel has no CONFIG_PROC_CHILDREN")
    return request.param


@pytest.mark.parametrize("name", [None, "a) S 1 (b", "((", "))", "spaces in it", "\udcff"])
def test_children_are_found_whatever_they_are_called(children, name):
    name = name and name.encode("utf-8", "surrogateescape").decode("latin-1")
    with child(name) as pid:
        assert pid in children()
    assert pid not in children()


def test_the_dead_are_children_until_they_are_reaped(children):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert pid in children()
    os.waitpid(pid, 0)
    assert pid not in children()


def test_grandchildren_are_not_children(children):
    script = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(1, flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    (grandchild,) = linux._children_by_scan(process.pid)
    assert process.pid in children()
    assert grandchild not in children()
    os.kill(grandchild, signal.SIGKILL)
    process.communicate()


def test_where_the_kernel_has_no_children_file_proc_is_scanned(monkeypatch):
    def read_text(path, *args, **kwargs):
        raise FileNotFoundError(str(path))

    with child() as pid:
        monkeypatch.setattr(linux, "_children_by_scan", lambda parent: [pid, parent])
        monkeypatch.setattr(linux.Path, "read_text", read_text)
        assert linux.children() == [pid, os.getpid()]


def in_a_process(body) -> None:
    """Run `body` in a forked process, where it may change what kind of process that is. It must return True."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if body() else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_subreaper_gets_the_orphans_below_it_also_those_with_a_session_of_their_own():
    def body():
        linux.become_child_subreaper()
        heard, said = os.pipe()
        first = os.fork()
        if first == 0:
            if os.fork() == 0:
                os.setsid()
                os.write(said, str(os.getpid()).encode())
                time.sleep(60)
            os._exit(0)
        orphan = int(os.read(heard, 99))
        os.waitpid(first, 0)
        assert linux.children() == [orphan]
        linux.kill(orphan)
        return os.waitpid(orphan, 0) == (orphan, signal.SIGKILL)

    in_a_process(body)


def test_a_process_dies_with_its_parent_however_that_dies():
    heard, said = os.pipe()
    parent = os.fork()
    if parent == 0:
        me = os.getpid()
        if os.fork() == 0:
            linux.die_with_parent(me)
            os.write(said, b"ready")
            time.sleep(60)
        time.sleep(60)
        os._exit(0)
    os.close(said)
    assert os.read(heard, 5) == b"ready"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(heard, 1) == b"", "the child's end of the pipe is closed by its death"
    os.close(heard)


def test_a_process_whose_parent_died_before_it_could_ask_ends():
    pid = os.fork()
    if pid == 0:
        linux.die_with_parent(os.getppid() + 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_killing_takes_zombies_in_silence():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    linux.kill(pid)
    assert os.waitpid(pid, 0) == (pid, 0)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")
def test_a_child_of_another_user_cannot_be_killed_and_is_no_error():
    def body():
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        os.setresuid(60001, 60001, 0)
        linux.kill(pid)
        alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.setresuid(0, 0, 0)
        linux.kill(pid)
        return alive and os.waitpid(pid, 0) == (pid, signal.SIGKILL)

    in_a_process(body)


def test_a_thread_that_python_does_not_know_has_the_name_that_the_kernel_gives_it():
    def body():
        libc = ctypes.CDLL(None)
        thread = ctypes.c_ulong()
        pause = ctypes.cast(libc.pause, ctypes.c_void_p)
        assert libc.pthread_create(ctypes.byref(thread), None, pause, None) == 0
        libc.pthread_setname_np(thread, b"of a library")
        return linux.other_threads() == ["of a library"]

    in_a_process(body)


def test_all_threads_are_seen_and_called_as_python_calls_them():
    def body():
        assert linux.other_threads() == []
        go = threading.Event()
        thread = threading.Thread(target=go.wait, name="tensorboard writer")
        thread.start()
        assert linux.other_threads() == ["tensorboard writer"]
        go.set()
        thread.join()
        until(lambda: not linux.other_threads())  # join returns a moment before the kernel's thread is gone
        return True

    in_a_process(body)


def test_a_process_is_ending_as_soon_as_it_cannot_be_kept_from_it():
    assert not linux.ProcessEnding(os.getpid())
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(told, 1)
        os._exit(0)
    ending = linux.ProcessEnding(pid)
    assert not ending
    os.write(tell, b"x")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ending
    os.waitpid(pid, 0)
    assert ending
    assert not linux.ProcessEnding(pid)  # there is none, and that is said by others
    for closed in (told, tell):
        os.close(closed)
    ending.close()


TITLES = """
import json, os, sys, types
from pathlib import Path
from gpu_launcher.processes.linux import set_process_title

before = Path("/proc/self/environ").read_bytes()
for title in json.load(sys.stdin):
    set_process_title(title)
    shown = Path("/proc/self/cmdline").read_bytes().decode(errors="replace")
    name = Path("/proc/self/comm").read_bytes().decode(errors="replace")
    print(json.dumps([shown, name.rstrip("\\n")]))
assert Path("/proc/self/environ").read_bytes() == before
assert os.environ["SECRET"] == "not shown"
assert sys.argv == ["-c", "an", "argument"]
sys.modules["setproctitle"] = types.SimpleNamespace(setproctitle=lambda title: print(json.dumps(["library", title])))
set_process_title("#8 of the library")
"""


def test_process_title_is_bounded_and_changes_nothing_else() -> None:
    titles = ["#7 train.py lr=0.1", "#8 a", "", "x" * 100_000, "#9 学習率=0.1 \udce9 \0 b", "#10 train.py"]
    ran = subprocess.run(
        [sys.executable, "-c", TITLES, "an", "argument"],
        input=json.dumps(titles),
        env={**os.environ, "SECRET": "not shown"},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = [json.loads(line) for line in ran.stdout.splitlines()]
    texts = [text.rstrip("\0") for text, _ in shown]
    assert texts[:3] == ["#7 train.py lr=0.1", "#8 a", ""]
    assert set(texts[3]) == {"x"}
    assert 500 < len(texts[3]) < 100_000
    assert texts[4] == "#9 学習率=0.1 ?   b"
    assert [name for _, name in shown[:2]] == ["#7 train.py lr=", "#8 a"]
    assert shown[-1] == ["library", "#8 of the library"]


def test_processes_that_proc_hides_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def hiding(path: Path, *arguments: str, **keywords: str) -> str:
        if str(path) == f"/proc/{os.getppid()}/stat":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return read(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", hiding)
    with child() as pid:
        found = linux.children_of_all()
    assert pid in found[os.getpid()]
    assert not any(os.getppid() in children for children in found.values())


HEADLESS = """
import ctypes, os, threading, time

threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_stopped_process_is_told_from_one_that_runs_or_is_dead() -> None:
    assert not linux.may_be_stopped(os.getpid())
    with child(") T (") as pid:
        assert not linux.may_be_stopped(pid)
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert linux.may_be_stopped(pid)
        os.kill(pid, signal.SIGCONT)
        until(lambda: not linux.may_be_stopped(pid))
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert not linux.may_be_stopped(dead.pid)
    dead.wait()
    assert not linux.may_be_stopped(dead.pid)


def test_process_may_be_stopped_if_its_main_thread_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", HEADLESS], stdout=subprocess.PIPE) as program:
        try:
            until(lambda: psutil.Process(program.pid).status() == psutil.STATUS_ZOMBIE)
            assert program.poll() is None
            assert linux.may_be_stopped(program.pid)
        finally:
            program.kill()
