"""The machine's NVIDIA GPUs, through NVML. The only file that imports pynvml, and only when asked."""

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

# Codes from nvml.h (nvmlReturn_t, nvmlComputeMode_t, ...): older pynvml lack names of some.
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
    "container, start the container anew",
    GPU_IS_LOST: "a GPU has fallen off the bus: `dmesg | grep Xid` says more; reset it or reboot",
    RESET_REQUIRED: "a GPU needs a reset: nvidia-smi --gpu-reset, or reboot",
}
GONE = "is gone: `dmesg | grep Xid` says more, or `nvidia-smi -L` where MIG instances were made anew"
ELSE = "see whether `nvidia-smi` works; after a driver update or a fault of a GPU, reboot"


@dataclass(frozen=True, slots=True)
class Versions:
    """What a driver is; None where it does not say."""

    driver: str | None
    """Such as `570.86.15`."""
    nvml: str | None
    """Such as `12.570.86.15`."""
    cuda: str | None
    """The latest CUDA that it supports, such as `12.8`."""


@dataclass(frozen=True, slots=True)
class NvmlProbe:
    """Asks NVML (https://docs.nvidia.com/deploy/nvml-api/) about GPUs.

    Each call initialises NVML, asks, and shuts it down: NVML's state does not survive fork. That takes tens of
    milliseconds, and without persistence mode up to 3 s for each GPU that nobody uses: for looking again and
    again there is `ConditionMonitor`. Not promised: a bound on the time it takes, since a driver that hangs makes NVML
    hang.
    """

    root: Path = Path("/")
    """Where /proc and /sys are looked for."""

    def inventory(self) -> Inventory:
        """GPUs in the order of their PCI bus ids, whatever CUDA_VISIBLE_DEVICES says.

        In place of a GPU in MIG mode, its instances. No library, no driver and no GPU are an ordinary empty
        answer with a reason. A GPU that is lost, in compute mode PROHIBITED, in MIG mode without an instance, or not
        ours is unusable; the others are still listed.
        Raises DeviceError where NVML as a whole fails, such as after a driver update without a reboot.
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
        """How each of `devices` is doing, in their order. What a device does not tell is None.

        Raises DeviceError where NVML as a whole fails.
        """
        with _or_device_error(), open_nvml(self.root) as nvml:
            return nvml.conditions(devices)

    def links(self, devices: Sequence[Device]) -> Links:
        """How `devices` are connected with each other. Raises DeviceError where NVML as a whole fails."""
        gpus = [device for device in devices if device.kind is DeviceKind.GPU]
        if len(gpus) < 2:
            return Links()
        with _or_device_error(), open_nvml(self.root) as nvml:
            return nvml.links(gpus)

    def versions(self) -> Versions | None:
        """What the driver is; None where there is none. Raises DeviceError where NVML as a whole fails."""
        try:
            with open_nvml(self.root) as nvml:
                return nvml.versions()
        except NoGpuError:
            return None


class NoGpuError(Exception):
    """There is no GPU to ask about, which for `inventory` is no error."""

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
    """NVML, initialised, until the block ends. Do not fork in it.

    Raises NoGpuError or, where NVML as a whole fails then or within the block, DeviceError.
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
            # What was asked counts. A failing shutdown must not hide the answer, or the error that led here.
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
    """What can be asked while NVML is initialised. Raises NVMLError where NVML as a whole fails."""

    pynvml: Any
    root: Path

    # What is there

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

    # How it is doing

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
        # One entry for each MIG instance or context: a process may be there several times.
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

    def _newest(self, handle: Any, *versions: Callable[[Any], Any]) -> Any:
        """The answer of the first of these that the driver has."""
        for ask in versions[:-1]:
            try:
                return ask(handle)
            except self.pynvml.NVMLError as error:
                if _code(error) != FUNCTION_NOT_FOUND:
                    raise
        return versions[-1](handle)

    def _memory_fault(self, handle: Any, index: int) -> str | None:
        """As NVIDIA's DCGM judges the health of memory: both of these mean that jobs get wrong results or die."""
        nvml = self.pynvml
        remapped = self._optional(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
        if remapped is not None and remapped[3]:
            return "has memory that fails and cannot be replaced by spare rows: it has to be repaired"
        errors = self._optional(
            lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, MEMORY_ERROR_UNCORRECTED, VOLATILE_ECC))
        )
        if errors:
            count = "an uncorrectable memory error" if errors == 1 else f"{errors} uncorrectable memory errors"
            return f"has had {count}: `nvidia-smi --gpu-reset -i {index}` (as root, while nobody uses it), or reboot"
        return None

    # How it is wired

    def links(self, gpus: Sequence[Device]) -> Links:
        handles = {}
        for gpu in gpus:
            with suppress(self.pynvml.NVMLError):  # lost since: connected to nothing
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

    # What NVML may refuse

    def _optional(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, or None where this GPU or this driver has no such thing."""
        try:
            return ask()
        except self.pynvml.NVMLError as error:
            if _code(error) in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
                return None
            raise

    def _if_told(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, or None where NVML does not tell, for whatever reason: nothing follows from it."""
        try:
            return ask()
        except self.pynvml.NVMLError:
            return None

    def _unless_lost(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, or None where NVML does not tell for a reason that does not put the GPU in doubt."""
        try:
            return ask()
        except self.pynvml.NVMLError as error:
            if _code(error) in (UNINITIALIZED, GPU_IS_LOST, RESET_REQUIRED):
                raise
            return None


def _no_answer(error: Exception) -> str:
    return f"does not answer (NVML says {_text(error)!r}): {REMEDY.get(_code(error), ELSE)}"


def _code(error: Any) -> int:
    return int(getattr(error, "value", 0))


def _text(error: Exception) -> str:
    return str(error).rstrip(". ")


def _decoded(text: str | bytes) -> str:
    """pynvml returned bytes before version 12."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text
