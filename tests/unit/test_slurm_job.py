"""A job of Slurm, with commands that stand in for Slurm's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_launcher.nodes import slurm_job
from gpu_launcher.nodes.slurm_job import SlurmJob


@pytest.mark.parametrize(("cluster", "options"), [("", ""), ("b", "--clusters=b ")])
def test_only_the_cluster_of_the_job_is_asked_to_cancel_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, options: str
) -> None:
    program = tmp_path / "scancel"
    program.write_text(f'#!/bin/sh\necho "$@" "${{SLURM_CLUSTERS-none}}" >>{tmp_path}/called\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CLUSTERS", "a,b")
    monkeypatch.setattr(slurm_job, "SLURM_SECONDS", 100.0)  # this machine may be busy
    SlurmJob("7", cluster).cancel()
    assert (tmp_path / "called").read_text() == f"{options}--quiet 7 none\n"
