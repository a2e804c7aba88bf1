"""Unpickles what a job sent, without using a GPU: arrays that were on a GPU are created on the CPU.

The head reads results but does not hold a lease. If unpickling initialised CUDA, the head would occupy memory of a GPU
that others hold, and its next jobs could not be forked.

Not promised: a class of the user that uses a GPU when it is unpickled still does so.

`_ON_CPU` lists the names that the libraries' own `__reduce__` methods refer to.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


class CpuUnpickler(pickle.Unpickler):
    """Creates PyTorch tensors on the CPU, and NumPy arrays in place of CuPy's and JAX's arrays."""

    def find_class(self, module: str, name: str, /) -> Any:
        """Return the global of that name, or a replacement that creates the same object on the CPU."""
        return _ON_CPU.get(f"{module}.{name}") or super().find_class(module, name)


def loads(pickled: bytes) -> Any:
    """Unpickle what a job sent. Raises whatever the user's objects raise when they are unpickled."""
    return CpuUnpickler(io.BytesIO(pickled)).load()


def _torch_storage(pickled: bytes) -> Any:
    return import_module("torch").load(io.BytesIO(pickled), map_location="cpu", weights_only=False)


def _torch_tensor(function: str, device: int) -> Callable[..., Any]:
    """Wrap a function of torch._utils so that it creates the tensor on the CPU.

    `device` is the position of the argument that says where the tensor was.
    """

    def rebuild(*arguments: Any) -> Any:
        on_cpu = (*arguments[:device], "cpu", *arguments[device + 1 :])
        return getattr(import_module("torch._utils"), function)(*on_cpu)

    return rebuild


def _torch_generator(device: Any) -> Any:
    if device.type != "cpu":
        raise pickle.UnpicklingError(
            f"a torch.Generator on {device} exists only where that GPU may be used; return its get_state() instead"
        )
    return import_module("torch").Generator(device)


def _cupy_array(array: Any) -> Any:
    return array  # a NumPy array


def _jax_array(function: Callable[..., Any], arguments: tuple[Any, ...], state: Any, about: object) -> Any:
    array = function(*arguments)  # a NumPy array
    array.__setstate__(state)
    return array


_ON_CPU: Mapping[str, Callable[..., Any]] = {
    "torch.storage._load_from_bytes": _torch_storage,
    "torch._utils._rebuild_device_tensor_from_numpy": _torch_tensor("_rebuild_device_tensor_from_numpy", 2),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _torch_tensor("_rebuild_device_tensor_from_cpu_tensor", 2),
    "torch._utils._rebuild_wrapper_subclass": _torch_tensor("_rebuild_wrapper_subclass", 6),
    "torch._C.Generator": _torch_generator,
    "cupy._core.core.array": _cupy_array,
    "jax._src.array._reconstruct_array": _jax_array,
}
