"""Checks the driver, the GPUs and the mask that hides some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.allocation.readings import nvml_kept_open
from gpu_launcher.cli.checks.finding import Finding, halves, ok, problem, warning
from gpu_launcher.devices import NvmlProbe, usable_cpus
from gpu_launcher.devices.visibility import ORDER, VISIBLE, visible, why_nothing_is_visible
from gpu_launcher.errors import DeviceError
from gpu_launcher.sizes import show_memory
from gpu_launcher.wording import device_names, join_labels

if TYPE_CHECKING:
    from gpu_launcher.devices import Inventory
    from gpu_launcher.model import Device

_NVIDIA = "0x10de"
_DISPLAY = "0x03"
"""Prefix of the PCI class of display controllers. GPUs without display outputs have it, too."""
_FIRST_NAMESPACE = "pid:[4026531836]"
"""The machine's initial PID namespace: PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h."""


def examine_gpus(environ: Mapping[str, str], root: Path = Path("/")) -> Iterator[Finding]:
    """Check driver, GPUs and mask. `root` contains /proc and /sys."""
    probe = NvmlProbe()
    try:
        with nvml_kept_open():
            versions = probe.versions()
            inventory = probe.inventory()
            conditions = probe.conditions(inventory.devices) if inventory.devices else ()
    except DeviceError as error:
        failure, _, reboot = str(error).rpartition(": ")
        yield problem("driver", failure, reboot)
        return
    if versions is None:
        yield _no_driver(inventory, root)
    else:
        told = {"NVIDIA driver": versions.driver, "NVML": versions.nvml, "CUDA up to": versions.cuda}
        yield ok("driver", ", ".join(f"{name} {version or 'of unknown version'}" for name, version in told.items()))
        if inventory.nothing_because:
            yield warning("gpus", inventory.nothing_because, "in a container, start it with its GPUs (--gpus all)")
    yield from _present(inventory)
    faults = {condition.uuid: condition.fault for condition in conditions if condition.fault}
    for device in inventory.devices:
        if device.uuid in faults:
            text, remedy = halves(faults[device.uuid])
            yield problem("gpus", f"{device.label} is set aside: it {text}", remedy)
    yield _mask(inventory, environ)
    if inventory.devices:
        yield _attribution(root)


def _no_driver(inventory: Inventory, root: Path) -> Finding:
    slots = usable_cpus(root)
    text = f"{inventory.nothing_because}: sweeps run on {slots} CPU slot{'s' if slots > 1 else ''}"
    gpus = _on_the_bus(root)
    if gpus and not in_container(root):
        there = "an NVIDIA GPU is" if gpus == 1 else f"{gpus} NVIDIA GPUs are"
        return problem("driver", f"{there} in this machine, and {text}", "install NVIDIA's driver, and reboot")
    return warning(
        "driver",
        text,
        "none if this machine has no GPU; else install NVIDIA's driver, or start the container with "
        "its GPUs (--gpus all)",
    )


def _on_the_bus(root: Path) -> int:
    return sum(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )


def kinds(devices: Iterable[Device]) -> Iterator[str]:
    """Yield a line for each kind of device: `GPU 0-3: NVIDIA H100 80GB HBM3, 80 GiB`."""
    labels: dict[str, list[str]] = {}
    for device in devices:
        labels.setdefault(_kind(device), []).append(device.label)
    for kind, those in labels.items():
        yield f"{join_labels(those)}: {kind}"


def _present(inventory: Inventory) -> Iterator[Finding]:
    for text in kinds(inventory.devices):
        yield ok("gpus", text)
    for device in inventory.devices:
        if device.exclusive:
            yield warning(
                "gpus",
                f"{device.label} is set to compute mode EXCLUSIVE_PROCESS: it takes whole jobs only, of one process",
                f"`nvidia-smi -i {device.index} -c DEFAULT` (as root) allows jobs to share it",
            )
    for gpu in inventory.unusable:
        text, remedy = halves(gpu.reason)
        yield (problem if gpu.broken else warning)("gpus", f"GPU {gpu.index} is set aside: it {text}", remedy)


def _kind(device: Device) -> str:
    memory = "memory not reported, so shared by count" if device.memory is None else show_memory(device.memory)
    return f"{device.name}, {memory}"


def _mask(inventory: Inventory, environ: Mapping[str, str]) -> Finding:
    mask = environ.get(VISIBLE)
    if mask is None:
        return ok("mask", f"{VISIBLE} is not set: all devices are used")
    if inventory.nothing_because:
        return ok("mask", f"{VISIBLE}={mask!r} has no effect without a GPU")
    seen = visible(inventory, environ)
    remedy = f"change or unset {VISIBLE}"
    misread = [notice for notice in seen.notices if ORDER in notice]
    mistakes = [notice for notice in seen.notices if ORDER not in notice]
    left = f"leaves {device_names(seen.devices)} of {len(inventory.devices)} devices"
    if mistakes:
        return problem("mask", f"{mistakes[0]}; it {left if seen.devices else 'leaves no device'}", remedy)
    if not seen.devices:
        text = why_nothing_is_visible(inventory, seen)
        return warning("mask", text.removesuffix(": change or unset it to use them"), remedy)
    if misread:
        text, _, advice = misread[0].rpartition(": ")
        return warning("mask", text, advice)
    return ok("mask", f"{VISIBLE}={mask!r} {left}")


def _attribution(root: Path) -> Finding:
    check = "processes"
    if _link(root / "proc/self/ns/pid") != _FIRST_NAMESPACE:
        return warning(
            check,
            "this is a container with process ids of its own: who uses a GPU outside the pool is judged by memory",
            "none if that will do; else start the container with --pid=host",
        )
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, options = line.partition(" - ")
        if fields.split(" ")[4:5] == ["/proc"] and any(f"hidepid={mode}" in options for mode in (1, 2, "invisible")):
            return warning(
                check,
                "other users' processes are hidden (/proc is mounted with hidepid): who uses a GPU is judged by memory",
                "none if that will do; else mount /proc without hidepid",
            )
    return ok(check, "processes outside the pool can be told from those of the pool")


def in_container(root: Path = Path("/")) -> bool:
    """Whether this seems to be a container. Docker and Podman create marker files; others only use a PID namespace."""
    marks = (root / ".dockerenv", root / "run/.containerenv")
    return any(mark.exists() for mark in marks) or _link(root / "proc/self/ns/pid") != _FIRST_NAMESPACE


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
