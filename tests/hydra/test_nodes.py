"""Tests sweeps on several nodes, each with a pool of its own: they must do what the same sweep does on one machine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher.jobs.directory import sign_of_nodes
from tests.waiting import until
from tests.warm import TextProgram

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., TextProgram]

PROGRAM = "on_nodes.py"
TWO_EACH = "hydra.launcher.devices=simulated:2"


def node(directory: Path, name: str, *words: str) -> str:
    """A node with the pool `pool-<name>`, reached by further words."""
    return " ".join([f"command:env GPU_LAUNCHER_POOL_DIR={directory}/pool-{name}", *words])


def on(*nodes: str) -> str:
    """The option for these nodes."""
    return "hydra.launcher.nodes=[" + ",".join("'" + one.replace("'", "\\'") + "'" for one in nodes) + "]"


def on_two(directory: Path) -> tuple[str, str]:
    """The options for two nodes with two devices each."""
    return on(node(directory, "a"), node(directory, "b")), TWO_EACH


def sweep(run: Run, directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    directory.mkdir(exist_ok=True)
    return run(directory, PROGRAM, "-m", "hydra.sweep.dir=sweep", *arguments, **environment)


def returns(directory: Path) -> list[dict[str, Any]]:
    """What the last launch returned, without the directory's name."""
    found: list[dict[str, Any]] = json.loads(without(directory, (directory / "returns.json").read_text()))
    return found


def without(directory: Path, text: str) -> str:
    """Replace a directory's name, which differs between two sweeps."""
    return text.replace(str(directory), "DIRECTORY")


def pools(directory: Path) -> set[str]:
    """The pools in which jobs ran."""
    return {path.read_text().split()[0] for path in directory.glob("witness-*")}


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """What a sweep says that cannot run."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("hydra/sweeper=basic",), id="basic", marks=pytest.mark.smoke),
        pytest.param(("hydra/sweeper=grid_async",), id="grid_async"),
        pytest.param(("hydra/sweeper=basic", "hydra.launcher.start_method=spawn"), id="spawn"),
    ],
)
def test_results_are_those_of_one_machine_in_the_same_order(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    grid = ("n=5,4,3,2,1,0", "fails=[1,4]", "meet=4", *options)
    one = sweep(run, tmp_path / "one", *grid)
    two = sweep(run, tmp_path / "two", *grid, *on_two(tmp_path))
    assert one.returncode == two.returncode == 1, two.stderr
    assert pools(tmp_path / "two") == {"pool-a", "pool-b"}
    assert [job["status"] for job in returns(tmp_path / "two")] == [
        *("COMPLETED", "FAILED", "COMPLETED", "COMPLETED", "FAILED", "COMPLETED")
    ]
    assert returns(tmp_path / "two") == returns(tmp_path / "one")
    assert "6 jobs: 4 completed, 2 failed" in two.stderr
    ends = [
        without(tmp_path / name, done.stderr.partition("Error executing job")[2])
        for name, done in (("one", one), ("two", two))
    ]
    assert "OwnError: 4 fails" in ends[0]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("second", ["local", "another"])
def test_both_nodes_run_jobs_and_a_study_is_told_each_trial_once(run: Run, tmp_path: Path, second: str) -> None:
    nodes = on("local" if second == "local" else node(tmp_path, "b"), node(tmp_path, "a"))
    search = ("hydra/sweeper=optuna_async", "x=interval(0.0,1.0)", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=3")
    pruner = ("reports=true", "hydra.sweeper.pruner={name: threshold, upper: 3.0}")
    done = sweep(run, tmp_path, "meet=3", *search, *pruner, nodes, TWO_EACH)
    assert done.returncode == 0, done.stderr
    assert pools(tmp_path) == {"pool" if second == "local" else "pool-b", "pool-a"}
    assert "8 jobs: 3 completed, 5 pruned" in done.stderr
    url = f"sqlite:///{tmp_path / 'sweep' / 'study.db'}"
    trials = optuna.load_study(study_name="on_nodes", storage=gpu_launcher.storage(url)).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 5
    assert [trial.values for trial in trials[:3]] == [[0.0], [1.0], [2.0]]
    assert [trial.last_step for trial in trials[:3]] == [2, 2, 2]


def test_failed_jobs_are_resumed(run: Run, tmp_path: Path) -> None:
    grid = ("n=range(6)", "fails=[1,4]", *on_two(tmp_path))
    first = sweep(run, tmp_path, *grid)
    assert first.returncode == 1
    assert "6 jobs: 4 completed, 2 failed" in first.stderr
    for witness in tmp_path.glob("witness-*"):
        witness.unlink()
    (tmp_path / "healed").touch()
    second = sweep(run, tmp_path, *grid, "hydra.launcher.resume=true")
    assert second.returncode == 0, second.stderr
    assert "resumed: 4 of 6 jobs completed before" in second.stderr
    assert sorted(path.name for path in tmp_path.glob("witness-*")) == ["witness-1", "witness-4"]
    values = [f"[{n}, {{'ten times': {10 * n}}}]" for n in range(6)]
    assert [job["value"] for job in returns(tmp_path)] == values
    never = on(node(tmp_path, "a", "sh", "-c", "'echo >>starts'"))
    third = sweep(run, tmp_path, *grid[:2], "hydra.launcher.resume=true", never, TWO_EACH)
    assert third.returncode == 0, third.stderr
    assert "resumed: 6 of 6 jobs completed before" in third.stderr
    assert [job["value"] for job in returns(tmp_path)] == values
    assert not (tmp_path / "starts").exists()


def test_crashed_jobs_are_retried_and_each_log_is_kept(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, "n=range(4)", "crashes=[0,3]", "hydra.launcher.retries=1", *on_two(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("attempt 2 of 2 follows") == 2
    assert "2 attempts repeated" in done.stderr
    for number in range(4):
        logs = {path.name: path.read_text() for path in (tmp_path / "sweep" / str(number)).glob("job*.log")}
        first, second = (f"this is job {number}, attempt {attempt}\n" for attempt in (1, 2))
        crashed = {"job.attempt-1.log": first, "job.log": second}
        assert logs == (crashed if number in (0, 3) else {"job.log": first})


def test_failures_of_all_nodes_count_and_one_job_at_a_time_runs(run: Run, tmp_path: Path) -> None:
    options = ("hydra.launcher.max_parallel=1", "hydra.launcher.max_failures=3", "seconds=0.05")
    done = sweep(run, tmp_path, "n=range(12)", "fails=[4,5,6,7,8,9,10,11]", *options, *on_two(tmp_path))
    assert done.returncode == 1
    # The next job may have started before the last job's result was processed.
    summary = re.search(r"12 jobs: (\d) completed, (\d) failed, (?:(\d) cancelled, )?(\d) not run", done.stderr)
    assert summary is not None, done.stderr
    assert (summary[1], summary[2]) == ("4", "3")
    assert int(summary[3] or 0) <= 1
    assert "stopped by 3 failures: 7 of 12 finished" in done.stderr
    assert not (tmp_path / "overlap").exists(), "two jobs ran at the same time"


def test_each_batch_starts_its_nodes(run: Run, tmp_path: Path) -> None:
    counting = ("sh", "-c", "'echo >>starts; exec \"$@\"'", "sh")
    nodes = on(node(tmp_path, "a", *counting), node(tmp_path, "b", *counting))
    batches = ("hydra/sweeper=grid_async", "hydra.sweeper.max_batch_size=2")
    done = sweep(run, tmp_path, "n=range(5)", "fails=[1]", *batches, nodes, TWO_EACH)
    assert done.returncode == 1
    assert re.findall(r"(\d) jobs?: (\d) completed", done.stderr) == [("2", "1"), ("2", "2"), ("1", "1")]
    assert (tmp_path / "starts").read_text() == 6 * "\n"


def test_what_is_printed_while_a_node_starts_is_in_no_log(run: Run, tmp_path: Path) -> None:
    greeting = ("sh", "-c", "'echo Welcome; exec \"$@\"'", "sh")
    nodes = on(node(tmp_path, "a", *greeting), node(tmp_path, "b", *greeting))
    done = sweep(run, tmp_path, "n=range(4)", nodes, TWO_EACH, AT_IMPORT="print")
    assert done.returncode == 0, done.stderr
    assert "Welcome" not in done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("at import") == 2
    for number in range(4):
        log = tmp_path / "sweep" / str(number) / "job.log"
        assert log.read_text() == f"this is job {number}, attempt 1\n"


def test_swept_config_cannot_change_the_nodes(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "conf"
    (config / "where").mkdir(parents=True)
    (config / "hydra" / "launcher").mkdir(parents=True)
    for name in ("here", "there"):
        text = f"# @package _global_\nhydra: {{launcher: {{nodes: ['ssh:{name}']}}}}\n"
        (config / "where" / f"{name}.yaml").write_text(text)
    ours = f"defaults: [gpu_pool, _self_]\ndevices: simulated:2\nnodes: ['{node(tmp_path, 'a')}']\n"
    (config / "hydra" / "launcher" / "ours.yaml").write_text(ours)
    overrides = (
        "hydra.mode=MULTIRUN",
        f"hydra.searchpath=[file://{config}]",
        "hydra/launcher=ours",
        "+where=here,there",
    )
    done = run(tmp_path, PROGRAM, *overrides)
    assert done.returncode == 0, done.stderr
    assert pools(tmp_path) == {"pool-a"}
    assert len(re.findall(r"ignored: hydra\.launcher\.nodes=\[ssh:\w+\] of job", done.stderr)) == 1, done.stderr


# Ways to start a program


TRAIN = """
import sys
import hydra
import recording

assert sys.argv[-1].startswith("hydra/launcher="), sys.argv

PREFIX = "job "


def named(n):
    return PREFIX + str(n)


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    return named(cfg.n)


if __name__ == "__main__":
    main()
"""
ENTRY = "import sys\nfrom project.train import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(("train.py",), id="script"),
        pytest.param(("-m", "train"), id="module"),
        pytest.param(("-m", "project.train"), id="module-of-a-package"),
        pytest.param(("-m", "project"), id="package"),
        pytest.param(("-m", "project.other"), id="module-that-imports-it"),
        pytest.param(("bin/train",), id="entry-point"),
    ],
)
def test_program_runs_on_nodes_in_whatever_way_it_is_started(
    run: Run, tmp_path: Path, program: tuple[str, ...]
) -> None:
    for name, text in {
        "train.py": TRAIN,
        "project/__init__.py": "",
        "project/train.py": TRAIN,
        "project/__main__.py": TRAIN,
        "project/other.py": "from project.train import main\nif __name__ == '__main__':\n    main()\n",
        "bin/train": ENTRY,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    path = {"PYTHONPATH": f"{Path(__file__).parent / 'programs'}:{tmp_path}"}
    done = run(tmp_path, program, "-m", "+n=range(4)", "hydra.sweep.dir=sweep", *on_two(tmp_path), **path)
    assert done.returncode == 0, done.stderr
    assert [job["value"] for job in returns(tmp_path)] == [f"'job {n}'" for n in range(4)]


# Nodes that cannot be used


UNGUARDED = """
import hydra
import recording

PREFIX = "job "
with open("top-level", "a") as file:
    file.write("x")


def named(n):
    return PREFIX + str(n)


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    return named(cfg.n)


main()
"""


def test_a_script_without_a_guard_is_not_run_on_the_nodes(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    path = {"PYTHONPATH": str(Path(__file__).parent / "programs")}
    done = run(tmp_path, (str(script),), "-m", "+n=range(4)", "hydra.sweep.dir=sweep", *on_two(tmp_path), **path)
    assert done.returncode == 0, done.stderr
    assert [job["value"] for job in returns(tmp_path)] == [f"'job {n}'" for n in range(4)]
    assert (tmp_path / "top-level").read_text() == "x"


def test_lock_at_the_top_level_of_a_script_is_named(run: Run, tmp_path: Path) -> None:
    script = TRAIN.replace('PREFIX = "job "', "import threading\n\nLOCK = threading.Lock()")
    (tmp_path / "train.py").write_text(script.replace("return PREFIX", "with LOCK:\n        return 'job '"))
    path = {"PYTHONPATH": str(Path(__file__).parent / "programs")}
    line = refusal(run(tmp_path, ("train.py",), "-m", "+n=1,2", *on_two(tmp_path), **path))
    assert line.startswith("hydra.launcher.nodes: jobs run on other nodes, to which the program cannot be sent: ")
    assert "(found at LOCK, a global that named() uses)" in line


@pytest.mark.parametrize(
    ("way", "said"), [("raise", "OSError: this machine has no data"), ("exit", "SystemExit: no GPU here")]
)
def test_a_program_that_cannot_be_imported_on_one_node_runs_on_the_other(
    run: Run, tmp_path: Path, way: str, said: str
) -> None:
    bad = node(tmp_path, "bad", f"AT_IMPORT={way}")
    refused = sweep(run, tmp_path, "n=1,2", on(bad, bad), TWO_EACH)
    assert f"no node can run jobs: env cannot import the program: raised {said}; env-2 cannot" in refusal(refused)
    done = sweep(run, tmp_path, "n=1,2", on(bad, node(tmp_path, "good")), TWO_EACH)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(said) == 1
    assert pools(tmp_path) == {"pool-good"}


@pytest.mark.parametrize("when", ["before the agent is there", "while it imports the program"])
def test_node_that_its_engine_ends_before_it_is_ready_is_started_again(run: Run, tmp_path: Path, when: str) -> None:
    words = ["AT_IMPORT=terminate"]
    if when == "before the agent is there":
        words = ["sh", "-c", "'mkdir terminated && kill $$; exec \"$@\"'", "sh"]
    done = sweep(run, tmp_path, "n=1,2", on(node(tmp_path, "a", *words)), TWO_EACH)
    assert (tmp_path / "terminated").exists()
    assert done.returncode == 0, done.stderr
    assert "node env got SIGTERM before it could run jobs" in done.stderr
    assert pools(tmp_path) == {"pool-a"}


@pytest.mark.parametrize("sweeper", ["basic", "grid_async"])
def test_interrupt_before_a_node_is_ready_ends_the_sweep_with_one_line(
    start: Start, tmp_path: Path, sweeper: str
) -> None:
    options = ("hydra/launcher=gpu_pool", f"hydra/sweeper={sweeper}", TWO_EACH, "n=1,2")
    with start(tmp_path, PROGRAM, "-m", *options, on(node(tmp_path, "a", "AT_IMPORT=wait"))) as program:
        until((tmp_path / "imports").exists, "the node does not import the program")
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=500)
    assert program.returncode == -signal.SIGINT
    assert err == "[gpu_pool] stopped by SIGINT\n"


@pytest.mark.parametrize("sweeper", ["basic", "grid_async"])
def test_interrupt_while_nodes_of_a_killed_launch_may_run_ends_the_sweep_with_one_line(
    start: Start, tmp_path: Path, sweeper: str
) -> None:
    sign = sign_of_nodes(tmp_path / "sweep")
    sign.parent.mkdir(parents=True)
    sign.touch()
    options = ("hydra/launcher=gpu_pool", f"hydra/sweeper={sweeper}", "hydra.sweep.dir=sweep", TWO_EACH, "n=1,2")
    with start(tmp_path, PROGRAM, "-m", *options) as program:
        assert program.stdout is not None
        assert "for the nodes of an earlier launch" in program.stdout.readline()
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=500)
    assert program.returncode == -signal.SIGINT
    assert err == "[gpu_pool] stopped by SIGINT\n"
    assert sign.exists(), "the next launch must wait, too"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (("command:no-such-command x",), "node no-such-command: cannot run its command: "),
        (
            ("command:false", "command:sh -c 'echo no such pod >&2; exit 7'"),
            "no node can run jobs: false did not start (exit status 1). Remedy: `false true` must succeed without a "
            "question; sh did not start (exit status 7): no such pod. Remedy: ",
        ),
    ],
)
def test_nodes_that_cannot_be_reached_are_named_in_one_line(
    run: Run, tmp_path: Path, nodes: tuple[str, ...], said: str
) -> None:
    line = refusal(sweep(run, tmp_path, "n=1,2", on(*nodes), TWO_EACH))
    assert said in line


def test_a_node_that_never_ran_jobs_is_not_started_again(start: Start, tmp_path: Path) -> None:
    late = "'until [ -e witness-0 ]; do sleep 0.05; done; echo >>tries; exit 3'"
    nodes = on(node(tmp_path, "a"), node(tmp_path, "b", "sh", "-c", late))
    words = ("-m", "hydra/launcher=gpu_pool", "hydra.sweep.dir=sweep", "n=1,2,3,4", "holds=true", nodes, TWO_EACH)
    said = "node env-2 did not start (exit status 3)"
    with start(tmp_path, PROGRAM, *words, LATECOMER_SECONDS="0") as program:
        assert program.stderr is not None
        assert any(said in line for line in program.stderr)  # reads only up to this line
        (tmp_path / "release").touch()
        _, rest = program.communicate(timeout=500)
    assert program.returncode == 0, rest
    assert said not in rest
    assert (tmp_path / "tries").read_text() == "\n"


def test_script_that_is_not_the_same_on_a_node_is_reported(run: Run, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "older.py").write_text(f"# an older version\n{TRAIN}")
    elsewhere = f"'mount --bind {tmp_path}/older.py {tmp_path}/train.py && exec \"$@\"'"
    nodes = on(node(tmp_path, "a", "unshare", "-m", "sh", "-c", elsewhere, "sh"), node(tmp_path, "b"))
    path = {"PYTHONPATH": str(Path(__file__).parent / "programs")}
    done = run(tmp_path, ("train.py",), "-m", "+n=range(4)", "hydra.sweep.dir=sweep", nodes, TWO_EACH, **path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "the program's script is not the same as here" in line]
    assert [line.rpartition("] ")[2] for line in said] == ["env: the program's script is not the same as here"]


def test_node_on_which_every_job_crashes_fails_no_more_than_three(run: Run, tmp_path: Path) -> None:
    nodes = on(node(tmp_path, "bad", "BROKEN=3"), node(tmp_path, "good"))
    done = sweep(run, tmp_path, "n=range(20)", nodes, TWO_EACH)
    assert done.returncode == 1
    assert "20 jobs: 17 completed, 3 failed" in done.stderr, done.stderr
    assert "node env is set aside: 3 jobs crashed there, and none completed" in done.stderr
    assert pools(tmp_path) == {"pool-good"}


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ("sweep", "does not see the files in {}/sweep. Remedy: use a directory on a file system that all nodes share"),
        (
            "",
            "cannot enter the program's working directory {}: No such file or directory. Remedy: use a ",
        ),
    ],
)
def test_node_that_does_not_see_the_files_is_refused(run: Run, tmp_path: Path, hidden: str, said: str) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")
    directory = tmp_path / "shared" / "program"
    directory.mkdir(parents=True)
    over = directory / hidden if hidden else directory.parent
    elsewhere = f"'mount -t tmpfs none {over} && exec \"$@\"'"
    blind = node(tmp_path, "a", "unshare", "-m", "sh", "-c", elsewhere, "sh")
    line = refusal(sweep(run, directory, "n=1,2", on(blind), TWO_EACH))
    assert said.format(directory) in line


def test_job_that_no_node_can_ever_run_fails_alone(run: Run, tmp_path: Path) -> None:
    nodes = on(node(tmp_path, "a"), node(tmp_path, "b"))
    options = ("hydra.launcher.gpus=${n}", "hydra.launcher.devices=simulated:1")
    done = sweep(run, tmp_path, "n=1,2,1", *options, nodes)
    assert done.returncode == 1
    assert "3 jobs: 2 completed, 1 failed" in done.stderr
    assert "cannot be run: its request is" in done.stderr
