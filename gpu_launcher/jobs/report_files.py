"""The names of the files in which jobs leave their reports (`jobs.reports`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """The files in which the jobs of one launch leave their reports."""

    directory: Path
    launch: str = ""
    """The id of the launch, if several launches use the directory one after another."""

    def path(self, number: int) -> Path:
        """Return the report file of one job."""
        return self.directory / self.name(number)

    def name(self, number: int) -> str:
        """Return the name of that file."""
        return f"{number}.{self.launch}.report" if self.launch else f"{number}.report"
