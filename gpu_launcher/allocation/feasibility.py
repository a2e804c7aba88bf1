"""Checks whether given devices could ever satisfy a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpu_launcher import leases
from gpu_launcher.devices import combinable
from gpu_launcher.errors import OptionError, RequestError
from gpu_launcher.model import MILLIONTHS, Device, Request, Share
from gpu_launcher.wording import device_names


def refusal(request: Request, devices: tuple[Device, ...]) -> str | None:
    """The reason why `devices` could never satisfy a request, continuing `the request is`; None if they could."""
    try:
        return leases.refusal(request, combinable(devices, request.gpus))
    except RequestError as error:
        return str(error).removeprefix("the request is ")


def refuse(request: Request, devices: tuple[Device, ...], spell: Callable[[str], str] = str) -> None:
    """Raise OptionError if `devices` could never satisfy a request. `spell` gives the user's name for an option."""
    problem = refusal(request, devices)
    if problem is not None:
        labels = device_names(devices)
        raise OptionError(spell(_blamed(request, devices)), f"the request is {problem}. There are: {labels}")


def _blamed(request: Request, devices: tuple[Device, ...]) -> str:
    """The option to change: `memory` if only that is too much, or is too much for every device; otherwise `gpus`."""
    memory = request.share.memory
    if not memory or request.gpus > len(devices):
        return "gpus"
    without_memory = replace(request, share=Share(request.share.millionths or MILLIONTHS))
    too_much = all(device.memory is not None and device.memory < memory for device in devices)
    return "memory" if too_much or refusal(without_memory, devices) is None else "gpus"
