"""Says what the jobs of a sweep would need, and whether the pool could grant it. Starts and changes nothing."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpu_launcher.allocation.explain import describe_request
from gpu_launcher.allocation.outlook import Outlook, device_share, foresee
from gpu_launcher.allocation.readings import PoolWindow, measure, nvml_kept_open, put_together
from gpu_launcher.allocation.survey import Found, PoolSurvey
from gpu_launcher.devices import select_devices
from gpu_launcher.devices.cpu import usable_cpus
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import Device, DeviceKind, Request
from gpu_launcher.wording import count

MAX_SHOWN = 8
"""Maximum number of different requests that are described."""
UNLIMITED = 1000
"""Number of jobs that stands for no limit. No machine runs that many at once."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a dry run says about the requests of a sweep."""

    lines: tuple[str, ...]
    possible: bool
    """Whether the pool could ever grant each request."""


def examine_needs(
    requests: Mapping[Request, int], total: int | None, options: Options, noun: str, *, here: bool
) -> Needs:
    """Describe the requests of jobs, given with the number of jobs that make each. Reads the devices and the pool.

    `total` is the number of all jobs, of which `requests` may have a sample; None if it is not limited. `here`: whether
    the jobs run on this machine. Other machines are not asked. `noun` is what users call a job.
    Raises OptionError, DeviceError and PoolDirectoryError.
    """
    if not here:
        return describe_needs(requests, total, options, noun, None)
    environ = os.environ if options.environ is None else options.environ
    with contextlib.closing(PoolWindow(options.pool_dir)) as pool, nvml_kept_open():
        selection = select_devices(options.devices, environ, option=options.spell("devices"))
        known = {device.uuid: device for device in selection.devices}
        conditions, notices = measure(selection.devices)
        found = Found(selection.devices, known=known, only=True)
        survey = put_together(found, conditions, pool.look(), options.busy_memory, notices)
    needs = describe_needs(requests, total, options, noun, survey)
    return replace(needs, lines=(*selection.notices, *notices, *needs.lines))


def describe_needs(
    requests: Mapping[Request, int], total: int | None, options: Options, noun: str, survey: PoolSurvey | None
) -> Needs:
    """Describe requests, as `examine_needs` does. `survey` is of the devices that may be granted, if they are known."""
    devices = () if survey is None else tuple(seen.device for seen in survey.devices)
    examined = sum(requests.values())
    alike = Counter[Request]()
    for request, jobs in requests.items():
        alike[replace(request, timeout=None)] += jobs
    lines, possible = [], True
    for request, jobs in alike.most_common():
        number, need = jobs, _what(request, devices)
        if total is None and len(alike) == 1:
            number, text = UNLIMITED, f"each {noun} needs {need}"
        elif total is None or (total != examined and len(alike) > 1):
            text = f"{jobs} of {examined} examined {noun}s need {need}"
        else:
            number = total if len(alike) == 1 else jobs
            each = " each" if request.gpus else ""
            text = f"1 {noun} needs {need}" if number == 1 else f"{number} {noun}s need {need}{each}"
        if survey is None:
            lines.append(f"{text}; the nodes say whether they can grant that once they run")
            continue
        unavailable = {seen.device.uuid: seen.reason for seen in survey.devices if seen.reason is not None}
        outlook = _capped(foresee(request, number, devices, survey.view, unavailable), request, options)
        possible = possible and outlook.never is None
        lines.append(f"{text}{_prospect(outlook, number)}")
    if len(lines) > MAX_SHOWN:
        lines[MAX_SHOWN:] = [f"and {count(len(lines) - MAX_SHOWN, 'other request')}"]
    if any(request.auto_memory for request in alike):
        lines.append(f"memory=auto: later {noun}s share devices, as far as the memory that earlier ones used allows")
    if total is not None and (hours := _hours(requests, total, devices, options, noun)):
        lines.append(hours)
    return Needs(tuple(lines), possible)


def _what(request: Request, devices: tuple[Device, ...]) -> str:
    return describe_request(request, devices) if request.gpus else "no device"


def _capped(outlook: Outlook, request: Request, options: Options) -> Outlook:
    """The outlook under the limit on jobs at the same time."""
    most = options.max_parallel or (outlook.now if request.gpus else usable_cpus())
    return replace(outlook, now=min(outlook.now, most))


def _prospect(outlook: Outlook, jobs: int) -> str:
    if outlook.never is not None:
        return f", which is never granted: the request is {outlook.never}"
    if outlook.now >= jobs:
        return ": it can start now" if jobs == 1 else ": all can start now"
    if outlook.now:
        return f": {outlook.now} can start now, the others when those end"
    waits = "it waits now" if jobs == 1 else "they wait now"
    return f": {waits}{': ' if outlook.reason else ''}{outlook.reason}"


def _hours(
    requests: Mapping[Request, int], total: int, devices: tuple[Device, ...], options: Options, noun: str
) -> str:
    """The device time of all jobs, in words; empty if none needs a device."""
    scale = total / max(1, sum(requests.values()))
    using = {request: jobs * scale for request, jobs in requests.items() if request.gpus}
    if not using:
        return ""
    unit = "CPU slot hours" if {device.kind for device in devices} == {DeviceKind.CPU} else "GPU hours"
    about = "about " if scale > 1 and len(requests) > 1 else ""
    option = options.spell("timeout")
    if all(request.timeout is not None for request in using):
        hours = sum(device_share(one, devices) * jobs * (one.timeout or 0.0) / 3600 for one, jobs in using.items())
        return f"{unit}: at most {about}{_number(hours)}, if each {noun} takes as long as {option} and is not retried"
    hours = sum(device_share(one, devices) * jobs for one, jobs in using.items())
    return (
        f"{unit}: {about}{_number(hours)} for each hour that a {noun} takes; for the total, give the expected time as "
        f"{option}{'=' if '.' in option else ' '}20m"
    )


def _number(hours: float) -> str:
    return f"{hours:.1f}".removesuffix(".0") if hours >= 1 or not hours else f"{hours:.2g}"
