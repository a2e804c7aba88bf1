"""Reads the machine's NVIDIA GPUs through NVML. This is the only file that imports pynvml, and only when needed."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_launcher.devices.affinity import neighbourhood
from gpu_launcher.devices.choice import LinkKind, Links
from gpu_launcher.devices.condition import Condition, GpuProcess
from gpu_launcher.devices.origin import origin_of
from gpu_launcher.devices.probe import Inventory, UnusableGpu
from gpu_launcher.errors import DeviceError
from gpu_launcher.model import Device, DeviceKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Codes from nvml.h (nvmlReturn_t, nvmlComputeMode_t, ...). Older versions of pynvml lack some of the names.
UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIB_RM_VERSION_MISMATCH = 18
GPU_NOT_FOUND = 28
COMPUTEMODE_PROHIBITED = 2
COMPUTEMODE_EXCLUSIVE_PROCESS = 3
P2P_CAPS_INDEX_NVLINK = 2
P2P_STATUS_OK = 0
MEMORY_ERROR_UNCORRECTED = 1
VOLATILE_ECC = 0
MEMORY_INFO_V2 = 0x02000028

TOPOLOGY = {
    0: LinkKind.BOARD,
    10: LinkKind.SWITCH,
    20: LinkKind.SEVERAL_SWITCHES,
    30: LinkKind.HOST_BRIDGE,
    40: LinkKind.NODE,
    50: LinkKind.SYSTEM,
}

NO_GPU = {
    LIBRARY_NOT_FOUND: "no NVIDIA driver found (its library libnvidia-ml.so.1 is not installed here)",
    DRIVER_NOT_LOADED: "no NVIDIA driver found (its library is here, but the kernel module is not loaded)",
    NOT_FOUND: "the NVIDIA driver reports no GPU",
    GPU_NOT_FOUND: "the NVIDIA driver reports no GPU",
}

REMEDY = {
    NO_PERMISSION: "this process may not open /dev/nvidia*: check their permissions, and in a container that "
    "it was started with its GPUs (docker run --gpus all)",
    LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was updated while the old one is still loaded: reboot; in a "
    "container, restart the container",
    GPU_IS_LOST: "a GPU has fallen off the bus: `dmesg | grep Xid` says more; reset it or reboot",
    RESET_REQUIRED: "a GPU needs a reset: nvidia-smi --gpu-reset, or reboot",
}
GONE = "is gone: `dmesg | grep Xid` says more, or `nvidia-smi -L` if MIG instances were recreated"
ELSE = "check whether `nvidia-smi` works; after a driver update or a fault of a GPU, reboot"


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions of a driver's parts; None if the driver does not tell them."""

    driver: str | None
    """The driver itself, such as `570.86.15`."""
    nvml: str | None
    """Its NVML library, such as `12.570.86.15`."""
    cuda: str | None
    """The latest CUDA that it supports, such as `12.8`."""


@dataclass(frozen=True, slots=True)
class NvmlProbe:
    """Asks NVML (https://docs.nvidia.com/deploy/nvml-api/) about GPUs.

    Each call initialises NVML, asks, and shuts it down, because NVML's state does not survive fork. This takes tens of
    milliseconds; without persistence mode, up to 3 s for each idle GPU. Use `ConditionMonitor` to ask repeatedly.
    Not promised: a bound on the time of a call, because NVML hangs if the driver hangs.
    """

    root: Path = Path("/")
    """The directory that contains /proc and /sys."""

    def inventory(self) -> Inventory:
        """List all GPUs in the order of their PCI bus ids; CUDA_VISIBLE_DEVICES has no effect.

        A GPU in MIG mode is replaced by its instances. If there is no library, driver or GPU, the answer is empty and
        says why. A GPU is unusable if it is lost, in compute mode PROHIBITED, in MIG mode without instances, or not
        accessible to this process; the others are still listed.

        Raises DeviceError if NVML as a whole fails, for example after a driver update without a reboot.
        """
        try:
            with open_nvml(self.root) as nvml:
                answers = nvml.look()
        except NoGpuError as none:
            return Inventory(nothing_because=none.reason)
        return Inventory(
            devices=tuple(answer for answer in answers if isinstance(answer, Device)),
            unusable=tuple(answer for answer in answers if isinstance(answer, UnusableGpu)),
            nothing_because=None if answers else NO_GPU[GPU_NOT_FOUND],
        )

    def conditions(self, devices: Sequence[Device]) -> tuple[Condition, ...]:
        """The condition of each of `devices`, in their order. Values that a device does not tell are None.

        Raises DeviceError if NVML as a whole fails.
        """
        with _or_device_error(), open_nvml(self.root) as nvml:
            return nvml.conditions(devices)

    def links(self, devices: Sequence[Device]) -> Links:
        """The connections between `devices`. Raises DeviceError if NVML as a whole fails."""
        gpus = [device for device in devices if device.kind is DeviceKind.GPU]
        if len(gpus) < 2:
            return Links()
        with _or_device_error(), open_nvml(self.root) as nvml:
            return nvml.links(gpus)

    def versions(self) -> Versions | None:
        """The driver's versions; None if there is no driver. Raises DeviceError if NVML as a whole fails."""
        try:
            with open_nvml(self.root) as nvml:
                return nvml.versions()
        except NoGpuError:
            return None


class NoGpuError(Exception):
    """There is no GPU to ask about. For `inventory` this is not an error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def _or_device_error() -> Iterator[None]:
    try:
        yield
    except NoGpuError as none:
        raise DeviceError(f"the machine's GPUs cannot be read any more: {none.reason}") from none


@contextmanager
def open_nvml(root: Path = Path("/")) -> Iterator[OpenNvml]:
    """Keep NVML initialised in the block. The block must not fork.

    Raises NoGpuError, or DeviceError if NVML as a whole fails now or within the block.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NoGpuError(f"GPUs cannot be seen: the package nvidia-ml-py cannot be imported ({error})") from error
    try:
        pynvml.nvmlInit()
        try:
            yield OpenNvml(pynvml, root)
        finally:
            # A failing shutdown must not hide the answer or the error of the block.
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        code = _code(error)
        if code in NO_GPU:
            raise NoGpuError(NO_GPU[code]) from error
        raise DeviceError(
            f"the machine's GPUs cannot be read: NVML says {_text(error)!r}: {REMEDY.get(code, ELSE)}"
        ) from error


@dataclass(frozen=True, slots=True)
class OpenNvml:
    """The questions that NVML answers while it is initialised. They raise NVMLError if NVML as a whole fails."""

    pynvml: Any
    root: Path

    # Inventory

    def versions(self) -> Versions:
        nvml = self.pynvml
        cuda = self._if_told(lambda: int(nvml.nvmlSystemGetCudaDriverVersion_v2()))
        return Versions(
            driver=self._if_told(lambda: _decoded(nvml.nvmlSystemGetDriverVersion())),
            nvml=self._if_told(lambda: _decoded(nvml.nvmlSystemGetNVMLVersion())),
            cuda=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        )

    def look(self) -> list[Device | UnusableGpu]:
        found: list[Device | UnusableGpu] = []
        for index in range(self.pynvml.nvmlDeviceGetCount()):
            found += self._look_at(index)
        return found

    def _look_at(self, index: int) -> list[Device] | list[UnusableGpu]:
        nvml = self.pynvml
        uuid = None
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _decoded(nvml.nvmlDeviceGetUUID(handle))
            name = _decoded(nvml.nvmlDeviceGetName(handle))
            memory = self._memory(handle)
            compute_mode = self._optional(lambda: int(nvml.nvmlDeviceGetComputeMode(handle)))
            mig = self._optional(lambda: int(nvml.nvmlDeviceGetMigMode(handle)[0]))
            bus_id = self._optional(lambda: _decoded(nvml.nvmlDeviceGetPciInfo(handle).busId))
            numa_node, cpus = neighbourhood(bus_id, self.root) if bus_id else (None, ())
            gpu = Device(
                uuid,
                index,
                name,
                DeviceKind.GPU,
                memory,
                exclusive=compute_mode == COMPUTEMODE_EXCLUSIVE_PROCESS,
                numa_node=numa_node,
                cpus=cpus,
            )
            if mig and (instances := self._instances_of(handle, gpu)):
                return instances
        except nvml.NVMLError as error:
            return [UnusableGpu(index, uuid, _no_answer(error), broken=True)]
        if mig:
            reason = (
                f"is in MIG mode and has no MIG instances: `nvidia-smi mig -i {index} -cgi ... -C` makes some, "
                f"`nvidia-smi -i {index} -mig 0` makes it a whole GPU (both as root)"
            )
            return [UnusableGpu(index, uuid, reason)]
        if compute_mode == COMPUTEMODE_PROHIBITED:
            reason = f"is set to compute mode PROHIBITED: `nvidia-smi -i {index} -c DEFAULT` (as root) allows jobs"
            return [UnusableGpu(index, uuid, reason)]
        return [gpu]

    def _instances_of(self, handle: Any, gpu: Device) -> list[Device]:
        nvml = self.pynvml
        instances = []
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except nvml.NVMLError as error:
                if _code(error) in (NOT_FOUND, INVALID_ARGUMENT):
                    continue
                raise
            instances.append(
                replace(
                    gpu,
                    uuid=_decoded(nvml.nvmlDeviceGetUUID(part)),
                    name=_decoded(nvml.nvmlDeviceGetName(part)),
                    kind=DeviceKind.MIG,
                    memory=self._memory(part),
                    exclusive=False,
                    parent=gpu.uuid,
                    instance=number,
                )
            )
        return instances

    def _memory(self, handle: Any) -> int | None:
        total: int | None = self._optional(lambda: int(self.pynvml.nvmlDeviceGetMemoryInfo(handle).total))
        return total

    # Conditions

    def conditions(self, devices: Sequence[Device]) -> tuple[Condition, ...]:
        return tuple(
            self._condition_of(device) if device.kind in (DeviceKind.GPU, DeviceKind.MIG) else Condition(device.uuid)
            for device in devices
        )

    def _condition_of(self, device: Device) -> Condition:
        nvml = self.pynvml
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(device.uuid.encode())
            utilisation = self._unless_lost(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            memory_used = self._unless_lost(lambda: self._memory_used(handle))
            processes = self._unless_lost(lambda: self._processes(handle))
            fault = self._unless_lost(lambda: self._memory_fault(handle, device.index))
        except nvml.NVMLError as error:
            if _code(error) == UNINITIALIZED:
                raise
            if _code(error) == NOT_FOUND:
                return Condition(device.uuid, fault=GONE)
            return Condition(device.uuid, fault=_no_answer(error))
        return Condition(device.uuid, utilisation, memory_used, processes, fault)

    def _memory_used(self, handle: Any) -> int:
        try:
            return int(self.pynvml.nvmlDeviceGetMemoryInfo(handle, version=MEMORY_INFO_V2).used)
        except self.pynvml.NVMLError as error:
            if _code(error) != FUNCTION_NOT_FOUND:
                raise
        return int(self.pynvml.nvmlDeviceGetMemoryInfo(handle).used)

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...]:
        nvml = self.pynvml
        compute = self._newest(
            handle, nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetComputeRunningProcesses_v2
        )
        if not compute:
            return ()
        drawing: set[int] = set()
        with suppress(nvml.NVMLError):
            drawing.update(
                process.pid
                for process in self._newest(
                    handle,
                    nvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
                    nvml.nvmlDeviceGetGraphicsRunningProcesses_v2,
                )
            )
        # A process is listed once for each MIG instance or context, so possibly several times.
        memory: dict[int, int | None] = {}
        for process in compute:
            before = memory.get(process.pid)
            used = process.usedGpuMemory
            memory[process.pid] = before if used is None else (before or 0) + int(used)
        processes = []
        for pid in sorted(memory):
            process = GpuProcess(pid, memory[pid], draws=pid in drawing)
            if origin := origin_of(pid, self.root):
                process = replace(process, user=origin.user, command=origin.command, ancestors=origin.ancestors)
            processes.append(process)
        return tuple(processes)

    def _newest(self, handle: Any, newer: Callable[[Any], Any], older: Callable[[Any], Any]) -> Any:
        """The answer of `newer`, or of `older` if the driver does not have it."""
        try:
            return newer(handle)
        except self.pynvml.NVMLError as error:
            if _code(error) != FUNCTION_NOT_FOUND:
                raise
        return older(handle)

    def _memory_fault(self, handle: Any, index: int) -> str | None:
        """The fault of a GPU's memory, if any, by the rules of NVIDIA's DCGM.

        With either fault, jobs get wrong results or die.
        """
        nvml = self.pynvml
        remapped = self._optional(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
        if remapped is not None and remapped[3]:
            return "has memory that fails and cannot be replaced by spare rows: it has to be repaired"
        errors = self._optional(
            lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, MEMORY_ERROR_UNCORRECTED, VOLATILE_ECC))
        )
        if errors:
            count = "an uncorrectable memory error" if errors == 1 else f"{errors} uncorrectable memory errors"
            remedy = f"`nvidia-smi --gpu-reset -i {index}` (as root, while no program uses it), or reboot"
            return f"has had {count}: {remedy}"
        return None

    # Connections

    def links(self, gpus: Sequence[Device]) -> Links:
        handles = {}
        for gpu in gpus:
            with suppress(self.pynvml.NVMLError):  # the GPU was lost since, so it has no connections
                handles[gpu.uuid] = self.pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid.encode())
        nodes = {gpu.uuid: gpu.numa_node for gpu in gpus}
        pairs = {}
        for one, other in combinations(handles, 2):
            connection = self._connection(handles[one], handles[other])
            if connection is LinkKind.UNKNOWN and nodes[one] is not None and nodes[other] is not None:
                connection = LinkKind.NODE if nodes[one] == nodes[other] else LinkKind.SYSTEM
            pairs[frozenset((one, other))] = connection
        return Links(pairs)

    def _connection(self, one: Any, other: Any) -> LinkKind:
        nvml = self.pynvml
        with suppress(nvml.NVMLError):
            if nvml.nvmlDeviceGetP2PStatus(one, other, P2P_CAPS_INDEX_NVLINK) == P2P_STATUS_OK:
                return LinkKind.NVLINK
        with suppress(nvml.NVMLError):
            return TOPOLOGY.get(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other), LinkKind.UNKNOWN)
        return LinkKind.UNKNOWN

    # Questions that NVML may refuse

    def _optional(self, ask: Callable[[], Any]) -> Any:
        """Return the answer, or None if this GPU or driver does not support the question."""
        return self._or_none(ask, lambda code: code in (NOT_SUPPORTED, FUNCTION_NOT_FOUND))

    def _if_told(self, ask: Callable[[], Any]) -> Any:
        """Return the answer, or None if NVML gives none for any reason. Only for values that are merely displayed."""
        return self._or_none(ask, lambda code: True)

    def _unless_lost(self, ask: Callable[[], Any]) -> Any:
        """Return the answer, or None if NVML gives none. Errors that mean that the GPU is lost are raised."""
        return self._or_none(ask, lambda code: code not in (UNINITIALIZED, GPU_IS_LOST, RESET_REQUIRED))

    def _or_none(self, ask: Callable[[], Any], ignored: Callable[[int], bool]) -> Any:
        try:
            return ask()
        except self.pynvml.NVMLError as error:
            if ignored(_code(error)):
                return None
            raise


def _no_answer(error: Exception) -> str:
    return f"does not answer (NVML says {_text(error)!r}): {REMEDY.get(_code(error), ELSE)}"


def _code(error: Any) -> int:
    return int(getattr(error, "value", 0))


def _text(error: Exception) -> str:
    return str(error).rstrip(". ")


def _decoded(text: str | bytes) -> str:
    """Text from pynvml, which returned bytes before version 12."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text
