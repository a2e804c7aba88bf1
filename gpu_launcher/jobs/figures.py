"""What tables of results show about a job, apart from its parameters and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpu_launcher.json_data import Values


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known about a job for tables of results."""

    values: Values = field(default_factory=dict)
    """What it returned, by name."""
    peak_memory: int | None = None
    """Most bytes of the host's memory that one of its processes had resident. None if it is not known."""
    peak_device_memory: int | None = None
    """Most bytes that its processes were seen to use on one of its devices. None if they were not seen."""


NO_FIGURES = Figures()
"""The figures of a job about which nothing is known."""
