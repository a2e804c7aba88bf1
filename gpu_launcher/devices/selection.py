"""Selects the devices of a launch by the option `devices`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_launcher.devices.cpu import cpu_slots, usable_cpus
from gpu_launcher.devices.naming import Chooser, about_number
from gpu_launcher.devices.nvml import NvmlProbe
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.devices.specification import CpuSlots, Named, SimulatedDevices, read_specification
from gpu_launcher.devices.visibility import VISIBLE, visible, why_nothing_is_visible
from gpu_launcher.model import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpu_launcher.devices.probe import DeviceProbe
    from gpu_launcher.model import Device

OPTION = "devices"


@dataclass(frozen=True, slots=True)
class Selection:
    """The devices of a launch, with notices about them for the user."""

    devices: tuple[Device, ...]
    """At least one device, without duplicates, in the order in which the user or the mask named them."""
    notices: tuple[str, ...] = ()
    """Notices of one line each."""
    by_uuid: bool = False
    """Whether jobs must get GPUs by UUID, with `environment(devices, by_uuid=True)`. True if some GPU of this machine
    cannot be used or is in MIG mode, because CUDA may then skip it when counting, although NVML does not."""


def select_devices(
    spec: object,
    environ: Mapping[str, str],
    nvml: DeviceProbe | None = None,
    cpu_count: int | None = None,
    option: str = OPTION,
) -> Selection:
    """The devices that `spec` names on this machine.

    `spec` is the option's value in plain Python types: `auto`; one or more GPU indices (NVML's, as nvidia-smi shows
    them), or UUIDs of GPUs or MIG instances or unique prefixes of them, as a list or separated by commas; `cpu`,
    `cpu:4`; `simulated:8`. A GPU in MIG mode stands for its instances. A mask in `environ` restricts GPUs by CUDA's
    rules (see `visibility`). `nvml` is asked only for `auto` and for GPUs. `cpu_count` is the number of CPU slots if
    `spec` gives none (default: `usable_cpus()`).

    Raises OptionError, which names `option`, if an entry is not a device, or the device is missing, unusable, hidden by
    the mask or named twice. Raises DeviceError if the driver does not answer.
    """
    specification = read_specification(spec, option)
    match specification:
        case CpuSlots(count):
            return Selection(cpu_slots(count or cpu_count or usable_cpus()))
        case SimulatedDevices(count):
            return Selection(simulated_devices(count), (_simulated_notice(count),))
    inventory = (nvml or NvmlProbe()).inventory()
    seen = visible(inventory, environ)
    by_uuid = bool(inventory.unusable) or any(device.kind is DeviceKind.MIG for device in inventory.devices)
    if isinstance(specification, Named):
        devices = Chooser(inventory, seen, option, specification.number).choose(specification.names)
        meant = () if not specification.number else (about_number(specification.number, option),)
        return Selection(devices, seen.notices + meant, by_uuid)
    if seen.devices:
        skipped = tuple(f"GPU {gpu.index} is left out: it {gpu.reason}" for gpu in seen.unusable)
        return Selection(seen.devices, seen.notices + skipped, by_uuid)
    slots = cpu_slots(cpu_count or usable_cpus())
    slots_text = "1 CPU slot" if len(slots) == 1 else f"{len(slots)} CPU slots"
    why = why_nothing_is_visible(inventory, seen)
    return Selection(slots, (f"{why}; using {slots_text} instead ({option}=cpu:N for another number)",))


def _simulated_notice(count: int) -> str:
    these = "1 device is" if count == 1 else f"{count} devices are"
    return f"{these} simulated: no real GPU is reserved, so jobs must not use the GPUs that {VISIBLE} names"
