"""Sweeps on nodes that do not share the sweep's directory: their outputs are brought to the head."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from gpu_launcher.jobs.launches import DIRECTORY
from tests.hydra.test_nodes import Run, Start, node, on, refusal, returns, without
from tests.waiting import until

PROGRAM = "writes_outputs.py"
TWO_EACH = "hydra.launcher.devices=simulated:2"
FETCH = "hydra.launcher.outputs=fetch"


@pytest.fixture(autouse=True)
def may_mount() -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")


def blind(directory: Path, name: str, hidden: Path) -> str:
    """A node that sees an empty directory of its own in place of a hidden one."""
    over = f"'mkdir -p {hidden} && mount -t tmpfs none {hidden} && exec \"$@\"'"
    return node(directory, name, "unshare", "-m", "sh", "-c", over, "sh")


def sweep(run: Run, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    directory.mkdir(exist_ok=True)
    return run(directory, PROGRAM, "-m", "hydra.sweep.dir=outer/sweep", TWO_EACH, *arguments)


def files(directory: Path) -> dict[str, str]:
    """The files and links in the sweep's directory, which is named the same in all of them."""
    found = {}
    for path in sorted((directory / "outer" / "sweep").rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and DIRECTORY not in path.parts and path.suffix != ".yaml":
            found[name] = without(directory, path.read_text())
    return found


def pools(directory: Path) -> set[str]:
    return {pool for path in directory.glob("ran-*") for pool in path.read_text().split()}


@pytest.mark.parametrize("hidden", ["outer/sweep", "outer"])
def test_results_and_files_are_those_of_one_machine(run: Run, tmp_path: Path, hidden: str) -> None:
    grid = ("n=5,4,3,2,1,0", "fails=[1,4]", "hydra/sweeper=grid_async")
    one = sweep(run, tmp_path / "one", *grid)
    two = tmp_path / "two"
    done = sweep(run, two, *grid, on(*(blind(tmp_path, name, two / hidden) for name in "ab")), FETCH)
    assert one.returncode == done.returncode == 1, done.stderr
    assert "6 jobs: 4 completed, 2 failed" in done.stderr
    assert pools(two) <= {"pool-a", "pool-b"}
    assert returns(two) == returns(tmp_path / "one")
    assert "outer/sweep/1/checkpoints/model" in files(two)
    assert files(two)["outer/sweep/1/checkpoints/last"] == "-> model"
    assert "ValueError: 4 fails" in files(two)["outer/sweep/1/job.log"]
    compared = [
        {name: text for name, text in files(where).items() if not name.endswith(("log", "results.csv"))}  # have times
        for where in (two, tmp_path / "one")
    ]
    assert compared[0] == compared[1]
    assert files(two).keys() == files(tmp_path / "one").keys()
    assert (two / "outer/sweep/0/.hydra/config.yaml").exists()
    assert not list((two / "outer" / "sweep" / DIRECTORY).glob("outputs-*"))


def test_working_directory_may_be_a_link_on_the_node(run: Run, tmp_path: Path) -> None:
    project, linked = tmp_path / "above" / "project", tmp_path / "linked"
    for directory in (project / "outer", linked):
        directory.mkdir(parents=True)
    steps = (
        f"mount --bind {project} {linked}",
        f"mount -t tmpfs none {linked}/outer",
        f"mount -t tmpfs none {project.parent}",
        f"ln -s {linked} {project}",
        'exec "$@"',
    )
    over = f"'{' && '.join(steps)}'"
    done = sweep(run, project, "n=1,2", FETCH, on(node(tmp_path, "a", "unshare", "-m", "sh", "-c", over, "sh")))
    assert done.returncode == 0, done.stderr
    assert files(project)["outer/sweep/1/job.log"] == "this is job 2, attempt 1\n"


def test_sweep_is_resumed_from_what_was_fetched(run: Run, tmp_path: Path) -> None:
    grid = ("n=range(4)", "fails=[1]", FETCH, on(blind(tmp_path, "a", tmp_path / "outer" / "sweep")))
    first = sweep(run, tmp_path, *grid)
    assert "4 jobs: 3 completed, 1 failed" in first.stderr
    (tmp_path / "healed").touch()
    second = sweep(run, tmp_path, *grid, "hydra.launcher.resume=true")
    assert second.returncode == 0, second.stderr
    assert "resumed: 3 of 4 jobs completed before" in second.stderr
    assert {path.name: path.read_text() for path in tmp_path.glob("ran-*")} == {
        **{f"ran-{n}": "pool-a\n" for n in (0, 2, 3)},
        "ran-1": "pool-a\npool-a\n",
    }
    logs = files(tmp_path)
    assert "ValueError: 1 fails" in logs["outer/sweep/1/job.attempt-1.log"]
    assert logs["outer/sweep/1/job.log"] == "this is job 1, attempt 2\n"


def test_job_whose_outputs_are_too_large_fails_alone(run: Run, tmp_path: Path) -> None:
    hidden = blind(tmp_path, "a", tmp_path / "outer" / "sweep")
    done = sweep(run, tmp_path, "n=range(3)", "huge=[1]", "links=true", FETCH, on(hidden))
    assert done.returncode == 1
    assert "3 jobs: 2 completed, 1 failed" in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "job 1 (n=1) FAILED" in line and "done)" in line)
    assert "completed, but its outputs could not be fetched: they are 1048576 GiB, and " in line
    assert sorted(path.name for path in (tmp_path / "outer" / "sweep").iterdir()) == [
        DIRECTORY,
        "0",
        "2",
        "multirun.yaml",
        "results.csv",
    ]
    assert "job 0 (n=0): 1 of its outputs are links that lead elsewhere, or special files" in done.stderr


def test_logs_of_interrupted_jobs_are_fetched(start: Start, tmp_path: Path) -> None:
    hidden = blind(tmp_path, "a", tmp_path / "outer" / "sweep")
    words = ("-m", "hydra.sweep.dir=outer/sweep", "hydra/launcher=gpu_pool", TWO_EACH, FETCH, on(hidden))
    with start(tmp_path, PROGRAM, *words, "n=range(2)", "waits=true") as process:
        until(lambda: len(list(tmp_path.glob("ran-*"))) == 2 or process.poll() is not None, "the jobs do not start")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGINT, said
    logs = {name: text for name, text in files(tmp_path).items() if name.endswith("job.log")}
    assert sorted(logs) == ["outer/sweep/0/job.log", "outer/sweep/1/job.log"]
    assert all(text.startswith("this is job ") for text in logs.values())


def test_node_that_shares_the_directory_is_used_as_it_is(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, "n=range(4)", FETCH, on("local", node(tmp_path, "a")))
    assert done.returncode == 0, done.stderr
    assert files(tmp_path)["outer/sweep/3/job.log"] == "this is job 3, attempt 1\n"


def test_directory_with_other_files_on_a_node_is_left_alone(run: Run, tmp_path: Path) -> None:
    hidden = tmp_path / "outer"
    over = f"'mount -t tmpfs none {hidden} && mkdir -p {hidden}/sweep/0 && exec \"$@\"'"
    (tmp_path / "outer").mkdir()
    occupied = node(tmp_path, "a", "unshare", "-m", "sh", "-c", over, "sh")
    said = refusal(sweep(run, tmp_path, "n=1,2", FETCH, on(occupied)))
    assert f"cannot make the sweep's directory {hidden}/sweep: other files are there. Remedy: remove it there" in said


def test_unknown_way_is_refused(run: Run, tmp_path: Path) -> None:
    said = refusal(sweep(run, tmp_path, "n=1,2", "hydra.launcher.outputs=copied"))
    assert "hydra.launcher.outputs: must be one of shared, fetch, got 'copied'" in said
