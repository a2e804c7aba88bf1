"""Sweeps that are suspended, as by Ctrl-Z: jobs that run keep running, and devices of jobs that end are free."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import psutil

from tests.waiting import until


def suspend(sweep) -> None:
    sweep.process.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(sweep.process.pid).status() == psutil.STATUS_STOPPED)


def told(world, *arguments: str) -> str:
    command = [sys.executable, "-m", "gpu_launcher.cli", *arguments]
    done = subprocess.run(command, env=world.surroundings(), capture_output=True, text=True, timeout=500, check=False)
    return done.stdout


def test_suspended_sweep_frees_devices_and_continues(world):
    sweep = world.start(f"n={','.join(map(str, range(12)))}")
    sweep.running(2)
    suspend(sweep)
    (lease, *_) = json.loads(told(world, "status", "--json"))["leases"]
    assert (lease["pid"], lease["suspended"]) == (sweep.process.pid, True)
    assert f"process {sweep.process.pid} of {lease['user']} (app.py) is suspended and has 2 leases" in told(
        world, "doctor"
    )
    sweep.finish(12)
    until(lambda: world.claimable(2), "devices of jobs that have ended are not free")
    begun = sweep.running(2)
    assert len(begun) <= 4, "what was offered before may run, and nothing else"
    other = world.start("n=0,1", name="other")
    assert other.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]
    sweep.process.send_signal(signal.SIGCONT)
    assert sweep.returns() == [("COMPLETED", number) for number in range(12)]
    assert world.marked() == []


def test_sweep_says_that_it_waits_for_a_suspended_one(world):
    sweep = world.start("n=0,1")
    sweep.running(2)
    suspend(sweep)
    other = world.start("n=2", name="other")
    until(lambda: "(app.py, suspended)" in other.output.read_text())
    sweep.finish(3)
    assert other.returns() == [("COMPLETED", 2)]
    sweep.process.send_signal(signal.SIGCONT)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


def test_killed_while_suspended_leaves_nothing(world):
    sweep = world.start("n=0,1,2,3")
    sweep.running(2)
    suspend(sweep)
    sweep.process.kill()
    until(lambda: not world.marked() and not world.leased())
