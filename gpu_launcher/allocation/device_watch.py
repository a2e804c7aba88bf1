"""Decides from measurements which devices must not be granted now, and which ones to prefer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from gpu_launcher.debug_log import get_logger
from gpu_launcher.devices import Condition, Links, NvmlProbe, by_load, load_levels, why_busy
from gpu_launcher.devices.monitor import ConditionMonitor, Reading
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import DevicePreference, PoolView, leased_memory, owners_of, uses_of
from gpu_launcher.model import Device, DeviceKind, Request

_log = get_logger("allocation.device_watch")

WAITING_INTERVAL = 1.0
"""Seconds between two measurements of the devices while a request waits."""
IDLE_INTERVAL = 5.0
"""Seconds between two measurements while no request waits. They serve only to notice a broken device."""


class DeviceWatch:
    """Keeps the devices' last conditions from a ConditionMonitor, and judges which are unavailable. Never blocks."""

    def __init__(
        self,
        devices: tuple[Device, ...],
        pool: Callable[[], PoolView],
        *,
        launcher: int,
        monitor: ConditionMonitor,
        busy_memory: int | None,
        links: Links | None = None,
        on_fault: Callable[[Device, str], None] = lambda device, fault: None,
        exists: Callable[[int], bool] = lambda pid: Path(f"/proc/{pid}").exists(),
    ) -> None:
        """Watch `devices`, which belong to `pool`.

        `launcher` is the id of the process for which requests are made, such as the head. `busy_memory` is as for
        `why_busy`. `on_fault` is called once for each device that is set aside, with the reason. `exists` says whether
        a process id exists.
        """
        self._devices = devices
        self._pool = pool
        self._launcher = launcher
        self._monitor = monitor
        self._busy_memory = busy_memory
        self._links = links or Links()
        self._on_fault = on_fault
        self._exists = exists
        self._levels: dict[str, int] = {}
        self._asked = float("-inf")
        self._released: dict[str, float] = {}
        self.unavailable: dict[str, str] = {}
        """The reason why a device must not be granted now, by UUID. It continues `GPU 1 ...`."""
        self.faults: dict[str, str] = {}
        """The reason why a device is set aside as broken, by UUID. Part of `unavailable`."""
        self.problem: str | None = None
        """The reason why the devices could not be measured; None if they could. They are granted nevertheless."""

    def fileno(self) -> int:
        """A descriptor that is readable when `receive` should be called."""
        return self._monitor.fileno()

    @property
    def seen(self) -> float | None:
        """The time when the last completed measurement began; None before the first."""
        return None if self._monitor.latest is None else self._monitor.latest.asked

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions of the devices at the last measurement; empty if they are unknown."""
        return () if self._monitor.latest is None else self._monitor.latest.conditions

    @property
    def ready(self) -> bool:
        """Whether a measurement has completed."""
        return self._monitor.latest is not None

    @property
    def preference(self) -> DevicePreference:
        """The preference among devices: the least loaded first; for several devices, also their connections."""
        ranking = tuple(device.uuid for device in by_load(self._devices, self._levels))
        return DevicePreference(ranking, self._links.between if self._links.pairs else None)

    def look(self, now: float, *, waiting: bool) -> None:
        """Start a measurement if the last one is too old."""
        if now - self._asked >= (WAITING_INTERVAL if waiting else IDLE_INTERVAL):
            self.look_again(now)

    def look_again(self, now: float) -> None:
        """Start a measurement now, because something has changed."""
        before = self._monitor.latest
        if self._monitor.asking is None:
            self._asked = now
        self._monitor.ask(now)
        if self._monitor.latest is not before and self._monitor.latest is not None:
            self._take(self._monitor.latest)

    def receive(self) -> None:
        """Process the monitor's answer, if there is one."""
        reading = self._monitor.receive()
        if reading is not None:
            self._take(reading)

    def released(self, uuids: Collection[str], now: float) -> None:
        """Ignore measurements of these devices from before `now`, when our lease ended: they show our own job."""
        for uuid in uuids:
            self._released[uuid] = now
            if uuid not in self.faults:
                self.unavailable.pop(uuid, None)

    def close(self) -> None:
        """Stop watching."""
        self._monitor.close()

    def close_in_child(self) -> None:
        """Drop everything that belongs to the parent. Called in a forked child."""
        self._monitor.close_in_child()

    def _take(self, reading: Reading) -> None:
        self.problem = reading.problem
        conditions = {condition.uuid: condition for condition in reading.conditions}
        self._levels = load_levels(reading.conditions, self._levels)
        before = self.faults
        self.faults = {condition.uuid: condition.fault for condition in reading.conditions if condition.fault}
        for device in self._devices:
            if (fault := self.faults.get(device.uuid)) and before.get(device.uuid) != fault:
                _log.warning("%s %s; it is set aside", device.label, fault)
                self._on_fault(device, fault)
        self.unavailable = dict(self.faults)
        if self._busy_memory is None or not any(_in_use(condition) for condition in reading.conditions):
            return
        try:
            pool = self._pool()
        except PoolDirectoryError:
            return  # the next claim reports it
        for device in self._devices:
            if device.uuid in conditions and reading.asked >= self._released.get(device.uuid, reading.asked):
                reason = self._why_busy(device, conditions[device.uuid], pool)
                if reason is not None:
                    self.unavailable.setdefault(device.uuid, reason)

    def _why_busy(self, device: Device, condition: Condition, pool: PoolView) -> str | None:
        holds = uses_of(device, pool)
        if any(hold.whole for hold in holds):
            return None  # the whole device is leased, so it is unavailable anyway
        owners = owners_of(pool, holds, self._exists)
        return why_busy(
            condition,
            owners=None if owners is None else owners | {self._launcher},
            leased=leased_memory(device, holds),
            leases=len(holds),
            busy_memory=self._busy_memory,
        )


def links_among(devices: tuple[Device, ...], request: Request | None = None) -> Links | None:
    """The connections of the GPUs; None if they cannot matter.

    They matter only if there is a choice: there are at least two GPUs, and the `request`, if given, is for more than
    one device but not for all.
    """
    if request is not None and not 1 < request.gpus < len(devices):
        return None
    real = tuple(device for device in devices if device.kind is DeviceKind.GPU)
    return NvmlProbe().links(real) if len(real) > 1 else None


def _in_use(condition: Condition) -> bool:
    return bool(condition.processes) or bool(condition.memory_used)
