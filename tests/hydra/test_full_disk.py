"""A disk that fills up during a sweep, and the resumption of that sweep once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_launcher.jobs.manifest import State, read
from tests.small_disk import mounted_tmpfs

Run = Callable[..., subprocess.CompletedProcess[str]]

APP = """
import sys
from pathlib import Path

import hydra

sys.path.insert(0, {repository!r})
from tests.small_disk import fill


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    if cfg.n == 2 and not Path("room").exists():
        fill(Path("disk"))
    return float(cfg.n)


main()
"""


@pytest.mark.root
@pytest.mark.parametrize("sweeper", ["basic", "grid_async"])
def test_sweep_says_that_its_disk_is_full_and_is_resumed(run: Run, tmp_path: Path, sweeper: str) -> None:
    (tmp_path / "app.py").write_text(APP.format(repository=str(Path(__file__).parents[2])))
    options = ("-m", f"hydra/sweeper={sweeper}", "hydra.sweep.dir=disk/sweep", "hydra.launcher.devices=simulated:1")
    with mounted_tmpfs(tmp_path / "disk", "size=512k"):
        ran = run(tmp_path, ("app.py",), *options, "+n=range(0,6)")
        assert ran.returncode == 1
        (first, *more) = [line for line in ran.stderr.splitlines() if " FAILED after" in line]
        assert "could not write its result: " in first
        assert "No space left on device" in first
        assert all("No space left" in line or "same as job" in line for line in more)
        assert "results.csv cannot be written (No space left on device)" in ran.stderr
        (tmp_path / "room").touch()
        (tmp_path / "disk" / "filler").unlink()
        left = read(tmp_path / "disk/sweep")
        assert [left[number].state for number in (0, 1)] == [State.COMPLETED] * 2
        assert {left[number].state for number in range(2, 6)} <= {State.FAILED, State.LOST}
        again = run(tmp_path, ("app.py",), *options, "+n=range(0,6)", "hydra.launcher.resume=true")
        assert again.returncode == 0, again.stderr
        assert "resumed: 2 of 6" in again.stderr
        assert {entry.state for entry in read(tmp_path / "disk/sweep").values()} == {State.COMPLETED}
        assert (tmp_path / "disk/sweep/results.csv").read_text().count("completed") == 6
