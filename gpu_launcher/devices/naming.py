"""Finds the GPUs and MIG instances that a user names one by one, and explains names that do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_launcher.devices.visibility import VISIBLE, Visible, why_nothing_is_visible
from gpu_launcher.errors import OptionError
from gpu_launcher.model import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_launcher.devices.probe import Inventory
    from gpu_launcher.model import Device

MAX_LISTED = 16
"""Most GPUs that a message lists one by one."""

Name = int | str
"""An NVML index, a UUID or a prefix of a UUID."""


@dataclass(frozen=True, slots=True)
class Chooser:
    """Finds GPUs by name among the visible ones. Every failure is an OptionError about `option`."""

    inventory: Inventory
    seen: Visible
    option: str
    number: int | None = None
    """The only name, if it is a bare number."""

    def choose(self, names: Sequence[Name]) -> tuple[Device, ...]:
        """The devices with these names, in this order. No device may be named twice.

        The name of a GPU in MIG mode means all of its instances.
        """
        if not self.inventory.devices:
            why = why_nothing_is_visible(self.inventory, self.seen)
            raise OptionError(self.option, f"there is no GPU to choose: {why}; use auto, cpu:4, or simulated:8")
        chosen: dict[Device, Name] = {}
        for name in names:
            for device in self._find(name):
                if device in chosen:
                    first = chosen[device]
                    how = "" if name == first else f", as {first!r} and as {name!r}"
                    raise OptionError(self.option, f"{device.label} is named twice{how}; name each device once")
                chosen[device] = name
        return tuple(chosen)

    def _find(self, name: Name) -> list[Device]:
        devices = [device for device in self.inventory.devices if _fits(name, device)]
        broken = [gpu for gpu in self.inventory.unusable if _fits_gpu(name, gpu.index, gpu.uuid)]
        called = f"GPU {name}" if isinstance(name, int) else repr(name)
        found = {_meant(name, device) for device in devices} | {(f"GPU {gpu.index}", gpu.uuid) for gpu in broken}
        if len(found) > 1:
            which = " and ".join(f"{label} ({uuid})" for label, uuid in sorted(found, key=str))
            raise OptionError(self.option, f"{called} fits {which}; write more of the UUID")
        if broken:
            problem = f"GPU {broken[0].index} cannot be used: it {broken[0].reason}"
            raise OptionError(self.option, f"{problem}; {self._available()}")
        if not devices:
            hint = ""
            if isinstance(name, int):
                hint = f"; {about_number(name, self.option)}" if self.number == name else ""
                hint = hint or "; a number is a GPU's index, how many GPUs a job gets is another option"
            raise OptionError(self.option, f"{called} is not in this machine; {self._available()}{hint}")
        if seen := [device for device in devices if device in self.seen.devices]:
            return seen
        raise OptionError(
            self.option,
            f"{called} is hidden by {VISIBLE}={self.seen.mask!r}; {self._available()}; "
            f"change or unset {VISIBLE} to use others",
        )

    def _available(self) -> str:
        if not self.seen.devices:
            return "no GPU is available (auto, cpu:4 and simulated:8 would work)"
        return "available: " + ", ".join(f"{gpu.label} ({gpu.name}, {gpu.uuid[:12]})" for gpu in self.seen.devices)


def about_number(number: int, option: str) -> str:
    """Explain a bare number as a choice of devices, for users who may have meant a number of GPUs."""
    listed = ",".join(map(str, range(number))) if number <= MAX_LISTED else f"0,1,...,{number - 1}"
    flag = option.startswith("--")
    meaning = f"{option}{' ' if flag else '='}{number} means GPU number {number}"
    if number < 2:
        return f"{meaning}, not how many GPUs to use"
    return f"{meaning}; for {number} GPUs write {option}{f' {listed}' if flag else f'=[{listed}]'}"


def _fits(name: Name, device: Device) -> bool:
    by_itself = device.kind is DeviceKind.MIG and _fits_gpu(name, None, device.uuid)
    return by_itself or _fits_gpu(name, device.index, device.parent or device.uuid)


def _fits_gpu(name: Name, index: int | None, uuid: str | None) -> bool:
    if isinstance(name, int):
        return name == index
    return uuid is not None and uuid.lower().startswith(name.lower())


def _meant(name: Name, device: Device) -> tuple[str, str]:
    """Label and UUID of the device that a matching name means, or of the GPU whose instance it is."""
    if device.parent is None or (isinstance(name, str) and device.uuid.lower().startswith(name.lower())):
        return device.label, device.uuid
    return f"GPU {device.index}", device.parent
