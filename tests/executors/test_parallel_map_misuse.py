"""`parallel_map` in the hands of somebody who got something wrong: what is said, and that it helps."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.executors.record_errors import RecordError, RemoteTraceback
from gpu_launcher.jobs import remarks
from gpu_launcher.jobs.where import Where

TREE = Path(__file__).parents[2]


@pytest.fixture
def pool(tmp_path: Path) -> Where:
    return Where(devices="simulated:2", pool_dir=tmp_path / "pool")


@pytest.fixture(autouse=True)
def remarks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remarks, "_said", set())


def causes(error: BaseException) -> list[BaseException]:
    """The error and its causes, of which there are few."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        assert cause not in chain, "it is its own cause"
        chain.append(cause)
    return chain


# What functions raise that would mean something else here


def leave(record: int) -> None:
    sys.exit("bye")


def interrupt(record: int) -> None:
    raise KeyboardInterrupt


def exhaust(record: int) -> int:
    none: Iterator[int] = iter(())
    return next(none)


@pytest.mark.parametrize(
    ("function", "kind"), [(leave, SystemExit), (interrupt, KeyboardInterrupt), (exhaust, StopIteration)]
)
def test_what_cannot_be_raised_here_is_the_exception_of_a_record_error(pool: Where, function: Any, kind: type) -> None:
    with pytest.raises(RecordError, match=rf"record 0 \(7\) failed on .*(?s:.*){kind.__name__}") as caught:
        list(parallel_map([7], function=function, pool=pool))
    assert type(caught.value.exception) is kind
    assert causes(caught.value) == [caught.value]


def test_a_setup_that_raises_stop_iteration_says_so(pool: Where) -> None:
    with pytest.raises(RemoteTraceback, match=r"setup failed on .*(?s:.*)StopIteration") as caught:
        list(parallel_map([1], setup=lambda: next(iter(())), function=lambda record, model: record, pool=pool))
    assert causes(caught.value) == [caught.value]
