"""Programs that launch more than once: sweepers with batches, notebooks, several sweeps in one process."""

from __future__ import annotations

from typing import Any

from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.starter import ForkServer
from gpu_launcher.processes.worker import Gate


def nothing(number: int, spec: Any, gate: Gate) -> Report:
    return Report(True, None, b"")


def test_a_fork_server_ends_though_a_later_one_has_copies_of_its_descriptors() -> None:
    first = ForkServer(nothing, "fork")
    second = ForkServer(nothing, "fork")
    first.close()  # returns
    second.close()
