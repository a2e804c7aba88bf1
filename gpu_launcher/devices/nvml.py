"""The machine's NVIDIA GPUs, through NVML. The only file that imports pynvml, and only when asked."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from gpu_launcher.devices.probe import Inventory, Unusable
from gpu_launcher.errors import DeviceError
from gpu_launcher.model import Device, DeviceKind

if TYPE_CHECKING:
    from collections.abc import Iterator

# Codes from nvml.h (nvmlReturn_t, nvmlComputeMode_t): older pynvml lack names of some.
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
ELSE = "see whether `nvidia-smi` works; after a driver update or a fault of a GPU, reboot"


class NvmlProbe:
    """Lists GPUs through NVML (https://docs.nvidia.com/deploy/nvml-api/).

    Each call initialises NVML, asks, and shuts it down: NVML's state does not survive fork. Not promised: a
    bound on the time it takes, since a driver that hangs makes NVML hang.
    """

    def inventory(self) -> Inventory:
        """GPUs in the order of their PCI bus ids, whatever CUDA_VISIBLE_DEVICES says.

        No library, no driver and no GPU are an ordinary empty answer with a reason. A GPU that is lost, in
        compute mode PROHIBITED, in MIG mode or not ours is unusable; the others are still listed.
        Raises DeviceError where NVML as a whole fails, such as after a driver update without a reboot.
        """
        try:
            import pynvml
        except ImportError as error:
            return Inventory(
                nothing_because=f"GPUs cannot be seen: the package nvidia-ml-py cannot be imported ({error})"
            )
        try:
            with _session(pynvml):
                answers = [_look_at(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            code = _code(error)
            if code in NO_GPU:
                return Inventory(nothing_because=NO_GPU[code])
            raise DeviceError(
                f"the machine's GPUs cannot be read: NVML says {_text(error)!r}: {REMEDY.get(code, ELSE)}"
            ) from error
        return Inventory(
            devices=tuple(answer for answer in answers if isinstance(answer, Device)),
            unusable=tuple(answer for answer in answers if isinstance(answer, Unusable)),
            nothing_because=None if answers else NO_GPU[GPU_NOT_FOUND],
        )


@contextmanager
def _session(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        # What was asked counts. A failing shutdown must not hide the answer, or the error that led here.
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _look_at(pynvml: Any, index: int) -> Device | Unusable:
    uuid = None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _decoded(pynvml.nvmlDeviceGetUUID(handle))
        name = _decoded(pynvml.nvmlDeviceGetName(handle))
        memory = _optional(pynvml, lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
        compute_mode = _optional(pynvml, lambda: int(pynvml.nvmlDeviceGetComputeMode(handle)))
        mig = _optional(pynvml, lambda: int(pynvml.nvmlDeviceGetMigMode(handle)[0]))
    except pynvml.NVMLError as error:
        reason = f"does not answer (NVML says {_text(error)!r}): {REMEDY.get(_code(error), ELSE)}"
        return Unusable(index, uuid, reason)
    if compute_mode == COMPUTEMODE_PROHIBITED:
        return Unusable(
            index,
            uuid,
            f"is set to compute mode PROHIBITED: `nvidia-smi -i {index} -c DEFAULT` (as root) allows jobs",
        )
    if mig:
        return Unusable(
            index,
            uuid,
            f"is in MIG mode, and MIG instances are not supported yet: `nvidia-smi -i {index} -mig 0` (as "
            "root) makes it a whole GPU",
        )
    return Device(uuid, index, name, DeviceKind.GPU, memory)


def _optional(pynvml: Any, ask: Any) -> int | None:
    """What `ask` returns, or None where this GPU or this driver has no such thing."""
    try:
        answer: int = ask()
    except pynvml.NVMLError as error:
        if _code(error) in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
            return None
        raise
    return answer


def _code(error: Any) -> int:
    return int(getattr(error, "value", 0))


def _text(error: Exception) -> str:
    return str(error).rstrip(". ")


def _decoded(text: str | bytes) -> str:
    """pynvml returned bytes before version 12."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text
