"""Reads and writes CUDA_VISIBLE_DEVICES by CUDA's rules. Pure: the environment is an argument.

Sources: CUDA programming guide, "CUDA environment variables"
(https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html) for indices,
UUIDs, their prefixes, the empty string and the entry that ends the list. Cases that the guide leaves open (duplicates,
text after a number, indices mixed with UUIDs) follow `_parse_visible_devices` in torch/cuda/__init__.py, PyTorch's
description of the driver's behaviour. For MIG instances: NVIDIA's MIG user guide, "Device Names" and "CUDA Device
Enumeration" (https://docs.nvidia.com/datacenter/tesla/mig-user-guide/).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from gpu_launcher.model import Device, DeviceKind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from gpu_launcher.devices.probe import Inventory, UnusableGpu

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
PCI_ORDER = "PCI_BUS_ID"

Name = TypeVar("Name")

_NUMBER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Mask:
    """The devices that a mask makes visible on a machine."""

    indices: tuple[int, ...]
    """NVML indices of the visible GPUs, in the order of the mask."""
    instances: tuple[str, ...] = ()
    """UUIDs of the visible MIG instances; empty if the mask names GPUs."""
    problem: str | None = None
    """The probable mistake in the mask; None for a list that is valid or was ended on purpose (`-1`)."""


@dataclass(frozen=True, slots=True)
class Visible:
    """The part of an inventory that an inherited mask leaves visible."""

    devices: tuple[Device, ...]
    """The visible devices in the order of the mask; without a mask, in the order of their indices."""
    unusable: tuple[UnusableGpu, ...]
    mask: str | None = None
    """The value of CUDA_VISIBLE_DEVICES; None if it is not set."""
    notices: tuple[str, ...] = ()


def environment(devices: Sequence[Device], *, by_uuid: bool = False) -> dict[str, str]:
    """The environment variables with which a job sees exactly `devices`, in this order.

    The mask is absolute: it names the machine's indices (or UUIDs) and does not depend on the mask of the head. It must
    be set before the job initialises CUDA. NVML counts GPUs by PCI bus id, hence CUDA_DEVICE_ORDER=PCI_BUS_ID. Without
    devices, and for CPU slots, the mask is empty and the job sees no GPU.

    `by_uuid` names GPUs by UUID instead, which is correct even if NVML and CUDA count differently (see
    `Selection.by_uuid`). Simulated devices can only be named by index, and MIG instances only by UUID. A MIG instance
    must be the only device, because CUDA shows a process only the first of several.
    """
    by_uuid = by_uuid or any(device.kind is DeviceKind.MIG for device in devices)
    names = [
        device.uuid if by_uuid and device.kind in (DeviceKind.GPU, DeviceKind.MIG) else str(device.index)
        for device in devices
        if device.kind is not DeviceKind.CPU
    ]
    return {VISIBLE: ",".join(names), ORDER: PCI_ORDER}


def visible(inventory: Inventory, environ: Mapping[str, str]) -> Visible:
    """The machine's GPUs that CUDA_VISIBLE_DEVICES in `environ` leaves visible; all if it is not set.

    Indices are read as NVML's. CUDA uses this order only with CUDA_DEVICE_ORDER=PCI_BUS_ID. By default it counts the
    fastest GPU first, and that order is unknown without initialising CUDA. If all GPUs are of one kind, this makes no
    difference; otherwise a notice says how the indices were read. A GPU in MIG mode stands for all of its instances,
    although a process can use only the first.
    """
    mask = environ.get(VISIBLE)
    if mask is None:
        return Visible(inventory.devices, inventory.unusable)
    uuids = {device.index: device.parent or device.uuid for device in inventory.devices}
    # Unusable GPUs are included, because their indices are valid and must not end the list.
    every = {**uuids, **{gpu.index: gpu.uuid for gpu in inventory.unusable}}
    instances = {device.uuid: device for device in inventory.devices if device.kind is DeviceKind.MIG}
    meaning = read_mask(mask, every, instances)
    left = tuple(device for index in meaning.indices for device in inventory.devices if device.index == index)
    left += tuple(instances[uuid] for uuid in meaning.instances)
    notices = [f"{VISIBLE}={mask!r}: {meaning.problem}"] if meaning.problem else []
    names = {device.name.partition(" MIG ")[0] for device in inventory.devices}
    by_index = bool(meaning.indices) and not mask.strip().startswith("GPU-")
    if by_index and 0 < len(left) < len(inventory.devices) and len(names) > 1 and environ.get(ORDER) != PCI_ORDER:
        notices.append(
            f"{VISIBLE}={mask!r} was read in PCI bus order, as {' and '.join(map(_described, left))}; CUDA "
            f"itself counts the fastest GPU first unless {ORDER}={PCI_ORDER}: set that, or name GPUs by UUID"
        )
    return Visible(
        devices=left,
        unusable=tuple(gpu for index in meaning.indices for gpu in inventory.unusable if gpu.index == index),
        mask=mask,
        notices=tuple(notices),
    )


def why_nothing_is_visible(inventory: Inventory, seen: Visible) -> str:
    """Explain in one clause why `seen` has no device (no driver, a mask, or broken GPUs), and name the remedy."""
    if inventory.nothing_because:
        return inventory.nothing_because
    if seen.unusable:
        return "no GPU can be used: " + ", ".join(f"GPU {gpu.index} {gpu.reason}" for gpu in seen.unusable)
    if seen.notices:
        return f"{', '.join(seen.notices)}: change or unset it to use GPUs"
    gpus = {device.index for device in inventory.devices} | {gpu.index for gpu in inventory.unusable}
    all_of_them = "the machine's only GPU" if len(gpus) == 1 else f"all {len(gpus)} GPUs of the machine"
    return f"{VISIBLE}={seen.mask!r} hides {all_of_them}: change or unset it to use them"


def read_mask(mask: str, uuids: Mapping[int, str | None], instances: Collection[str] = ()) -> Mask:
    """Read `mask`, a value of CUDA_VISIBLE_DEVICES, on a machine whose GPUs and MIG instances have these UUIDs.

    The first entry decides whether the list is of indices, of GPUs' UUIDs or of MIG instances' UUIDs. A unique prefix
    of a UUID that includes `GPU-` or `MIG-` is enough. The first entry that names no device ends the list: a negative
    number, an unknown index, an ambiguous prefix, `NoDevFiles` or an empty entry. If a device is named twice before
    that, the mask hides all GPUs.
    """
    entries = [entry.strip() for entry in mask.split(",")]
    find = _finder(entries[0], uuids, instances)
    found: list[int | str] = []
    problem = None
    for position, entry in enumerate(entries):
        name = find(entry)
        if name is None:
            on_purpose = entry.startswith("-") or entry == "NoDevFiles" or entries[position:] == [""]
            problem = None if on_purpose else _ended_by(entry, position, len(entries))
            break
        if name in found:
            named = f"GPU {name}" if isinstance(name, int) else name
            return Mask((), problem=f"{named} is named twice, for which CUDA hides all GPUs")
        found.append(name)
    return Mask(
        tuple(name for name in found if isinstance(name, int)),
        tuple(name for name in found if isinstance(name, str)),
        problem,
    )


def _finder(
    first: str, uuids: Mapping[int, str | None], instances: Collection[str]
) -> Callable[[str], int | str | None]:
    """The function that finds the device of an entry, in a list that begins with `first`."""
    if first.startswith("GPU-"):
        return lambda entry: _by_prefix(entry, "GPU-", uuids.items())
    if first.startswith("MIG-"):
        return lambda entry: _by_prefix(entry, "MIG-", [(uuid, uuid) for uuid in instances])
    return lambda entry: _by_number(entry, uuids)


def _by_number(entry: str, uuids: Mapping[int, str | None]) -> int | None:
    # The driver reads entries like C's strtoul: `1st` is 1.
    number = _NUMBER.match(entry)
    if number is None or len(number[0]) > 9:
        return None
    index = int(number[0])
    return index if index in uuids else None


def _by_prefix(entry: str, start: str, named: Iterable[tuple[Name, str | None]]) -> Name | None:
    if not entry.startswith(start):
        return None
    matches = [name for name, uuid in named if uuid is not None and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _ended_by(entry: str, position: int, count: int) -> str:
    rest = " and all that follow it" if position + 1 < count else ""
    what = "MIG instance" if entry.startswith("MIG-") else "GPU"
    return f"{entry!r} names no single {what} of this machine: CUDA leaves it{rest} out"


def _described(device: Device) -> str:
    return f"{device.label} ({device.name})"
