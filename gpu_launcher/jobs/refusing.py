"""Requests that the devices at hand could never grant."""

from __future__ import annotations

from gpu_launcher import leases
from gpu_launcher.devices import combinable
from gpu_launcher.errors import OptionError, RequestError
from gpu_launcher.model import Device, Request, device_list


def refusal(request: Request, devices: tuple[Device, ...]) -> str | None:
    """Why `devices` could never grant a request, as a phrase that goes on from `the request is`; None if they could."""
    try:
        return leases.refusal(request, combinable(devices, request.gpus))
    except RequestError as error:
        return str(error).removeprefix("the request is ")


def refuse(request: Request, devices: tuple[Device, ...], option: str) -> None:
    """Raise OptionError, which names `option`, for a request that `devices` could never grant."""
    problem = refusal(request, devices)
    if problem is not None:
        labels = device_list(device.label for device in devices)
        raise OptionError(option, f"the request is {problem}. There are: {labels}")
