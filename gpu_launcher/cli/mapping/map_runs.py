"""The source of jobs for the runs of a map.

A resumed map begins with a table that has only the runs that completed (see `resume.py`). Each earlier run that did not
complete is in two sets: in `missing` until the input names it again, and in `_without_result` until it has a line in
the new table. When the map ends, the runs still in `_without_result` get their last result back. If runs are still in
`missing`, the input has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Sequence
from typing import Any

from gpu_launcher.cli.mapping.inputs import RunSequence, changed
from gpu_launcher.cli.mapping.map_directory import MapDirectory
from gpu_launcher.cli.mapping.record_reader import Bad
from gpu_launcher.cli.mapping.results_file import ResultsFile, result_line, write_outcome
from gpu_launcher.cli.mapping.resume import EarlierRuns, last_result, unwritable
from gpu_launcher.cli.mapping.values import Params, words
from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.labels import Labels
from gpu_launcher.jobs.source import Exhausted, Offer, Remark, Statement
from gpu_launcher.model import Device
from gpu_launcher.text import short_path
from gpu_launcher.wording import count

TURN = 0.02
"""Longest time in seconds that one `receive` looks for runs before it returns to the loop."""
BAD_NAMED = 10
"""Maximum number of invalid records that are reported one by one. More are only counted."""


class MapRuns:
    """A `gpu_launcher.jobs.source.JobSource` that offers each run of a map as a job."""

    def __init__(
        self,
        sequence: RunSequence,
        directory: MapDirectory,
        results: ResultsFile,
        earlier: EarlierRuns | None = None,
        *,
        total: int | None = None,
        keep_going: bool,
    ) -> None:
        """Run the `sequence` of `total` runs in `directory`, except those that completed in `earlier` launches.

        With `keep_going`, invalid records are skipped. Otherwise no run starts after the first of them.
        """
        self._sequence = sequence
        self._total = total
        self._directory = directory
        self.results = results
        self._earlier = earlier
        self._kept = earlier is None
        """Whether the table has no results of earlier runs that did not complete."""
        self.missing = set(earlier.incomplete) if earlier else set()
        """Earlier runs that did not complete and that the input has not named yet."""
        self._without_result = set(self.missing)
        """Earlier runs that did not complete and have no line in the new table yet."""
        self.ran = False
        """Whether any run was started."""
        self._keep_going = keep_going
        self._wanted = 0
        self._next = 0
        """Index of the run after the last one that was offered."""
        self._params: dict[int, Params] = {}
        """The parameters of runs that were offered and have not ended, by index."""
        self._labels = Labels(sequence.fixed)
        self._over = False
        self._pending: list[Statement] = [Remark(f"results are in {short_path(directory.path)}")]
        self.bad = 0
        """Number of invalid records."""
        self.failed = 0
        """Number of runs of this launch that did not complete."""
        self.problem: str | None = None
        """Why no more runs start, or why results could not be written; None if neither happened."""
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._event, select.EPOLLIN)
        self._watches = False
        """Whether `fileno` also becomes readable when the input does."""

    @property
    def is_new(self) -> bool:
        """Whether the map has no earlier launch."""
        return self._earlier is None

    def fileno(self) -> int:
        """See `JobSource`."""
        return self._epoll.fileno()

    def request_jobs(self, count: int) -> None:
        """See `JobSource`."""
        self._wanted += count
        self._wake()

    def coming(self) -> range:
        """See `JobSource`. The runs of a stream are known only when they have arrived."""
        return range(0) if self._over or self._total is None else range(self._next, self._total)

    def receive(self) -> list[Statement]:
        """See `JobSource`. Raises UsageError if the table of an earlier launch cannot be replaced."""
        self._rest()
        self._drop_old_results()
        statements, self._pending = self._pending, []
        until = time.monotonic() + TURN
        waiting = False
        while self._wanted and not self._over and not waiting:
            if time.monotonic() > until:
                self._wake()
                break
            waiting = self._look(statements)
        self._watch(waiting)
        return statements

    def _look(self, statements: list[Statement]) -> bool:
        """Take the next run from the input. Return whether the run has not arrived yet."""
        try:
            found = self._sequence.next()
        except GpuLauncherError as error:
            self._give_up(str(error), statements)
            return False
        if found is None:
            if not self._sequence.over:
                return True
            self._over = True
            statements.append(Exhausted(self._left_out()))
        elif isinstance(found, Bad):
            self._skip(found, statements)
        elif self._earlier is None or found.index not in self._earlier:
            self._wanted -= 1
            self._next = found.index + 1
            self.missing.discard(found.index)
            self._params[found.index] = found.params
            before = self._directory.run(found.index).attempts() if self._earlier else 0
            statements.append(
                Offer(Job(found.index, self._labels.of(words(found.params)), found.params, attempts_before=before))
            )
        elif not self._earlier.agrees(found.index, found.params):
            self._give_up(changed(found.index), statements)
        return False

    def _drop_old_results(self) -> None:
        """Replace the table of the earlier launches.

        This is done only when the loop first asks for runs, so a resumption that is refused before changes nothing.
        """
        if not self._kept:
            try:
                self.results.replace_by(self._directory.kept_results)
            except OSError as error:
                raise unwritable(self._directory, error) from error
            self._kept = True

    def _skip(self, bad: Bad, statements: list[Statement]) -> None:
        self.bad += 1
        if not self._keep_going:
            self._give_up(bad.problem, statements)
        elif self.bad <= BAD_NAMED:
            statements.append(Remark(f"{bad.problem}; it is left out"))

    def _left_out(self) -> str | None:
        return f"{count(self.bad, 'line')} left out" if self.bad > BAD_NAMED else None

    def _give_up(self, problem: str, statements: list[Statement]) -> None:
        if self.problem is None:
            self.problem = problem
            statements.append(Remark(problem) if self._over else Exhausted(f"{problem}. No more runs are started"))
            self._over = True

    # Started and ended runs

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """See `JobSource`."""
        self.ran = True

    def on_message(self, number: int, what: Any) -> None:
        """See `JobSource`."""

    def ended(self, result: JobResult) -> None:
        """See `JobSource`."""
        params = self._params.pop(result.number)
        if result.outcome is not Outcome.COMPLETED:
            self.failed += 1
            if result.duration is None and result.outcome is Outcome.CANCELLED:
                return  # it never ran
        self._without_result.discard(result.number)
        left: dict[str, Any] = json.loads(result.payload) if result.payload else {"duration": _rounded(result.duration)}
        line = result_line(
            self._directory,
            result.number,
            **{
                **left,
                "params": params,
                "outcome": result.outcome.value,
                "devices": [device.label for device in result.devices],
                "attempts": result.attempts,
                "message": result.message,
            },
        )
        try:
            self.results.add(line)
            write_outcome(self._directory, line)
        except OSError as error:
            self._cannot_write(error)

    def retry(self, jobs: Sequence[Job]) -> None:
        """See `JobSource`. Until they end, these runs have no line in the table."""
        if self.problem is not None:
            raise ValueError(self.problem)
        numbers = {job.number for job in jobs}
        try:
            self.results.drop(numbers, self._directory.kept_results)
        except OSError as error:
            raise ValueError(f"{short_path(self._directory.path)} cannot be written: {error.strerror}") from error
        self._params.update({job.number: job.spec for job in jobs})
        self._without_result |= numbers
        self.failed -= len(numbers)

    def _cannot_write(self, error: OSError) -> None:
        """Start no more runs. Results of running jobs stay in memory until they can be written."""
        if self.problem is None:
            self._give_up(
                f"results cannot be written to {short_path(self._directory.path)}: {error.strerror}", self._pending
            )
            self._wake()

    def tick(self) -> None:
        """See `JobSource`."""

    def close(self) -> None:
        """Write the last results of runs that failed before and did not run again. Called after the loop."""
        self._epoll.close()
        os.close(self._event)
        for index in sorted(self._without_result) if self._kept else ():
            if (line := last_result(self._directory, index)) is not None:
                with contextlib.suppress(OSError):  # the line is kept for `flush`
                    self.results.add(line)

    # Waking the loop

    def _wake(self) -> None:
        os.eventfd_write(self._event, 1)

    def _rest(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return  # the input woke the loop

    def _watch(self, wanted: bool) -> None:
        source = self._sequence.source
        if source is None or not source.waits or wanted == self._watches:
            return
        self._watches = wanted
        if wanted:
            self._epoll.register(source.fileno(), select.EPOLLIN)
        else:
            self._epoll.unregister(source.fileno())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
