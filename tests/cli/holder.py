"""A program that holds leases and waits for others, for tests and demonstrations of `status` and the like.

    python holder.py POOL REQUESTS

REQUESTS is a JSON list of `[devices, gpus, memory, priority, command]`, each with an optional sixth item such as
`{"timeout": 60}` or `{"pid": 1}`. Prints a line once all are enqueued and those that can be granted are granted. Ends
when its stdin does.
"""

from __future__ import annotations

import json
import os
import sys

from gpu_launcher.devices import NvmlProbe, cpu_slots, simulated_devices
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from gpu_launcher.model import Device, Owner, Request


def devices_of(spec: str) -> tuple[Device, ...]:
    """The devices for `simulated:8`, `cpu:2`, `gpus` (all GPUs), `gpus:0,1` or `simulated@3` (only index 3)."""
    kind, _, number = spec.partition(":")
    if kind == "gpus":
        found = NvmlProbe().inventory().devices
        return tuple(device for device in found if not number or str(device.index) in number.split(","))
    if "@" in spec:
        return devices_of(f"simulated:{int(spec.split('@')[1]) + 1}")[-1:]
    return (simulated_devices if kind == "simulated" else cpu_slots)(int(number))


def main(pool: str, requests: str) -> None:
    with FileLedger(resolve_pool_directory(pool)) as ledger:
        tickets = []
        for spec, gpus, memory, priority, command, *more in json.loads(requests):
            extra = more[0] if more else {}
            owner = Owner(extra.get("pid", os.getpid()), "nobody believes this", command)
            request = Request.of(gpus, memory, priority=priority, timeout=extra.get("timeout"))
            tickets.append(ledger.enqueue(request, devices_of(spec), owner))
        for ticket in tickets:
            ledger.claim(ticket)
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
