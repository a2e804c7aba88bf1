"""How long a node can run jobs, if its engine ends it at a time that is known, as Slurm ends an allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.job import Refusal
from gpu_launcher.model import Request
from gpu_launcher.wording import duration


@dataclass(frozen=True, slots=True)
class Term:
    """The time for which a node can run jobs."""

    ends: float
    """When its jobs may be interrupted, in seconds of its machine's monotonic clock."""
    length: float
    """Seconds for which it can run jobs from its beginning, whenever it is started again."""

    def refuse(self, request: Request, spell: Callable[[str], str] = str) -> None:
        """Raise OptionError if a job can never run until its timeout. `spell` gives the user's name for an option."""
        if request.timeout is not None and request.timeout > self.length:
            raise OptionError(
                spell("timeout"),
                f"{duration(request.timeout)} is longer than jobs can run on this node before its allocation ends, "
                f"{duration(self.length)}. Remedy: a shorter timeout, or a longer allocation, as with --time",
            )

    def refusal(self, timeout: float | None, now: float) -> Refusal | None:
        """Say why a job that starts now may be interrupted before its timeout. None if not, or without a timeout."""
        if timeout is None or now + timeout <= self.ends:
            return None
        return Refusal.TOO_LATE if timeout <= self.length else Refusal.NEVER

    def explain(self, timeout: float, why: Refusal, now: float) -> str:
        """Say why a job is refused, as a sentence."""
        runs = f"at most {duration(self.length)}" if why is Refusal.NEVER else f"another {duration(self.ends - now)}"
        return f"its timeout of {duration(timeout)} is longer than its node can run jobs: {runs}"
