"""Tests `gpu-launcher map` in separate processes, each test with its own pool."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_launcher import Sweep
from gpu_launcher.jobs.manifest import read
from tests.waiting import until

CLI = (sys.executable, "-m", "gpu_launcher.cli")
REPOSITORY = Path(__file__).parents[2]

ECHO = """
import json, os, sys
print("working")
print(json.dumps({"argv": sys.argv[1:], "mask": os.environ.get("CUDA_VISIBLE_DEVICES")}))
print("done", file=sys.stderr)
"""


@dataclass
class Map:
    """Runs `gpu-launcher map` in a directory."""

    path: Path

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "GPU_LAUNCHER_"))}
        return {**kept, "PYTHONPATH": str(REPOSITORY), "GPU_LAUNCHER_POOL_DIR": str(self.path / "pool")}

    def start(self, *words: str, **how: Any) -> subprocess.Popen[str]:
        how = {"stdin": subprocess.DEVNULL, **how}
        command = [*CLI, "map", *words]
        return subprocess.Popen(
            command, cwd=self.path, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
        )

    def __call__(self, *words: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CLI, "map", *words],
            cwd=self.path,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
            **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
        )

    def results(self, directory: str = "out") -> list[dict[str, Any]]:
        """The result lines, in the order of the runs. Each run must have at most one."""
        lines = [json.loads(line) for line in (self.path / directory / "results.jsonl").read_text().splitlines()]
        assert len({line["index"] for line in lines}) == len(lines)
        return sorted(lines, key=lambda line: line["index"])

    def argv(self, directory: str = "out") -> list[list[str]]:
        return [line["output"]["argv"] for line in self.results(directory)]


SIMULATED = ("--devices", "simulated:2", "--dir", "out")


@pytest.fixture
def run_map(tmp_path: Path) -> Map:
    (tmp_path / "echo.py").write_text(ECHO)
    return Map(tmp_path)


@pytest.mark.smoke
def test_a_grid_runs_and_each_run_has_its_directory_and_its_line(run_map: Map, tmp_path: Path) -> None:
    words = ("--param", "learning_rate=1e-3,1e-4", "--param", "batch_size=32,64", "--csv", *SIMULATED)
    done = run_map(*words, "--", sys.executable, "echo.py", "--params", "{json}", "{flags}", "{index}", "{gpu}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/results.jsonl\n"
    assert "[gpu-launcher] 4 jobs: 4 completed in" in done.stderr
    results = run_map.results()
    assert [line["params"] for line in results] == [
        {"learning_rate": 0.001, "batch_size": 32},
        {"learning_rate": 0.001, "batch_size": 64},
        {"learning_rate": 0.0001, "batch_size": 32},
        {"learning_rate": 0.0001, "batch_size": 64},
    ]
    for index, line in enumerate(results):
        directory = tmp_path / "out" / str(index)
        assert (line["index"], line["outcome"], line["exit_code"], line["attempts"]) == (index, "completed", 0, 1)
        assert line["message"] is None
        assert 0 < line["duration"] < 60
        (device,) = line["devices"]
        mask = line["output"]["mask"]
        assert device == f"simulated GPU {mask}"
        rate, size = str(line["params"]["learning_rate"]), str(line["params"]["batch_size"])
        flags = ["--learning_rate", rate, "--batch_size", size]
        assert line["output"]["argv"] == ["--params", json.dumps(line["params"]), *flags, str(index), mask]
        assert (line["directory"], line["stdout"]) == (str(directory), str(directory / "stdout.txt"))
        assert (directory / "stdout.txt").read_text().startswith("working\n")
        assert Path(line["stderr"]).read_text() == "done\n"
        assert json.loads((directory / "params.json").read_text()) == line["params"]
        outcome = json.loads((directory / "outcome.json").read_text())
        assert outcome.items() <= line.items()
        assert {"outcome", "exit_code", "duration", "devices", "output"} <= outcome.keys()
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["params.batch_size"] for row in sorted(rows, key=lambda row: row["index"])] == ["32", "64", "32", "64"]
    assert all(row["outcome"] == "completed" and row["output.mask"] in "01" for row in rows)


odd = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0") | st.sampled_from("'\"\\ $`!*{}-\n\té"),
    max_size=12,
)


@pytest.mark.parametrize("shell", [False, True])
def test_odd_values_arrive_intact(run_map: Map, tmp_path: Path, shell: bool) -> None:
    batch = 0

    @given(st.lists(st.fixed_dictionaries({"a": odd, "b": odd | st.integers() | st.floats()}), min_size=5, max_size=5))
    @settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def arrive(records: list[dict[str, Any]]) -> None:
        nonlocal batch
        batch += 1
        (tmp_path / "params.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        words = ("--from", "params.jsonl", "--devices", "simulated:2", "--dir", f"out{batch}", "--param", "c='a b',-")
        command = (sys.executable, "echo.py", "{json}", "{flags}", "x{a}", "{c}")
        done = run_map(*words, *(["--shell"] if shell else []), "--", *command)
        assert done.returncode == 0, done.stderr
        combinations = [{**record, "c": c} for record in records for c in ("a b", "-")]
        for params, (as_json, *rest) in zip(combinations, run_map.argv(f"out{batch}"), strict=True):
            assert repr(json.loads(as_json)) == repr(params), "nan is nan"
            assert rest[-2:] == [f"x{params['a']}", params["c"]]
            flags = iter(rest[:-2])
            for name, value in params.items():
                written = value if isinstance(value, str) else json.dumps(value)
                flag = next(flags)
                assert flag == (f"--{name}={written}" if written.startswith("-") else f"--{name}")
                assert written.startswith("-") or next(flags) == written

    arrive()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "-", "fifo"])
def test_parameters_come_from_files_and_pipes(run_map: Map, tmp_path: Path, kind: str) -> None:
    of_csv = kind == "csv"
    data = 'n,s\n1.10,"x, y"\n2,\n' if of_csv else '{"n": "1.10", "s": "x, y"}\n\n{"n": 2, "s": ""}\n'
    name = {"jsonl": "p.jsonl", "csv": "p.csv", "-": "-", "fifo": "p"}[kind]
    words = ("--from", name, *SIMULATED, "--", sys.executable, "echo.py", "{n}", "{s}")
    if kind == "fifo":
        os.mkfifo(tmp_path / name)
        process = run_map.start(*words)
        (tmp_path / name).write_text(data)
        assert process.wait(100) == 0
        process.communicate()
    else:
        if kind != "-":
            (tmp_path / name).write_text(data)
        done = run_map(*words, input=data if kind == "-" else None)
        assert done.returncode == 0, done.stderr
    assert run_map.argv() == [["1.10", "x, y"], ["2", ""]]
    assert [line["params"]["n"] for line in run_map.results()] == ([1.1, 2] if of_csv else ["1.10", 2])


def test_a_slow_producer_is_not_waited_for_and_does_not_wait(run_map: Map, tmp_path: Path) -> None:
    """Runs start, end and are stopped while the producer is still working."""
    process = run_map.start("--from", "-", *SIMULATED, "--", sys.executable, "echo.py", "{n}", stdin=subprocess.PIPE)
    assert process.stdin is not None
    results = tmp_path / "out" / "results.jsonl"
    for number in range(2):
        process.stdin.write(f'{{"n": {number}}}\n')
        process.stdin.flush()
        until(lambda seen=number: results.exists() and results.read_text().count("\n") == seen + 1)
    process.send_signal(2)
    assert process.wait(100) == 130
    _, said = process.communicate()
    assert "Traceback" not in said
    assert run_map.argv() == [["0"], ["1"]]


def test_what_runs_is_looked_after_while_a_producer_thinks(run_map: Map) -> None:
    words = ("--from", "-", "--timeout", "1", *SIMULATED, "--", "sleep", "{n}")
    process = run_map.start(*words, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write('{"n": 600}\n{"n": ')
    process.stdin.flush()
    assert any("ran longer than its timeout" in line for line in process.stderr)
    process.communicate("0}\n", timeout=500)
    assert process.returncode == 1
    assert [line["exit_code"] for line in run_map.results()] == [-15, 0]


def test_in_a_terminal_there_is_a_live_view(terminal: Any, tmp_path: Path) -> None:
    words = ("--param", "n=0.3,0.4", "--devices", "simulated:2", "--dir", str(tmp_path / "out"), "--", "sleep", "{n}")
    shown = terminal("map", *words)
    assert shown.wait() == 0
    assert "2/2 done" in shown.text or "2 running" in shown.text
    assert "2 jobs: 2 completed" in shown.text


def test_the_list_of_jobs_knows_the_runs_of_a_map(run_map: Map, tmp_path: Path) -> None:
    assert run_map("--param", "n=1,2", *SIMULATED, "--", "echo", "{n}").returncode == 0
    listed = subprocess.run([*CLI, "jobs", "out"], cwd=tmp_path, env=run_map.environ, capture_output=True, text=True)
    assert "out: 2 jobs: 2 completed" in listed.stdout
    assert "n=2" in listed.stdout


@pytest.mark.smoke
def test_failures_are_results_and_stop_nobody(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(
        "import os, signal, sys, json, pathlib\n"
        "n = sys.argv[1]\n"
        "print(json.dumps({'n': n}), flush=True)\n"
        "if n == '3' and os.environ['GPU_LAUNCHER_ATTEMPT'] == '2': sys.exit()\n"
        "if n in '13': sys.exit(7)\n"
        "if n == '2': os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    words = ("--param", "n=0,1,2,3", "--retries", "1", *SIMULATED)
    done = run_map(*words, "--", sys.executable, "fail.py", "{n}")
    assert done.returncode == 1
    assert "to run the rest: gpu-launcher map --resume out" in done.stderr
    results = run_map.results()
    assert [line["outcome"] for line in results] == ["completed", "failed", "failed", "completed"]
    assert [line["exit_code"] for line in results] == [0, 7, -11, 0]
    assert [line["attempts"] for line in results] == [1, 2, 2, 2]
    assert results[1]["message"] == "ended with exit code 7"
    assert "was killed by SIGSEGV" in results[2]["message"]
    assert [line["output"]["n"] for line in results] == ["0", "1", "2", "3"]
    names = {path.name for path in (tmp_path / "out" / "3").iterdir()}
    attempts = {"stdout.attempt-1.txt", "stderr.attempt-1.txt"}
    assert names == {"params.json", "outcome.json", "stdout.txt", "stderr.txt", *attempts}


def test_a_run_that_takes_too_long_is_ended_with_all_it_started(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "slow.sh").write_text("trap '' TERM\nsleep 600 & sleep 600")
    done = run_map("--param", "n=1", "--timeout", "1", "--grace", "1", *SIMULATED, "--", "bash", "slow.sh", "{n}")
    assert done.returncode == 1
    (line,) = run_map.results()
    assert (line["outcome"], line["exit_code"]) == ("failed", None)
    assert line["message"].startswith("ran longer than its timeout of 1.0 s")
    assert line["duration"] < 30
    assert json.loads((tmp_path / "out" / "0" / "outcome.json").read_text())["message"] == line["message"]


def test_the_first_failure_ends_them_all_if_it_is_to(run_map: Map) -> None:
    words = ("--param", "n=range(6)", "--stop-on-failure", "--max-parallel", "1", *SIMULATED)
    done = run_map(*words, "--shell", "--", "test {n} != 1")
    assert done.returncode == 1
    completed, failed, *next_one = [line["outcome"] for line in run_map.results()]
    assert (completed, failed) == ("completed", "failed")
    assert len(next_one) <= 1, "devices do not wait until the result of the one before has been looked at"


def test_at_most_so_many_run_at_a_time(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "alone.sh").write_text("mkdir busy || exit 1; sleep 0.2; rmdir busy")
    done = run_map("--param", "n=range(4)", "--max-parallel", "1", *SIMULATED, "--", "bash", "alone.sh", "{n}")
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_cpu_slots_are_used_and_one_line_says_so(run_map: Map) -> None:
    done = run_map("--param", "n=1", "--dir", "out", "--", sys.executable, "echo.py", "[{gpu}]")
    if "CPU slot" not in done.stderr:
        pytest.skip("there is a GPU")
    assert done.returncode == 0, done.stderr
    assert run_map.argv() == [["[]"]]
    assert len([line for line in done.stderr.splitlines() if "instead" in line]) == 1


def test_nothing_goes_through_a_shell_unless_it_is_to(run_map: Map, tmp_path: Path) -> None:
    words = ("--param", "s='$(touch evil); `touch evil`'", *SIMULATED)
    assert run_map(*words, "--", sys.executable, "echo.py", "{s}", ">", "file").returncode == 0
    assert run_map.argv() == [["$(touch evil); `touch evil`", ">", "file"]]
    shutil.rmtree(tmp_path / "out")
    assert (
        run_map(*words, "--shell", "--", "echo {s} > file; cat file >&2; echo '{{\"n\": '$((1+1))'}}'").returncode == 0
    )
    (line,) = run_map.results()
    assert Path(line["stderr"]).read_text() == "$(touch evil); `touch evil`\n"
    assert line["output"] == {"n": 2}
    assert not (tmp_path / "evil").exists()


def test_a_dry_run_prints_command_lines_and_runs_nothing(run_map: Map, tmp_path: Path) -> None:
    dry = ("--dry-run", "--devices", "simulated:4", "--timeout", "30m")
    done = run_map("--param", "n=range(50)", "--param", "s='a b'", *dry, "--", "echo", "{n}", "{s}", "{gpu}")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"echo {number} 'a b' {{gpu}}" for number in range(20)]
    assert done.stderr.splitlines() == [
        "... and 30 more: 50 runs",
        "gpu-launcher: 4 devices are simulated: no real GPU is reserved, so jobs must not use the GPUs that "
        "CUDA_VISIBLE_DEVICES names",
        "gpu-launcher: 50 runs need 1 GPU each: 4 can start now, the others when those end",
        "gpu-launcher: GPU hours: at most 25, if each run takes as long as --timeout and is not retried",
    ]
    piped = run_map("--from", "-", *dry, "--", "echo", "{n}", input='{"n": 1}\n{"n": 2}\n')
    assert piped.stdout == "echo 1\necho 2\n"
    assert piped.stderr.startswith("2 runs\n")
    assert "gpu-launcher: 2 runs need 1 GPU each: all can start now\n" in piped.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["echo.py"]


def test_a_dry_run_finds_a_request_that_is_never_granted(run_map: Map, tmp_path: Path) -> None:
    words = ("--param", "n=1,2", "--dry-run", "--gpus", "3", "--devices", "simulated:2", "--", "echo", "{n}")
    done = run_map(*words)
    assert (done.returncode, done.stdout) == (1, "echo 1\necho 2\n")
    assert "2 runs need 3 GPUs each, which is never granted: the request is for 3 devices" in done.stderr
    elsewhere = run_map("--nodes", "command:no-such-program", *words)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "2 runs need 3 GPUs each; the nodes say whether they can grant that once they run" in elsewhere.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["echo.py"]


# Bad input


TWICE_HERE = ("--nodes", "local", "--nodes", "local")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["--param", "n=1", "--", "no-such-program", "{n}"],
            "'no-such-program' cannot be run: there is no such program",
        ),
        (["--param", "n=1", "--", "./echo.py", "{n}"], "it is not executable"),
        (["--param", "n=1", "--", "python3", "gone.py", "{n}"], "'gone.py', which python3 is to run, does not exist"),
        (["--param", "n=1", "--", "echo", "{m}"], "{m} in the command names no parameter; there are n"),
        (["--param", "n=1", "--", "echo"], "no placeholder"),
        (["--param", "n=1", "--from", "p.jsonl"], "there is no command"),
        (["--", "echo", "{n}"], "there are no parameters"),
        (["--param", "n", "--", "echo", "{n}"], "--param: 'n' is not NAME=VALUES"),
        (["--param", "n=1", "--gpus", "x", "--", "echo", "{n}"], "--gpus: 'x' is neither"),
        (["--param", "n=1", "--gpus", "3", *SIMULATED[:2], "--", "echo", "{n}"], "--gpus: the request"),
        (["--param", "n=1", "--devices", "x", "--", "echo", "{n}"], "--devices: "),
        (["--param", "n=1", "--timeout", "x", "--", "echo", "{n}"], "--timeout: 'x' is not a time span"),
        (["--param", "n=1", "--nodes", "x", "--", "echo", "{n}"], "--nodes: 'x' names no node: give local, ssh:HOST"),
        (["--param", "n=1", "--nodes", "", "--", "echo", "{n}"], "--nodes: '' names no node"),
        (["--param", "n=1", "--nodes", "slurm:x", "--dry-run", "--", "echo", "{n}"], "--nodes: 'slurm:x' has no"),
        (["--param", "n=1", "--on-end", "a 'b", "--dry-run", "--", "echo", "{n}"], "--on-end: "),
        (["--param", "n=1", *TWICE_HERE, "--", "echo", "{n}"], "--nodes: local is named twice"),
        (["--param", "n=1", "--nodes", "command:no-such-program", "--", "echo", "{n}"], "node no-such-program: cannot"),
        (["--param", "n=1", "--max-parallel", "0", "--", "echo", "{n}"], "--max-parallel: 0 is too few"),
        (["--param", "n=1", "--retries", "-1", "--", "echo", "{n}"], "--retries: -1 is too few"),
        (["--param", "n=1", "--dir", "/proc/x", "--", "echo", "{n}"], "--dir: /proc/x cannot be written to"),
        (["--param", "n=1", "--dir", "echo.py", "--", "echo", "{n}"], "--dir: echo.py cannot be written to"),
        (["--param", "n=1", "--dir", "theirs", "--", "echo", "{n}"], "--dir: theirs/results.jsonl exists already"),
        (["--from", "gone.jsonl", "--", "echo", "{n}"], "--from: gone.jsonl cannot be read: No such file"),
        (["--from", ".", "--", "echo", "{n}"], "--from: . cannot be read: "),
        (["--from", "empty.jsonl", "--", "echo", "{n}"], "--from: empty.jsonl is empty"),
        (["--resume", "."], "--resume: "),
        (["--resume", ".", "--dir", "out"], "--dir: --resume names the directory, too"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    run_map: Map, tmp_path: Path, words: list[str], problem: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "results.jsonl").touch()
    done = run_map(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gpu-launcher: ")
    assert problem in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"echo.py", "empty.jsonl", "theirs", "pool"}
    assert left == set(), "and nothing is in the way of the mended command"


HALF = '{"n": 0}\n{"n": 1\n{"m": 1}\n{"n": 3}\n{"n": 4'


def test_a_half_written_file_is_refused_with_its_lines_before_anything_runs(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(HALF)
    done = run_map("--from", "p.jsonl", *SIMULATED, "--", "echo", "{n}")
    assert done.returncode == 2
    assert "p.jsonl, line 2, is not JSON" in done.stderr
    assert "line 3, does not fit: {n} in the command names no parameter; there are m" in done.stderr
    assert "line 5, is not JSON" in done.stderr
    assert "--keep-going" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("piped", [False, True])
def test_the_good_lines_run_with_keep_going(run_map: Map, tmp_path: Path, piped: bool) -> None:
    (tmp_path / "p.jsonl").write_text(HALF)
    words = ("--from", "-" if piped else "p.jsonl", "--keep-going", *SIMULATED)
    done = run_map(*words, "--", sys.executable, "echo.py", "{n}", input=HALF if piped else None)
    assert done.returncode == 1, "not everything was run"
    assert run_map.argv() == [["0"], ["3"]]
    assert [line["index"] for line in run_map.results()] == [0, 3], "so that a mended file can be resumed"
    assert "line 2, is not JSON" in done.stderr
    assert "line 5, is not JSON: Expecting ',' delimiter" in done.stderr


def test_of_a_pipe_nothing_more_is_started_after_a_bad_line(run_map: Map) -> None:
    words = ("--from", "-", "--max-parallel", "1", *SIMULATED, "--", sys.executable, "echo.py", "{n}")
    done = run_map(*words, input='{"n": 0}\n{"n": 1}\nbad\n{"n": 2}\n')
    assert done.returncode == 1
    assert run_map.argv() == [["0"], ["1"]]
    assert "stdin, line 3, is not JSON: Expecting value at column 1. No more runs are started" in done.stderr


def test_values_that_are_too_long_for_a_command_line_fail_alone(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"s": "{"x" * 200_000}"}}\n{{"s": "y"}}\n')
    done = run_map("--from", "p.jsonl", *SIMULATED, "--", sys.executable, "echo.py", "{s}")
    assert done.returncode == 1
    long, short = run_map.results()
    assert long["outcome"] == "failed"
    assert long["message"].startswith("could not be started: Argument list too long")
    assert short["output"]["argv"] == ["y"]


# As documented


def test_every_option_is_in_the_document_and_the_help_has_examples(run_map: Map) -> None:
    text = run_map("--help").stdout
    options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE))
    document = (REPOSITORY / "docs" / "map.md").read_text()
    assert len(options) > 15
    assert all(f"`{option}" in document for option in options - {"--help"})
    assert "    gpu-launcher map --resume " in text.partition("Examples:")[2]


def test_the_example_runs_as_its_readme_says(run_map: Map, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "examples" / "evaluate", tmp_path / "evaluate")
    (command,) = re.findall(r"^    gpu-launcher (.*)$", (tmp_path / "evaluate" / "README.md").read_text(), re.MULTILINE)
    command = command.replace("python", sys.executable).replace("map ", "map --devices simulated:2 ", 1)
    done = subprocess.run(
        [*CLI, *shlex.split(command)], cwd=tmp_path / "evaluate", env=run_map.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = run_map.results("evaluate/results")
    assert len(results) == 6
    assert all(0.9 < line["output"]["accuracy"] < 1 for line in results)
    assert (tmp_path / "evaluate" / "results" / "results.csv").exists()


# Resuming


@pytest.mark.smoke
def test_resuming_runs_what_did_not_complete(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(
        "import sys, pathlib, os\n"
        "with open(f'ran-{sys.argv[1]}', 'a') as file: file.write(os.environ['GPU_LAUNCHER_ATTEMPT'])\n"
        "sys.exit(sys.argv[1] == '1' and not pathlib.Path('mended').exists())\n"
    )
    first = run_map("--param", "n=shuffle(range(3))", *SIMULATED, "--", sys.executable, "some.py", "{n}")
    assert first.returncode == 1
    (tmp_path / "mended").touch()
    elsewhere = subprocess.run(
        [*CLI, "map", "--resume", str(tmp_path / "out"), "--csv"],
        cwd="/",
        env=run_map.environ,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "2 of 3 runs completed before" in elsewhere.stderr
    assert [line["outcome"] for line in run_map.results()] == ["completed"] * 3
    ran = {path.name: path.read_text() for path in tmp_path.glob("ran-*")}
    assert ran == {"ran-0": "1", "ran-1": "12", "ran-2": "1"}
    assert (tmp_path / "out" / "results.csv").exists()
    again = run_map("--resume", "out")
    assert again.returncode == 0
    assert {path.name: path.read_text() for path in tmp_path.glob("ran-*")} == ran


def test_what_is_resumed_must_be_the_same_map(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"n": 0}\n{"n": 1}\n')
    words = ("--from", "p.jsonl", *SIMULATED)
    assert run_map(*words, "--", sys.executable, "echo.py", "{n}").returncode == 0
    other = run_map("--resume", "out", "--", sys.executable, "echo.py", "{n}", "more")
    assert other.returncode == 2
    assert "--resume: command is not that of the map to be resumed" in other.stderr
    again = run_map(*words, "--", sys.executable, "echo.py", "{n}")
    assert again.returncode == 2
    assert "holds another map: to continue it, give --resume" in again.stderr
    (tmp_path / "p.jsonl").write_text('{"n": 5}\n{"n": 1}\n')
    changed = run_map("--resume", "out")
    assert changed.returncode == 2
    assert "run 0 has completed with other parameters" in changed.stderr
    (tmp_path / "p.jsonl").write_text('{"n": 0}\n{"n": 1}\n{"n": 2}\n')
    longer = run_map("--resume", "out", "--", sys.executable, "echo.py", "{n}")
    assert longer.returncode == 0, longer.stderr
    assert run_map.argv() == [["0"], ["1"], ["2"]]


def test_a_pipe_is_resumed_by_the_same_stream(run_map: Map) -> None:
    words = ("--from", "-", *SIMULATED, "--", sys.executable, "echo.py", "{n}")
    assert run_map(*words, input='{"n": 0}\nbad\n').returncode == 1
    assert run_map("--resume", "out", input='{"n": 0}\n{"n": 1}\n{"n": 2}\n').returncode == 0
    assert run_map.argv() == [["0"], ["1"], ["2"]]
    changed = run_map("--resume", "out", input='{"n": 3}\n')
    assert changed.returncode == 1
    assert "run 0 has completed with other parameters" in changed.stderr


# Any number of runs

DRIVE = """
import sys
from pathlib import Path

from gpu_launcher.cli.mapping.grid import Grid
from gpu_launcher.cli.mapping.inputs import Input, RunSequence
from gpu_launcher.cli.mapping.map_directory import MapDirectory
from gpu_launcher.cli.mapping.map_runs import MapRuns
from gpu_launcher.cli.mapping.results_file import ResultsFile, write_table
from gpu_launcher.cli.mapping.resume import EarlierRuns
from gpu_launcher.cli.mapping.template import Template
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.jobs.source import Exhausted, Offer

directory = MapDirectory(Path("out").absolute())
sequence = RunSequence(Template.parse(["{n}"]), Grid(), Input(sys.argv[1]))
sequence.survey(EarlierRuns())
source = MapRuns(sequence, directory, ResultsFile(directory.results), keep_going=False)
over, seen = False, 0


def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


while not over:
    source.request_jobs(4)
    for statement in source.receive():
        if isinstance(statement, Offer):
            job = statement.job
            source.ended(JobResult(job.number, job.label, Outcome.COMPLETED, None, None, (), 1.0, None))
            seen += 1
            if seen == 5_000:
                before = memory()
        over = over or isinstance(statement, Exhausted)
write_table(directory)
print(seen, memory() - before)
assert EarlierRuns.to_resume(directory).completed == seen
print(memory() - before)
"""


def test_any_number_of_runs_takes_no_more_memory_than_a_few(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "drive.py").write_text(DRIVE)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "p.jsonl", "w") as file:
        file.writelines(f'{{"n": {number}, "text": "{"x" * 200}"}}\n' for number in range(50_000))
    done = subprocess.run(
        [sys.executable, "drive.py", "p.jsonl"],
        cwd=tmp_path,
        env=run_map.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    seen, grown, to_resume = map(int, done.stdout.split())
    assert seen == 50_000
    assert grown < 2 * 2**20, "they would be 15 MiB"
    assert to_resume < 4 * 2**20, "eight bytes each"


# Full disks


def test_a_full_disk_ends_it_and_what_has_completed_is_kept(run_map: Map, tmp_path: Path, mounted: Any) -> None:
    out = mounted(tmp_path / "out", "size=256k")
    (tmp_path / "full").touch()
    fill = "test {n} != 3 || test ! -e full || head -c 10M /dev/zero > out/filler; true"
    words = ("--param", "n=range(9)", "--max-parallel", "1", *SIMULATED, "--shell")
    done = run_map(*words, "--", f"echo {{n}} >> ran; {fill}")
    assert done.returncode == 1, done.stderr
    assert "results cannot be written to out: No space left on device. No more runs are started" in done.stderr
    assert "job 3 (n=3) FAILED" in done.stderr
    (tmp_path / "full").unlink()
    (out / "filler").unlink()
    kept = [line["index"] for line in run_map.results() if line["outcome"] == "completed"]
    assert kept[:3] == [0, 1, 2]
    assert run_map("--resume", "out").returncode == 0
    assert [line["outcome"] for line in run_map.results()] == ["completed"] * 9
    ran = (tmp_path / "ran").read_text().split()
    assert all(ran.count(str(index)) == 1 for index in kept)


@pytest.fixture
def mounted() -> Any:
    points: list[Path] = []

    def mount(point: Path, options: str) -> Path:
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(point)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", str(point)], check=True)


def test_failed_runs_run_again_in_the_same_map(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "bad").touch()
    script = "if [ -e bad ] && [ {n} != 1 ]; then exit 3; fi; while ! [ -e go ]; do sleep 0.02; done"
    process = run_map.start(*SIMULATED, "--param", "n=0,1,2", "--shell", "--", script)
    try:
        until(lambda: [state for _, state in states(tmp_path)] == ["failed", "running", "failed"], "no run fails")
        until(lambda: sorted(line["index"] for line in run_map.results()) == [0, 2], "not both have results")
        (tmp_path / "bad").unlink()
        assert Sweep(tmp_path / "out").retry(0) == "job 0 runs again"
        until(lambda: [line["index"] for line in run_map.results()] == [2], "run 0 has no result now")
        (tmp_path / "go").touch()
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1, err
    assert "3 jobs: 2 completed, 1 failed in" in err
    assert {line["index"]: (line["outcome"], line["attempts"]) for line in run_map.results()} == {
        0: ("completed", 2),
        1: ("completed", 1),
        2: ("failed", 1),
    }
    assert len(run_map.results()) == 3
    assert (tmp_path / "out/0/stderr.attempt-1.txt").exists()


def test_run_that_did_not_begin_again_keeps_its_result(run_map: Map, tmp_path: Path) -> None:
    (tmp_path / "bad").touch()
    script = "[ {n} = 0 ] && exit 3; sleep 600"
    process = run_map.start(*SIMULATED, "--param", "n=0,1,2", "--shell", "--", script)
    try:
        until(
            lambda: [state for _, state in states(tmp_path)] == ["failed", "running", "running"], "run 0 does not fail"
        )
        sweep = Sweep(tmp_path / "out")
        sweep.retry(0)
        sweep.stop(now=True)
        process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    (line,) = [line for line in run_map.results() if line["index"] == 0]
    assert (line["outcome"], line["exit_code"]) == ("failed", 3)
    assert dict(states(tmp_path))[0] == "failed"


def states(directory: Path) -> list[tuple[int, str]]:
    return [(number, entry.state.value) for number, entry in read(directory / "out").items()]
