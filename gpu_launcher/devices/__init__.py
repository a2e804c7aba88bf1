"""What is in the machine. Importing this neither imports a GPU library nor asks NVML anything."""

from gpu_launcher.devices.cpu import cpu_slots, usable_cpus
from gpu_launcher.devices.nvml import NvmlProbe
from gpu_launcher.devices.probe import DeviceProbe, FixedProbe, Inventory, Unusable
from gpu_launcher.devices.selection import Selection, select_devices
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.devices.visibility import environment

__all__ = [
    "DeviceProbe",
    "FixedProbe",
    "Inventory",
    "NvmlProbe",
    "Selection",
    "Unusable",
    "cpu_slots",
    "environment",
    "select_devices",
    "simulated_devices",
    "usable_cpus",
]
