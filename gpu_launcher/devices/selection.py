"""From the option `hydra.launcher.devices` to the devices of this launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_launcher.devices.cpu import cpu_slots, usable_cpus
from gpu_launcher.devices.nvml import NvmlProbe
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.devices.specification import (
    Auto,
    CpuSlots,
    Named,
    SimulatedDevices,
    read_specification,
)
from gpu_launcher.devices.visibility import VISIBLE, Visible, visible
from gpu_launcher.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpu_launcher.devices.probe import DeviceProbe, Inventory
    from gpu_launcher.model import Device

OPTION = "hydra.launcher.devices"


@dataclass(frozen=True, slots=True)
class Selection:
    """The devices of a launch, and what the user should be told about them."""

    devices: tuple[Device, ...]
    """At least one, each once; in the order in which the user (or the mask) named them."""
    notices: tuple[str, ...] = ()
    """One line each."""
    by_uuid: bool = False
    """Name GPUs to jobs by UUID, with `environment(devices, by_uuid=True)`: some GPU of this machine cannot
    be used (lost, in MIG mode), and then CUDA may skip it in its count where NVML does not."""


def select_devices(
    spec: object,
    environ: Mapping[str, str],
    nvml: DeviceProbe | None = None,
    cpu_count: int | None = None,
    option: str = OPTION,
) -> Selection:
    """The devices that `spec` means on this machine.

    `spec` is what the option holds, as plain Python values: `auto`; GPU indices (NVML's, as nvidia-smi shows
    them), UUIDs or unique prefixes of UUIDs, one or several, as a list or separated by commas; `cpu`,
    `cpu:4`; `simulated:8`. A mask in `environ` restricts GPUs by CUDA's rules (see `visibility`). `nvml` is
    asked only for `auto` and for GPUs. `cpu_count` is the number of CPU slots where none is given (default:
    `usable_cpus()`).

    Raises OptionError, which names `option`, for what is no device, is not there or not usable, is hidden by
    the mask, or is named twice; DeviceError where the driver does not answer.
    """
    specification = read_specification(spec, option)
    match specification:
        case CpuSlots(count):
            return Selection(cpu_slots(count or cpu_count or usable_cpus()))
        case SimulatedDevices(count):
            return Selection(simulated_devices(count), (_simulated_notice(count),))
    inventory = (nvml or NvmlProbe()).inventory()
    seen = visible(inventory, environ)
    by_uuid = bool(inventory.unusable)
    match specification:
        case Named():
            return Selection(_find(specification, inventory, seen, environ, option), seen.notices, by_uuid)
        case Auto():
            if seen.devices:
                skipped = tuple(f"GPU {gpu.index} is left out: it {gpu.reason}" for gpu in seen.unusable)
                return Selection(seen.devices, seen.notices + skipped, by_uuid)
    slots = cpu_slots(cpu_count or usable_cpus())
    why = _why_none(inventory, seen, environ)
    return Selection(slots, (f"{why}; using {_slots(len(slots))} instead ({option}=cpu:N for another number)",))


def _find(
    wanted: Named, inventory: Inventory, seen: Visible, environ: Mapping[str, str], option: str
) -> tuple[Device, ...]:
    if not inventory.devices:
        reason = inventory.nothing_because or _why_none(inventory, seen, environ)
        raise OptionError(option, f"there is no GPU to choose: {reason}; use auto, cpu:4, or simulated:8")
    found: dict[str, Device] = {}
    named: dict[str, int | str] = {}
    for name in wanted.names:
        device = _find_one(name, inventory, seen, environ, option)
        if device.uuid in found:
            again = f"{name!r} and {named[device.uuid]!r}" if name != named[device.uuid] else repr(name)
            raise OptionError(option, f"{device.label} is named twice ({again}); name each device once")
        found[device.uuid] = device
        named[device.uuid] = name
    return tuple(found.values())


def _find_one(name: int | str, inventory: Inventory, seen: Visible, environ: Mapping[str, str], option: str) -> Device:
    def fits(index: int, uuid: str | None) -> bool:
        if isinstance(name, int):
            return name == index
        return uuid is not None and uuid.lower().startswith(name.lower())

    matches = [device for device in inventory.devices if fits(device.index, device.uuid)]
    broken = [gpu for gpu in inventory.unusable if fits(gpu.index, gpu.uuid)]
    called = f"GPU {name}" if isinstance(name, int) else name
    if len(matches) + len(broken) > 1:
        both = [(gpu.index, gpu.uuid) for gpu in matches] + [(gpu.index, gpu.uuid) for gpu in broken]
        which = " and ".join(f"GPU {index} ({uuid})" for index, uuid in both)
        raise OptionError(option, f"{called} fits {which}; write more of the UUID")
    if broken:
        raise OptionError(option, f"GPU {broken[0].index} {broken[0].reason}; {_available(seen)}")
    if not matches:
        hint = "; a number is a GPU's index, how many a job gets is hydra.launcher.gpus" * isinstance(name, int)
        raise OptionError(option, f"{called} is not in this machine; {_available(seen)}{hint}")
    if matches[0] not in seen.devices:
        raise OptionError(
            option,
            f"{called} is hidden by {VISIBLE}={environ[VISIBLE]}; {_available(seen)}; "
            f"change or unset {VISIBLE} to use others",
        )
    return matches[0]


def _available(seen: Visible) -> str:
    if not seen.devices:
        return "no GPU is available (auto, cpu:4 and simulated:8 work)"
    return "available: " + ", ".join(f"{device.label} ({device.name}, {device.uuid[:12]})" for device in seen.devices)


def _why_none(inventory: Inventory, seen: Visible, environ: Mapping[str, str]) -> str:
    """Why no GPU is left, without a full stop."""
    if inventory.nothing_because:
        return inventory.nothing_because
    if seen.unusable or VISIBLE not in environ:
        reasons = "; ".join(f"GPU {gpu.index} {gpu.reason}" for gpu in seen.unusable)
        return f"no GPU can be used: {reasons}"
    total = len(inventory.devices) + len(inventory.unusable)
    all_of_them = "the machine's only GPU" if total == 1 else f"all {total} GPUs of the machine"
    problem = "".join(f" ({notice})" for notice in seen.notices)
    return f"{VISIBLE}={environ[VISIBLE]!r} hides {all_of_them}{problem}: change or unset it to use them"


def _slots(count: int) -> str:
    return "1 CPU slot" if count == 1 else f"{count} CPU slots"


def _simulated_notice(count: int) -> str:
    these = "1 device is" if count == 1 else f"{count} devices are"
    return f"{these} simulated: no real GPU is reserved, whatever the jobs do with {VISIBLE}"
