"""Temporary directories that programs make while others remove what dead programs left."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpu_launcher.jobs.scratch import PREFIX, Scratch, _sweep


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_leftover_is_removed_and_a_directory_in_use_is_not(parent: Path) -> None:
    used, leftover = Scratch(), parent / f"{PREFIX}dead"
    leftover.mkdir()
    new = Scratch()
    assert sorted(parent.iterdir()) == sorted([used.path, new.path])
    used.remove()
    new.remove()
    assert list(parent.iterdir()) == []


def test_a_directory_that_is_removed_before_it_is_opened_is_made_again(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, []

    def make_and_lose_the_first(prefix: str) -> str:
        made.append(make(prefix=prefix))
        if len(made) == 1:
            _sweep(parent)  # as another program does that starts now
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose_the_first)
    scratch = Scratch()
    assert [str(scratch.path)] == made[1:]
    assert scratch.path.is_dir()
    scratch.remove()


def test_programs_that_start_together_have_a_directory_each() -> None:
    def start(number: int) -> Path:
        scratch = Scratch()
        (scratch.path / "file").write_text(str(number))
        assert [path.name for path in scratch.path.iterdir()] == ["file"]
        path = scratch.path
        scratch.remove()
        return path

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(start, range(400)))) == 400
