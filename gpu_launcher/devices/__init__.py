"""The machine's devices and their conditions. Importing this does not import a GPU library or call NVML."""

from gpu_launcher.devices.affinity import cpus_near
from gpu_launcher.devices.choice import LinkKind, Links, by_load, combinable, load_levels
from gpu_launcher.devices.condition import Condition, GpuProcess, foreign_processes, memory_of, why_busy
from gpu_launcher.devices.cpu import cpu_slots, usable_cpus
from gpu_launcher.devices.nvml import NvmlProbe
from gpu_launcher.devices.probe import DeviceProbe, FixedProbe, Inventory, UnusableGpu
from gpu_launcher.devices.selection import Selection, select_devices
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.devices.visibility import environment

__all__ = [
    "Condition",
    "DeviceProbe",
    "FixedProbe",
    "GpuProcess",
    "Inventory",
    "LinkKind",
    "Links",
    "NvmlProbe",
    "Selection",
    "UnusableGpu",
    "by_load",
    "combinable",
    "cpu_slots",
    "cpus_near",
    "environment",
    "foreign_processes",
    "load_levels",
    "memory_of",
    "select_devices",
    "simulated_devices",
    "usable_cpus",
    "why_busy",
]
