"""Sweeps that are checked and started from the form of the pages, and what the form refuses."""

from __future__ import annotations

import html
import re
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import pytest

from gpu_launcher.jobs.launches import launches_in
from tests.waiting import alive, until
from tests.web.serving import Reply, WebServer, title_of

MAP = {"devices": "simulated:2", "command": "sh -c 'echo ran $0' {x}", "parameters": "x=1,2"}
PROGRAM = """
import hydra


@hydra.main(version_base=None, config_path=None)
def main(config):
    print("ran with", config.lr)


if __name__ == "__main__":
    main()
"""


def post(server: WebServer, what: str, **fields: str) -> Reply:
    return server(f"/new/{what}", "POST", urlencode(fields))


def ended(server: WebServer, reply: Reply) -> str:
    """What the page says of a program when it has ended."""
    found = re.search(r'id="program-([0-9a-f]+)"', reply.text)
    assert found is not None, reply.text
    path = f"/new/programs/{found[1]}"
    until(lambda: "hx-trigger" not in server(path).text, "the program did not end")
    return html.unescape(server(path).text)


def check(server: WebServer, **fields: str) -> str:
    return ended(server, post(server, "check", **fields))


def running(server: WebServer, reply: Reply) -> int:
    """The process id that a program has written."""
    path = re.search(r'hx-get="(/new/programs/[0-9a-f]+)"', reply.text)
    assert path is not None
    return int(until(lambda: re.search(r"its (\d+) id\n", server(path[1]).text))[1])


def line_in(text: str) -> str:
    found = re.search(r"<code>(cd .*?)</code>", text)
    assert found is not None, text
    return found[1]


def check_in(text: str) -> str:
    """The id of the check that a page shows."""
    found = re.search(r'name="check" value="([0-9a-f]+)"', text)
    assert found is not None, text
    return found[1]


def start(server: WebServer, **fields: str) -> str:
    """Start what has been checked."""
    checked = check(server, **fields)
    assert "Nothing is wrong" in checked, checked
    return ended(server, post(server, "start", **fields, check=check_in(checked)))


def hydra_form(directory: Path, *parameters: str) -> dict[str, str]:
    (directory / "train it.py").write_text(PROGRAM)
    command = shlex.join([sys.executable, "train it.py"])
    return {
        "kind": "hydra",
        "devices": "simulated:2",
        "command": command,
        "parameters": "\r\n".join(("+lr=0.1,0.2", *parameters)),
    }


def test_a_map_is_checked_and_started(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    server = serving()
    options = {"gpus": "2", "max_parallel": "1", "timeout": "10m", "retries": "1", "priority": "-1"}
    fields = {**MAP, **options, "below": "project"}
    checked = check(server, **fields)
    assert "Nothing is wrong" in checked
    assert "2 runs need 2 GPUs each: 1 can start now" in checked
    line = line_in(checked)
    assert line.startswith(f"cd {tmp_path}/project && ")
    words = shlex.split(line.partition("&& ")[2])
    assert Path(words[0]).name == "gpu-launcher"
    assert words[1:] == [
        *("map", "--detach", "--devices", "simulated:2", "--gpus", "2", "--max-parallel", "1", "--timeout", "10m"),
        *("--retries", "1", "--priority", "-1", "--param", "x=1,2", "--", "sh", "-c", "echo ran $0", "{x}"),
    ]
    assert not (tmp_path / "project" / "map").exists()
    begun = start(server, **fields)
    link = re.search(r'The sweep has begun: see <a href="(/sweeps/[0-9a-f]+)">', begun)
    assert link is not None, begun
    assert title_of(server(link[1])).startswith(f"{tmp_path}/project/map/")
    assert line in html.unescape(server("/new").text)
    until(lambda: {"2 completed<", ">ended<"} <= set(re.findall("2 completed<|>ended<", server("/sweeps").text)))
    assert len(list((tmp_path / "project" / "map").glob("*/*/1/stdout.txt"))) == 1


def test_a_form_that_is_sent_twice_starts_one_sweep(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server, fields = serving(), {**MAP, "command": "echo ran {x}"}
    checked = check_in(check(server, **fields))
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(post, server, "start", **fields, check=checked) for _ in range(4)]
    said = {ended(server, reply.result()) for reply in replies}
    assert len(said) == 1
    assert "The sweep has begun" in said.pop()
    started = re.search(r'id="program-([0-9a-f]+)"', replies[0].result().text)
    assert started is not None
    assert "check it again" in post(server, "start", **fields, check=started[1]).text
    until(lambda: "2 completed<" in server("/sweeps").text)
    assert len(list(tmp_path.glob("map/*/*/1/stdout.txt"))) == 1


def test_a_hydra_sweep_is_started_with_every_option_in_the_line(
    serving: Callable[..., WebServer], tmp_path: Path
) -> None:
    server = serving("--pool-dir", str(tmp_path / "a pool"))
    parameter = f"hydra.launcher.on_end='touch {tmp_path}/over'"
    fields = hydra_form(tmp_path, parameter, "hydra.launcher.dry_run=false", "hydra.mode=RUN")
    checked = check(server, **fields)
    assert "2 jobs need 1 GPU each: all can start now" in checked
    assert not (tmp_path / "multirun").exists()
    assert not (tmp_path / "over").exists()
    line = line_in(checked)
    assert shlex.quote(parameter) in line
    assert f"GPU_LAUNCHER_POOL_DIR='{tmp_path}/a pool'" in line
    begun = start(server, **{**fields, "parameters": fields["parameters"].replace("hydra.mode=RUN", "")})
    assert "The sweep has begun" in begun
    until(lambda: {"2 completed<", ">ended<"} <= set(re.findall("2 completed<|>ended<", server("/sweeps").text)))
    until((tmp_path / "over").exists)
    assert (tmp_path / "a pool").is_dir()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"kind": "shell"}, "Program: 'shell' is neither map nor hydra"),
        ({"root": "7"}, "Directory: choose one of the directories"),
        ({"root": "-1"}, "Directory: choose one of the directories"),
        ({"below": ".."}, "is not a directory below"),
        ({"below": "project/../.."}, "is not a directory below"),
        ({"below": "/"}, "is not a directory below"),
        ({"below": "/etc"}, "is not a directory below"),
        ({"below": "link"}, "is not a directory below"),
        ({"below": "project/link"}, "is not a directory below"),
        ({"below": "file"}, "is not a directory below"),
        ({"below": "missing"}, "is not a directory below"),
        ({"below": "project\0"}, "Directory in it: there is a line break"),
        ({"command": ""}, "Command: give a command, such as"),
        ({"command": "''"}, "Command: give a command, such as"),
        ({"command": "echo 'x"}, "Command: no closing quotation"),
        ({"command": "echo\nrm"}, "Command: there is a line break"),
        ({"parameters": ""}, "Parameters: give one on each line"),
        ({"parameters": "--shell"}, "is an option, not a parameter"),
        ({"parameters": "x=1\n-m"}, "is an option, not a parameter"),
        ({"parameters": "x=1\r2"}, "Parameters: there is a line break"),
        ({"parameters": "x=1\u2028y=2"}, "Parameters: there is a line break"),
        ({"devices": "cpu:x"}, "Devices: "),
        ({"devices": "0,\u202e1"}, "Devices: there is a line break"),
        ({"gpus": "1.5"}, "GPUs per job: '1.5' is neither"),
        ({"gpus": "1 --shell"}, "GPUs per job: '1 --shell' is neither"),
        ({"max_parallel": "0"}, "Jobs at the same time: must be an integer >= 1"),
        ({"timeout": "soon"}, "Time limit of a job: 'soon' is not a time span"),
        ({"retries": "-1"}, "Retries: must be an integer >= 0"),
        ({"priority": "1e9"}, "Priority: must be an integer from"),
    ],
)
def test_each_field_is_checked(server: WebServer, sweeps: Path, changed: dict[str, str], problem: str) -> None:
    (sweeps / "project").mkdir(exist_ok=True)
    for link in (sweeps / "link", sweeps / "project" / "link"):
        if not link.is_symlink():
            link.symlink_to("/")
    (sweeps / "file").touch()
    for what in ("check", "start"):
        text = html.unescape(post(server, what, **{**MAP, **changed}).text)
        assert problem in text
        assert "program-" not in text


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"parameters": "x"}, "is not NAME=VALUES in Hydra's syntax"),
        ({"parameters": "y=1"}, "{x}"),
        ({"command": "no-such-program {x}"}, "there is no such program"),
        ({"gpus": "3"}, "is never granted"),
        ({"parameters": "x=<script>alert(1)</script>"}, "is not NAME=VALUES in Hydra's syntax"),
    ],
)
def test_what_the_dry_run_refuses_is_shown(server: WebServer, changed: dict[str, str], problem: str) -> None:
    text = check(server, **{**MAP, **changed})
    assert problem in text
    assert "It cannot be started like this: exit code" in text
    assert "/new/start" not in text


def test_a_sweep_is_started_only_by_the_line_that_was_shown(server: WebServer, sweeps: Path) -> None:
    id = check_in(check(server, **MAP))
    marker = sweeps / "marker"
    fields = {**MAP, "command": f"touch {shlex.quote(str(marker))} {{x}}"}
    for given in ({}, {"check": ""}, {"check": "0" * 16}, {"check": id}):
        assert "the form has changed since it was checked" in post(server, "start", **fields, **given).text
    assert not (sweeps / "map").exists()
    assert not marker.exists()


def test_a_line_that_cannot_be_shown_is_not_run(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    directory = tmp_path / "a\nb\udcff"
    directory.mkdir()
    server = serving(directory=directory)
    assert server("/new").status == 200
    for what in ("check", "start"):
        assert "Directory: its path, or that of the pool, has a character" in post(server, what, **MAP).text


def test_a_program_that_cannot_be_run_is_said(server: WebServer) -> None:
    reply = post(server, "check", **{**MAP, "kind": "hydra", "command": "no-such-program"})
    assert "it cannot be run: no-such-program: No such file" in reply.text


def test_an_error_at_the_start_is_shown(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    server = serving()
    fields = {**MAP, "command": "./program {x}"}
    id = check_in(check(server, **fields))
    program.unlink()
    said = ended(server, post(server, "start", **fields, check=id))
    assert "The sweep did not begin: exit code 2" in said
    assert "there is no such program" in said
    assert "there is no such program" in html.unescape(server("/new").text)


def test_a_sweep_outlives_the_server_that_started_it(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    id = check_in(check(server, **MAP))
    assert "program-" in post(server, "start", **MAP, check=id).text
    server.process.kill()
    until(lambda: len(list(tmp_path.glob("map/*/*/[01]/stdout.txt"))) == 2)
    until(lambda: all("ran" in out.read_text() for out in tmp_path.glob("map/*/*/[01]/stdout.txt")))
    (directory,) = tmp_path.glob("map/*/*")
    until(lambda: not any(launch.is_alive for launch in launches_in(directory)))


def test_a_check_ends_with_the_next_one_and_with_the_server(serving: Callable[..., WebServer]) -> None:
    server = serving()
    fields = {**MAP, "kind": "hydra", "command": "sh -c 'echo its $$ id; exec sleep 1000'"}

    first = post(server, "check", **fields)
    one = running(server, first)
    two = running(server, post(server, "check", **fields))
    assert "ended by signal 15" in ended(server, first)
    assert not alive(one)
    assert server.end() == 0
    until(lambda: not alive(two))


def test_a_check_ends_when_the_server_is_killed(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho its $$ id\nexec sleep 1000\n")
    program.chmod(0o755)
    pid = running(server, post(server, "check", **{**MAP, "kind": "hydra", "command": "./program"}))
    assert alive(pid)
    server.process.kill()
    until(lambda: not alive(pid))


def test_checks_that_do_not_end_are_killed(serving: Callable[..., WebServer]) -> None:
    server = serving()
    script = "trap : TERM; echo its $$ id; while :; do sleep 0.1; done"
    fields = {**MAP, "kind": "hydra", "command": shlex.join(["sh", "-c", script])}
    first, second = (running(server, post(server, "check", **fields)) for _ in range(2))
    assert alive(second)
    third = running(server, post(server, "check", **fields))
    until(lambda: not alive(first))
    assert server.end() == 0
    until(lambda: not alive(second) and not alive(third))


@pytest.mark.parametrize("what", ["check", "start"])
def test_other_sites_and_reading_requests_start_nothing(server: WebServer, sweeps: Path, what: str) -> None:
    body = urlencode({**MAP, "command": f"touch {shlex.quote(str(sweeps / 'attacked'))} {{x}}"})
    for origin in ("http://evil.example", "null"):
        assert server(f"/new/{what}", "POST", body, origin=origin).status == 403
    assert server(f"/new/{what}", "POST", body, Origin="").status == 403
    assert server(f"/new/{what}", "POST", body, cookie="a=b").status == 403
    assert server(f"/new/{what}?{body}").status == 405
    assert server("/new/nonsense", "POST", body).status == 404
    assert server("/new/programs/nonsense").status == 404
    assert not (sweeps / "attacked").exists()


def test_a_read_only_server_starts_nothing(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving("--read-only")
    assert "/new" not in server("/pool").text
    assert server("/new").status == 404
    assert server("/new/programs/x").status == 404
    for what in ("check", "start"):
        assert post(server, what, **MAP).status == 404
    assert not (tmp_path / "map").exists()
