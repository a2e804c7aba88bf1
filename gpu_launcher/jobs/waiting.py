"""One request that waits for its devices."""

from __future__ import annotations

from collections.abc import Callable

from gpu_launcher.devices import combinable
from gpu_launcher.errors import OptionError, PoolDirectoryError, RequestError
from gpu_launcher.jobs.explaining import Wait, explain_wait
from gpu_launcher.jobs.pool import BEARING, EXPLAIN
from gpu_launcher.jobs.watch import DeviceWatch
from gpu_launcher.leases import Lease, Ledger, Ticket, refusal
from gpu_launcher.model import Device, Owner, Request


def refuse(request: Request, devices: tuple[Device, ...], option: str) -> None:
    """Raise OptionError, which names `option`, for a request that `devices` could never grant."""
    try:
        problem = refusal(request, combinable(devices, request.gpus))
    except RequestError as error:
        raise OptionError(option, str(error)) from error
    if problem is not None:
        labels = ", ".join(device.label for device in devices)
        raise OptionError(option, f"the request is {problem}. There are: {labels}")


class WaitingRequest:
    """A place in line, from which devices come, or the reason why not yet.

    Ask it again when one of `descriptors` is readable and has been dealt with, and after `patience` seconds.
    """

    def __init__(
        self,
        request: Request,
        devices: tuple[Device, ...],
        ledger: Ledger,
        watch: DeviceWatch,
        owner: Owner,
        *,
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """Get in line. The user hears by `tell` whom it waits for, once per change. Raises PoolDirectoryError."""
        self._devices = devices
        self._ledger = ledger
        self._watch = watch
        self._tell = tell
        self._clock = clock
        self._ticket: Ticket = ledger.enqueue(request, combinable(devices, request.gpus), owner)
        self.asked = False
        """Whether the devices were asked for, in vain, knowing how they are."""
        self.reason = ""
        """Who or what was in the way at last, in words."""
        self._explain_at = 0.0
        self._trouble_since: float | None = None
        watch.look_again(clock())

    def descriptors(self) -> list[tuple[int, Callable[[], None]]]:
        """What to watch, with what to call when it is readable."""
        watched: list[tuple[int, Callable[[], None]]] = [(self._watch.fileno(), self._watch.receive)]
        if (descriptor := self._ledger.fileno()) is not None:
            watched.append((descriptor, self._hear_of_leases))
        return watched

    @property
    def patience(self) -> float:
        """Seconds until `ask` should be called though nothing is readable."""
        return self._ledger.poll_interval

    def ask(self) -> Lease | None:
        """The devices, if its turn has come. Raises PoolDirectoryError if that is unusable for long."""
        now = self._clock()
        self._watch.look(now, waiting=True)
        if not self._watch.ready:
            return None
        try:
            lease = self._ledger.claim(self._ticket, self._watch.unavailable, self._watch.taste)
            self.asked = True
            if lease is None and now >= self._explain_at:
                self._explain_at = now + EXPLAIN
                self.explain()
        except PoolDirectoryError as error:
            self._bear(error, now)
            return None
        self._trouble_since = None
        return lease

    def explain(self) -> None:
        """Find out who or what is in the way, and tell the user if that has changed."""
        unavailable = self._watch.unavailable
        wait: Wait = explain_wait(self._ledger.snapshot(), self._devices, set(), self._ticket, unavailable)
        if wait.reason and wait.reason != self.reason:
            self.reason = wait.reason
            self._tell(wait.reason)

    def cancel(self) -> None:
        """Give up the place in line."""
        self._ledger.cancel(self._ticket)

    def _hear_of_leases(self) -> None:
        self._ledger.drain()
        if self._watch.unavailable:
            # What ended may have been what looked like a stranger.
            self._watch.look_again(self._clock())

    def _bear(self, error: PoolDirectoryError, now: float) -> None:
        if self._trouble_since is None:
            self._trouble_since = now
            self._tell(f"{error}. It waits for that to be mended")
        if now - self._trouble_since > BEARING:
            raise error
