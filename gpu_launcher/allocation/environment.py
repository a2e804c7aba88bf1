"""The environment variables that point a job at its devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpu_launcher.devices import cpus_near, environment
from gpu_launcher.model import MILLIONTHS, Device, Share

FRACTION = "GPU_LAUNCHER_MEMORY_FRACTION"
"""Name of the variable with the fraction of its devices' memory that a job may use, between 0 and 1."""
_TORCH = "PYTORCH_CUDA_ALLOC_CONF"
_TORCH_NEWER = "PYTORCH_ALLOC_CONF"
_TORCH_FRACTION = "per_process_memory_fraction"
_JAX = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_JAX_NEWER = "XLA_CLIENT_MEM_FRACTION"


@dataclass(frozen=True, slots=True)
class DeviceEnvironment:
    """Settings for the environment of jobs: how it names and limits their devices."""

    by_uuid: bool = False
    """Whether devices are named by UUID instead of index."""
    enforce_memory: bool = False
    """Whether PyTorch and JAX are limited to the job's fraction of the memory."""
    pin_cpus: bool = False
    """Whether jobs are pinned to the CPUs near their devices."""

    def variables(
        self, devices: Sequence[Device], shares: Mapping[str, Share], inherited: Mapping[str, str]
    ) -> dict[str, str]:
        """The variables for a job that holds `shares`, by UUID, of `devices`."""
        variables = environment(devices, by_uuid=self.by_uuid)
        if not devices:
            return variables
        fraction = f"{memory_fraction(devices, shares):g}"
        variables[FRACTION] = fraction
        if self.enforce_memory and fraction != "1":
            variables |= _for_torch(fraction, inherited) | _for_jax(fraction, inherited)
        return variables

    def cpus(self, devices: Sequence[Device], allowed: frozenset[int]) -> frozenset[int] | None:
        """The CPUs among `allowed` to which to pin the job; None not to pin it."""
        return cpus_near(devices, allowed) if self.pin_cpus else None


def _for_torch(fraction: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The options for PyTorch, added to the user's own.

    If the user sets the newer name, both names are set, because each version of PyTorch reads one of them.
    """
    newer = inherited.get(_TORCH_NEWER)
    names = (_TORCH,) if newer is None else (_TORCH, _TORCH_NEWER)
    return {name: _with_fraction(inherited.get(name, newer or ""), fraction) for name in names}


def _with_fraction(options: str, fraction: str) -> str:
    others = [option for option in options.split(",") if option and not option.startswith(f"{_TORCH_FRACTION}:")]
    return ",".join([*others, f"{_TORCH_FRACTION}:{fraction}"])


def _for_jax(fraction: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The option for JAX, under the name that the user sets. JAX rejects both (`generate_pjrt_gpu_plugin_options`)."""
    return {_JAX_NEWER if inherited.get(_JAX_NEWER) else _JAX: fraction}


def memory_fraction(devices: Sequence[Device], shares: Mapping[str, Share]) -> float:
    """The fraction of the memory that a job may use on each of its devices, rounded down to ten thousandths.

    It is at least one ten thousandth, because some programs read 0 as no limit.
    """
    return min(max(1, math.floor(_fraction(device, shares[device.uuid]) * 10_000)) / 10_000 for device in devices)


def _fraction(device: Device, share: Share) -> float:
    if share.memory and device.memory and not share.whole:
        return min(1.0, share.memory / device.memory)
    return share.millionths / MILLIONTHS
