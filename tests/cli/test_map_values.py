"""Tests unusual input of `gpu-launcher map`: shell text, invalid values, closed terminals and streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until

CLI = (sys.executable, "-m", "gpu_launcher.cli")
REPOSITORY = Path(__file__).parents[2]
SIMULATED = ("--devices", "simulated:2", "--dir", "out")

Done = subprocess.CompletedProcess[str]
RunCli = Callable[..., Done]


def environment(directory: Path) -> dict[str, str]:
    not_ours = ("CUDA_", "GPU_LAUNCHER_", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(not_ours)}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "GPU_LAUNCHER_POOL_DIR": str(directory / "pool")}


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCli:
    """Run `gpu-launcher` in a directory with its own pool."""

    def run(*words: str, **how: Any) -> Done:
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
        if "input" in how:
            del how["stdin"]
        how = {"cwd": tmp_path, "env": {**environment(tmp_path), **how.pop("environ", {})}, **how}
        command = [*how.pop("within", ()), *CLI, *words]
        return subprocess.run(command, **how, text=True, timeout=500, check=False)

    return run


@pytest.fixture
def run_map(run_cli: RunCli) -> RunCli:
    return lambda *words, **how: run_cli("map", *words, **how)


def results(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "out" / "results.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: line["index"])


# Closed terminals


def test_a_map_whose_terminal_is_closed_ends_its_runs_with_their_grace(terminal: Any, tmp_path: Path) -> None:
    """The terminal is closed before the map writes its last lines, so nothing reads them."""
    (tmp_path / "save.sh").write_text("trap 'touch saved; exit 7' INT; touch began; while :; do sleep 0.05; done")
    words = ("--param", "n=1", "--devices", "simulated:2", "--dir", str(tmp_path / "out"))
    shown = terminal("map", *words, "--shell", "--", f"cd {tmp_path}; exec bash save.sh {{n}}")
    until((tmp_path / "began").exists)
    os.close(shown.master)
    shown.master = os.open(os.devnull, os.O_RDONLY)
    _, status = os.waitpid(shown.pid, 0)
    shown.status = os.waitstatus_to_exitcode(status)
    assert shown.status == 128 + signal.SIGHUP
    assert (tmp_path / "saved").exists()
    (line,) = results(tmp_path)
    assert (line["outcome"], line["exit_code"]) == ("cancelled", 7)
    assert json.loads((tmp_path / "out" / "0" / "outcome.json").read_text())["outcome"] == "cancelled"


# Streams that cannot be written


@pytest.fixture
def full() -> Any:
    with open("/dev/full", "w") as file:
        yield file


def test_a_map_has_done_what_it_has_done_though_nobody_is_told(run_map: RunCli, tmp_path: Path, full: Any) -> None:
    words = ("--param", "n=1,2", "--devices", "simulated:2")
    done = run_map(*words, "--dir", "out", "--", "echo", "{n}", stdout=full)
    assert done.returncode == 0
    assert done.stderr.endswith("gpu-launcher: stdout cannot be written to: No space left on device\n")
    assert [line["outcome"] for line in results(tmp_path)] == ["completed"] * 2
    assert run_map(*words, "--dir", "other", "--", "echo", "{n}", stdout=full, stderr=full).returncode == 0
    assert run_map(*words, "--dir", "third", "--", "test", "1", "=", "{n}", stdout=full, stderr=full).returncode == 1


def test_a_map_of_which_only_the_first_line_is_read_has_done_what_it_has_done(run_map: RunCli, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_map("--param", "n=1,2", *SIMULATED, "--", "echo", "{n}", stdout=writer, stderr=writer)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert [line["outcome"] for line in results(tmp_path)] == ["completed"] * 2


@pytest.mark.parametrize(
    "words",
    [
        ("map", "--param", "n=1,2", "--dry-run", "--", "echo", "{n}"),
        ("map", "--param", "n=range(30)", "--dry-run", "--", "echo", "{n}"),
        ("map", "--help"),
        ("--version",),
        ("status", "--devices", "simulated:2"),
        ("status", "--devices", "simulated:2", "--json"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_said_in_one_line(
    run_cli: RunCli, words: tuple[str, ...], unbuffered: str, full: Any
) -> None:
    done = run_cli(*words, stdout=full, environ={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "gpu-launcher: stdout cannot be written to: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--gpus", "5", "--devices", "simulated:2", "--", "true"),
        ("map", "--param", "n", "--", "echo", "{n}"),
        ("no-such-command",),
        ("map", "--retries", "x"),
    ],
    ids=" ".join,
)
def test_who_cannot_complain_still_exits_with_the_code_for_it(run_cli: RunCli, words: Any, full: Any) -> None:
    assert run_cli(*words).returncode == 2
    assert run_cli(*words, stderr=full).returncode == 2


def test_run_exits_as_its_command_though_it_cannot_speak(run_cli: RunCli, full: Any) -> None:
    words = ("run", "--devices", "simulated:2", "--timeout", "0.3", "--", "sleep", "60")
    assert run_cli(*words, stderr=full).returncode == 124


# Text for a shell

ODD = [
    "$(touch evil)x",
    "'; touch evil; '",
    "`touch evil`",
    "a\nEOF\ntouch evil\n",
    '"; touch evil; "',
    "x y  *",
    "",
    "#",
    "\\",
]


@pytest.mark.parametrize(
    "text",
    [
        "# don't\nprintf '%s\\n' {json} > {index}.said",
        "cat > {index}.said <<EOF\n{json}\nEOF",
        "cat > {index}.said <<'EOF'\n{json}\nEOF",
        "f() {{ printf '%s\\n' {json}; }}; f other > {index}.said",
        "set -- other; printf '%s\\n' {json} > {index}.said # it's {{json}}",
        "printf '%s\\n' \"$(printf '%s' {json})\" > {index}.said",
        "case x in x) printf '%s\\n' {json} > {index}.said;; esac",
        "echo $((1 << 2)) ' # ' >&2; printf '%s\\n' {json} > {index}.said",
        "echo \\# \\\n# 'comment\nprintf '%s\\n' {json} > {index}.said",
        "echo a#'b' $(echo)#'c' >&2; (echo)# don't\nprintf '%s\\n' {json} > {index}.said",
        "printf '%s\\n' \"${{HOME:-'}}\" >&2; printf '%s\\n' {json} > {index}.said",
    ],
)
def test_no_value_is_ever_parsed_by_a_shell(run_map: RunCli, tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps({'a': value})}\n" for value in ODD))
    done = run_map("--from", "p.jsonl", *SIMULATED, "--shell", "--", text)
    assert not (tmp_path / "evil").exists()
    if "<<EOF" in text or "<<'EOF'" in text:
        assert done.returncode == 2
        assert "{index} stands" not in done.stderr, "which is before it"
        assert "gpu-launcher: {json} stands behind <<, after which text follows that is not a command" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"{index}.said").read_text() for index in range(len(ODD))]
    assert [json.loads(one) for one in said] == [{"a": value} for value in ODD]


def test_a_dry_run_for_a_shell_prints_what_does_the_same_in_one(run_map: RunCli, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps({'a': value})}\n" for value in ODD if "\n" not in value))
    words = ("--from", "p.jsonl", "--shell", "--", "# don't\nprintf '%s|' {a} {flags}")
    dry = run_map("--dry-run", *words)
    assert run_map(*SIMULATED, *words).returncode == 0
    pasted = subprocess.run(["sh", "-c", dry.stdout], cwd=tmp_path, capture_output=True, text=True, check=True)
    run = "".join(Path(line["stdout"]).read_text() for line in results(tmp_path))
    assert pasted.stdout == run != ""
    assert not (tmp_path / "evil").exists()


# Invalid grids and text


@pytest.mark.parametrize(
    ("param", "problem"),
    [
        ("n=range(1,2,0)", "range() arg 3 must not be zero"),
        ("n=range(1,2,nan)", "is not NAME=VALUES"),
        ("n=range(0.5,2,0)", "is not NAME=VALUES"),
        ("n=range(0,inf)", "more than 1000000 values"),
        ("n=range(0,50000000)", "more than 1000000 values"),
        ("n=shuffle(range(0,50000000))", "more than 1000000 values"),
        ("n=1,range(3)", "a range cannot be one value of several"),
        ("n=[1,2],[range(3)]", "is not NAME=VALUES"),
        ("=1", "'=1' has no name"),
        ("n=sort(1,x)", "is not NAME=VALUES"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused_before_it_takes_memory(
    run_map: RunCli, param: str, problem: str
) -> None:
    limited = ("sh", "-c", 'ulimit -v 1000000; exec "$@"', "sh")
    done = run_map("--param", param, "--dry-run", "--", "echo", "{json}", within=limited)
    assert done.returncode == 2, done.stderr
    assert problem in done.stderr
    assert done.stderr.startswith("gpu-launcher: --param: ")
    assert done.stderr.count("\n") == 1


def test_a_range_as_long_as_may_be_is_taken(run_map: RunCli) -> None:
    done = run_map("--param", "n=shuffle(range(1000000))", "--dry-run", "--", "echo", "{n}")
    assert done.returncode == 0
    assert done.stderr.startswith("... and 999980 more: 1000000 runs\n")


def test_half_a_character_is_no_argument_and_can_be_in_json(run_map: RunCli, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"s": "\\ud800"}\n{"s": "é"}\n{"\\ud800": 1, "s": ""}\n')
    for words in (("--dry-run",), SIMULATED):
        refused = run_map("--from", "p.jsonl", *words, "--", "echo", "{s}")
        assert refused.returncode == 2
        assert "p.jsonl, line 1, does not fit: 's' has half a character (a lone surrogate)" in refused.stderr
    names = run_map("--from", "p.jsonl", "--keep-going", "--dry-run", "--", "echo", "{flags}")
    assert (names.returncode, names.stdout) == (1, "echo --s 'é'\n")
    done = run_map("--from", "p.jsonl", *SIMULATED, "--", "printf", "%s\\n", "{json}")
    assert done.returncode == 0, done.stderr
    assert [line["output"] for line in results(tmp_path)] == [{"s": "\ud800"}, {"s": "é"}, {"\ud800": 1, "s": ""}]


def test_bytes_that_are_no_text_pass_through(run_map: RunCli, tmp_path: Path) -> None:
    words = ("--param", "n=1", "--", "printf", "%s{n}", os.fsdecode(b"caf\xe9"))
    assert run_map("--dry-run", *words).stdout == "printf %s1 'caf\\udce9'\n"
    assert run_map(*SIMULATED, *words).returncode == 0
    assert (tmp_path / "out" / "0" / "stdout.txt").read_bytes() == b"caf\xe91"


def test_parameters_have_names_and_tables_may_have_them_in_capitals(run_map: RunCli, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"": 1}\n')
    nameless = run_map("--from", "p.jsonl", "--dry-run", "--", "echo", "{flags}")
    assert nameless.returncode == 2
    assert "p.jsonl, line 1, has a parameter without a name" in nameless.stderr
    (tmp_path / "P.CSV").write_text("n\n1\n")
    assert run_map("--from", "P.CSV", "--dry-run", "--", "echo", "{n}").stdout == "echo 1\n"


def test_scripts_are_looked_for_where_their_interpreters_look(run_map: RunCli, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "myscript").write_text("echo said $1")
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = run_map("--param", "n=1", *SIMULATED, "--", "bash", "myscript", "{n}", environ=path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "0" / "stdout.txt").read_text() == "said 1\n"
    refused = run_map("--param", "n=1", "--", "bash", "myscript", "{n}")
    assert refused.returncode == 2
    assert "'myscript', which bash is to run, does not exist" in refused.stderr
    assert run_map("--param", "n=1", "--", sys.executable, "myscript", "{n}", environ=path).returncode == 2
    (tmp_path / "bin" / "node").write_text("#!/bin/sh\necho $*\n")
    (tmp_path / "bin" / "node").chmod(0o755)
    assert run_map("--param", "n=1", "--dry-run", "--", "node", "inspect", "{n}", environ=path).returncode == 0


# Invalid options, and how messages name them


@pytest.mark.parametrize("devices", ["nonsense", "cpu:0", "simulated:x", "0,,1", ""])
def test_run_without_devices_refuses_devices_that_cannot_be_meant(run_cli: RunCli, devices: str) -> None:
    done = run_cli("run", "--gpus", "0", "--devices", devices, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu-launcher: --devices: ")
    assert run_cli("run", "--gpus", "0", "--devices", "simulated:2", "--", "echo", "ran").stdout == "ran\n"


@pytest.mark.parametrize("command", ["run", "map"])
def test_a_share_too_small_to_be_meant_is_refused(run_cli: RunCli, command: str) -> None:
    words = () if command == "run" else ("--param", "n=1")
    done = run_cli(command, *words, "--gpus", "0.0000001", "--devices", "simulated:2", "--", "echo", "{n}")
    assert done.returncode == 2
    assert "--gpus: '0.0000001' is too small a part of a device: give 0.001 or more" in done.stderr


def test_no_run_is_told_that_none_of_the_memory_is_its_own(run_cli: RunCli) -> None:
    words = ("run", "--memory", "1MiB", "--devices", "simulated:1", "--")
    assert float(run_cli(*words, "sh", "-c", "echo $GPU_LAUNCHER_MEMORY_FRACTION").stdout) > 0


def test_messages_name_what_was_written(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ("--devices", "simulated:2", "--", "echo")
    no_directory = run_cli("run", "--pool-dir", "file", *words).stderr
    assert f"{tmp_path / 'file'}: is not a directory: remove what is there\n" in no_directory
    assert "pool_dir" not in no_directory, "a second pool would give the devices away again"
    for command in (("run",), ("map", "--param", "n=1")):
        many = run_cli(*command, "--gpus", "5", *words, "{n}")
        assert many.returncode == 2
        assert "ask for fewer or allow more devices" in many.stderr
        assert "`" not in many.stderr
