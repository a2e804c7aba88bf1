"""CUDA_VISIBLE_DEVICES, read and written by CUDA's rules. Pure: the environment comes as an argument.

Sources: CUDA programming guide, "CUDA environment variables"
(https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html) for indices,
UUIDs, their prefixes, the empty string and the entry that ends the list. What the guide leaves open
(duplicates, text after a number, indices mixed with UUIDs) follows `_parse_visible_devices` in torch/cuda/__init__.py,
PyTorch's account of what the driver does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_launcher.model import Device, DeviceKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpu_launcher.devices.probe import Inventory, Unusable

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
PCI_ORDER = "PCI_BUS_ID"

_NUMBER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Mask:
    """What a mask means on a machine."""

    indices: tuple[int, ...]
    """NVML indices of the visible GPUs, in the order of the mask."""
    problem: str | None = None
    """What in the mask is probably a mistake; None for a list that is valid or ended on purpose (`-1`)."""


@dataclass(frozen=True, slots=True)
class Visible:
    """What an inherited mask leaves of an inventory."""

    devices: tuple[Device, ...]
    """In the order of the mask; in the order of their indices without one."""
    unusable: tuple[Unusable, ...]
    mask: str | None = None
    """The value of CUDA_VISIBLE_DEVICES; None where it is not set."""
    notices: tuple[str, ...] = ()


def environment(devices: Sequence[Device], *, by_uuid: bool = False) -> dict[str, str]:
    """What a job gets in its environment so that it sees exactly `devices`, in this order.

    The mask is absolute: it names machine indices (or UUIDs), whatever mask the launching program had. It has
    to be set before anything in the job initialises CUDA. NVML counts GPUs by PCI bus id, hence
    CUDA_DEVICE_ORDER=PCI_BUS_ID. Without devices, and for CPU slots, the mask is empty: the job sees no GPU.

    `by_uuid` names GPUs by UUID instead, which is right also where NVML and CUDA may count differently (see
    `Selection.by_uuid`); simulated devices have nothing but their index.
    """
    names = [
        device.uuid if by_uuid and device.kind is DeviceKind.GPU else str(device.index)
        for device in devices
        if device.kind is not DeviceKind.CPU
    ]
    return {VISIBLE: ",".join(names), ORDER: PCI_ORDER}


def visible(inventory: Inventory, environ: Mapping[str, str]) -> Visible:
    """What CUDA_VISIBLE_DEVICES in `environ` leaves visible of the machine's GPUs; without it, everything.

    Indices are taken as NVML's. CUDA counts that way under CUDA_DEVICE_ORDER=PCI_BUS_ID only; by default it
    counts the fastest GPU first, an order that cannot be known without initialising CUDA. Where all GPUs are
    of one kind this makes no difference; where they are not, a notice says how the indices were understood.
    """
    mask = environ.get(VISIBLE)
    if mask is None:
        return Visible(inventory.devices, inventory.unusable)
    devices = {gpu.index: gpu for gpu in inventory.devices}
    unusable = {gpu.index: gpu for gpu in inventory.unusable}
    uuids: dict[int, str | None] = {gpu.index: gpu.uuid for gpu in inventory.devices}
    uuids.update((gpu.index, gpu.uuid) for gpu in inventory.unusable)
    # An unusable GPU still counts: its index is valid, so it must not end the list.
    meaning = read_mask(mask, uuids)
    left = tuple(devices[index] for index in meaning.indices if index in devices)
    notices = [f"{VISIBLE}={mask!r}: {meaning.problem}"] if meaning.problem else []
    names = {gpu.name for gpu in inventory.devices}
    by_index = not mask.strip().startswith("GPU-")
    if by_index and 0 < len(left) < len(devices) and len(names) > 1 and environ.get(ORDER) != PCI_ORDER:
        notices.append(
            f"{VISIBLE}={mask!r} was read in PCI bus order, as {' and '.join(map(_described, left))}; CUDA "
            f"itself counts the fastest GPU first unless {ORDER}={PCI_ORDER}: set that, or name GPUs by UUID"
        )
    return Visible(
        devices=left,
        unusable=tuple(unusable[index] for index in meaning.indices if index in unusable),
        mask=mask,
        notices=tuple(notices),
    )


def why_nothing_is_visible(inventory: Inventory, seen: Visible) -> str:
    """Why `seen` has no device, in one clause with the remedy: no driver, the user's own mask, or broken GPUs."""
    if inventory.nothing_because:
        return inventory.nothing_because
    if seen.unusable:
        return "no GPU can be used: " + ", ".join(f"GPU {gpu.index} {gpu.reason}" for gpu in seen.unusable)
    if seen.notices:
        return f"{', '.join(seen.notices)}: change or unset it to use GPUs"
    total = len(inventory.devices) + len(inventory.unusable)
    all_of_them = "the machine's only GPU" if total == 1 else f"all {total} GPUs of the machine"
    return f"{VISIBLE}={seen.mask!r} hides {all_of_them}: change or unset it to use them"


def read_mask(mask: str, uuids: Mapping[int, str | None]) -> Mask:
    """The indices that `mask`, a value of CUDA_VISIBLE_DEVICES, makes visible where GPUs have these UUIDs.

    The list is of indices or of UUIDs (or unique prefixes, from `GPU-` on), as its first entry is. The first
    entry that names no GPU ends it: a negative number, an unknown index, an ambiguous prefix,
    `NoDevFiles`, nothing at all. A GPU named twice before that makes the whole list void.
    MIG instances are not whole GPUs and are taken as unknown here.
    """
    entries = [entry.strip() for entry in mask.split(",")]
    by_uuid = entries[0].startswith("GPU-")
    indices: list[int] = []
    for position, entry in enumerate(entries):
        index = _by_prefix(entry, uuids) if by_uuid else _by_number(entry, uuids)
        if index is None:
            on_purpose = entry.startswith("-") or entry == "NoDevFiles" or entries[position:] == [""]
            return Mask(tuple(indices), None if on_purpose else _ended_by(entry, position, len(entries)))
        if index in indices:
            return Mask((), f"GPU {index} is named twice, for which CUDA hides all GPUs")
        indices.append(index)
    return Mask(tuple(indices))


def _by_number(entry: str, uuids: Mapping[int, str | None]) -> int | None:
    # The driver reads entries as C's strtoul does: `1st` is 1.
    number = _NUMBER.match(entry)
    if number is None or len(number[0]) > 9:
        return None
    index = int(number[0])
    return index if index in uuids else None


def _by_prefix(entry: str, uuids: Mapping[int, str | None]) -> int | None:
    if not entry.startswith("GPU-"):
        return None
    matches = [index for index, uuid in uuids.items() if uuid is not None and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _ended_by(entry: str, position: int, count: int) -> str:
    rest = " and all that follow it" if position + 1 < count else ""
    if entry.startswith("MIG-"):
        return f"MIG instances are not supported yet: {entry!r}{rest} is left out"
    return f"{entry!r} names no single GPU of this machine: CUDA leaves it{rest} out"


def _described(device: Device) -> str:
    return f"{device.label} ({device.name})"
