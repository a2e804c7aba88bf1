"""What a map that is resumed knows of its earlier launches, and keeps of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from itertools import chain

from gpu_launcher.cli.mapping.place import Place
from gpu_launcher.cli.mapping.results import Completed, Results, completed_before, lines, result_line, settle
from gpu_launcher.cli.mapping.source import MapSource
from gpu_launcher.cli.mapping.supply import Supply
from gpu_launcher.errors import UsageError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.source import Offer, Statement
from gpu_launcher.model import Device
from gpu_launcher.text import short_path


@dataclass(frozen=True, slots=True)
class Before:
    """What is known of a map's earlier launches."""

    completed: Completed = field(default_factory=Completed)
    incomplete: frozenset[int] = frozenset()
    """Those of its runs that have a result or a directory, and did not complete."""
    runs: int = 0
    """How many it had, at least."""

    @classmethod
    def of(cls, place: Place) -> Before:
        """Raises OSError."""
        completed = completed_before(place)
        incomplete, last = set(), -1
        for index in chain((line["index"] for line in lines(place.results)), place.indices()):
            last = max(last, index)
            if index not in completed:
                incomplete.add(index)
        return cls(completed, frozenset(incomplete), last + 1)


class ResumableSource(MapSource):
    """The runs of a map that may have been launched before.

    What earlier launches found is changed as late as can be, when everything that could keep this one from running
    anything has been looked at. In the end, each run that failed before and did not run again has its result back.
    """

    def __init__(
        self, supply: Supply, place: Place, results: Results, before: Before | None, *, keep_going: bool
    ) -> None:
        super().__init__(supply, place, results, completed=before.completed if before else None, keep_going=keep_going)
        self._settled = before is None
        self.missing = set(before.incomplete) if before else set()
        """Runs of earlier launches that did not complete, as long as the supply has not named them."""
        self._earlier = set(self.missing)
        """Those which have no later result."""
        self.ran = False
        """Whether anything was started."""

    @property
    def results(self) -> Results:
        """The table, which is another one when an earlier launch's has been settled."""
        return self._results

    def receive(self) -> list[Statement]:
        """See `JobSource`. Raises UsageError if the earlier results cannot be settled."""
        if not self._settled:
            self._settle()
        statements = super().receive()
        self.missing.difference_update(said.job.number for said in statements if isinstance(said, Offer))
        return statements

    def _settle(self) -> None:
        try:
            settle(self._place)
            settled = Results(self._place.results)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._place.results.with_name("results.jsonl.tmp").unlink()
            raise unwritable(self._place, error) from error
        self._results.close()
        self._results = settled
        self._settled = True

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """See `JobSource`."""
        self.ran = True
        super().started(job, devices, log)

    def ended(self, result: JobResult) -> None:
        """See `JobSource`."""
        super().ended(result)
        if result.outcome is not Outcome.CANCELLED or result.duration is not None:
            self._earlier.discard(result.number)

    def close(self) -> None:
        """When the loop is over."""
        super().close()
        if self._settled:
            self._give_back()

    def _give_back(self) -> None:
        for index in sorted(self._earlier):
            run = self._place.run(index)
            outcome, params = run.read(), run.read_params()
            if outcome is not None and "outcome" in outcome and params is not None:
                line = result_line(self._place, index, **{**outcome, "params": params})
                with contextlib.suppress(OSError):  # it is kept, to be flushed when there is room
                    self._results.add(line)


def unwritable(place: Place, error: OSError) -> UsageError:
    return UsageError(
        f"results cannot be written to {short_path(place.path)} ({error.strerror}), so nothing was run: fix this, for "
        "example by making room, and run the command again"
    )
