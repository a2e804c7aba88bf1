"""Real executors whose parts are killed, one by one and several at once, and the world asserted afterwards.

The promise: within seconds no process of the affected calls is alive, whatever it did to escape, and no device of
theirs is leased; no future waits for ever, and the calls that are not affected go on.
"""

from __future__ import annotations

import re
import signal

import psutil
import pytest

from tests.waiting import alive, until


def smoke(*values):
    """Parameters that `make test` runs. There, test_launcher_deaths.py kills what stands below the node."""
    return pytest.param(*values, marks=pytest.mark.smoke)


# Each call starts grandchildren of all kinds, as those of `app` do, and waits for the file `finish-<n>`.
PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path

from app import daemon

from gpu_launcher import PoolExecutor
from gpu_launcher.jobs import where
from gpu_launcher.jobs.where import Where

where.GRACE = 600.0  # calls end by themselves
HERE = Path(__file__).parent


def call(n):
    witness = {"main": os.getpid(), "devices": os.environ["CUDA_VISIBLE_DEVICES"]}
    witness["child"] = subprocess.Popen(["sleep", "600"]).pid
    witness["session"] = subprocess.Popen(["sleep", "600"], start_new_session=True).pid
    witness["daemon"] = daemon()
    (HERE / f"temporary-{n}").write_text(json.dumps(witness))
    (HERE / f"temporary-{n}").rename(HERE / f"witness-{n}")
    while not (HERE / f"finish-{n}").exists():
        time.sleep(0.01)
    return n


if __name__ == "__main__":
    with PoolExecutor(pool=Where("simulated:2"), start_method=sys.argv[1]) as executor:
        futures = [executor.submit(call, n) for n in range(5)]
        errors = [future.exception() for future in futures]
    said = [("COMPLETED", future.result()) if error is None else (type(error).__name__, str(error))
            for future, error in zip(futures, errors)]
    Path(os.environ["RETURNS"]).write_text(json.dumps(said))
"""


@pytest.fixture
def start(world):
    """Start the program, whose calls are jobs of the executor."""

    def start(method="fork", name="executor"):
        program = world.directory / "program.py"
        program.write_text(PROGRAM)
        return world.begin([world.python, str(program), method], world.surroundings(), name)

    return start


@pytest.fixture
def gone(world):
    """Assert that these processes and the leases of these calls, or simply everything, are gone in time."""

    def check(processes, numbers=(), everything=False):
        def is_gone():
            if any(alive(process) for process in processes):
                return False
            if everything:
                return not world.marked() and not world.leased()
            return not any(f" #{number} " in lease for lease in world.leased() for number in numbers)

        until(is_gone, "they are not gone", seconds=60)

    return check


def part(sweep, name, number):
    """The program, what is between it and a call (`node`, `guard`, `server`, `supervisor`), or of its tree."""
    if name == "program":
        return psutil.Process(sweep.process.pid)
    above = psutil.Process(sweep.witness(number)["main"]).parents()
    between = dict(zip(("supervisor", "server", "guard", "node", "program"), above, strict=False))
    assert between["program"].pid == sweep.process.pid
    return between.get(name) or sweep.tree(number)[name]


def assert_another_program_runs_at_once(world, sweep, start, method="fork"):
    sweep.finish(5)
    again = start(method, "again")
    assert again.returns() == [("COMPLETED", number) for number in range(5)]
    assert "waiting" not in again.output.read_text()
    assert world.marked() == []
    assert world.leased() == []


@pytest.mark.parametrize(
    ("who", "method"),
    [
        ("program", "fork"),
        smoke("program", "spawn"),
        ("program and node", "fork"),
        ("program and guard", "fork"),
        ("program and server", "fork"),
        ("program and supervisor", "fork"),
        ("program and main", "fork"),
        ("program and node and guard", "fork"),
        ("program and node and server", "fork"),
    ],
)
def test_when_the_program_is_killed_nothing_of_it_is_left(world, start, kill_together, gone, who, method):
    sweep = start(method)
    running = sweep.running(2)
    processes = sweep.processes(running)
    kill_together([part(sweep, name, running[0]) for name in who.split(" and ")])
    gone(processes, everything=True)
    assert_another_program_runs_at_once(world, sweep, start, method)


@pytest.mark.parametrize(
    ("who", "method"),
    [
        smoke("node", "fork"),
        ("node", "spawn"),
        ("node and guard", "fork"),
        ("node and server", "fork"),
        ("node and supervisor", "fork"),
        ("node and main", "fork"),
    ],
)
def test_when_the_node_is_killed_every_future_says_so_and_nothing_is_left(
    world, start, kill_together, gone, who, method
):
    sweep = start(method)
    running = sweep.running(2)
    processes = sweep.processes(running)
    kill_together([part(sweep, name, running[0]) for name in who.split(" and ")])
    gone(processes, running)
    returns = sweep.returns()
    assert len(returns) == 5
    for kind, said in returns:
        # The death of the call itself may have been told before.
        assert kind == "BrokenPoolExecutor" or (who == "node and main" and kind == "JobError")
        assert re.search("was killed", said)
    gone(processes, everything=True)
    assert_another_program_runs_at_once(world, sweep, start, method)


@pytest.mark.parametrize(
    ("who", "method"),
    [("server", "fork"), ("server", "spawn"), ("guard", "fork"), ("server and supervisor", "fork")],
)
def test_when_the_fork_server_is_killed_its_calls_are_gone_and_the_others_run(
    world, start, kill_together, gone, who, method
):
    sweep = start(method)
    running = sweep.running(2)
    processes = sweep.processes(running)
    kill_together([part(sweep, name, running[0]) for name in who.split(" and ")])
    gone(processes, running)
    sweep.running(4)
    sweep.finish(5)
    returns = sweep.returns()
    assert len(returns) == 5
    for number, (kind, said) in enumerate(returns):
        if number in running:
            assert kind == "JobError"
            assert re.search(
                rf"job {number} \(call\) was ended because (the fork server|its supervisor) was killed", said
            )
        else:
            assert (kind, said) == ("COMPLETED", number)
    assert world.marked() == []
    assert world.leased() == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("who", "why"),
    [
        ("supervisor", "was ended because its supervisor was killed"),
        ("main", "was killed by SIGKILL after"),
        ("supervisor and main", "was ended because its supervisor was killed"),
    ],
)
def test_when_a_call_is_killed_its_descendants_are_gone_and_the_others_run(
    world, start, kill_together, gone, who, why, method
):
    sweep = start(method)
    victim, other = sweep.running(2)
    processes, others = sweep.processes([victim]), sweep.processes([other])
    kill_together([part(sweep, name, victim) for name in who.split(" and ")])
    gone(processes, [victim])
    sweep.running(3)  # on the dead call's device
    assert all(alive(process) for process in others)
    sweep.finish(5)
    returns = sweep.returns()
    kind, said = returns.pop(victim)
    assert kind == "JobError"
    assert f"job {victim} (call) {why}" in said
    assert returns == [("COMPLETED", number) for number in range(5) if number != victim]
    assert world.marked() == []
    assert world.leased() == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_program_ends_its_calls(world, start, gone, signum):
    sweep = start()
    processes = sweep.processes(sweep.running(2))
    sweep.process.send_signal(signum)
    gone(processes, everything=True)
    assert sweep.process.wait() == -signum


def test_ctrl_c_ends_the_calls_with_the_program(world, start, gone):
    sweep = start()
    processes = sweep.processes(sweep.running(2))
    sweep.process.send_signal(signal.SIGINT)
    sweep.process.wait(100)
    gone(processes, everything=True)
    assert_another_program_runs_at_once(world, sweep, start)


@pytest.mark.parametrize("who", ["node", "guard", "server", "supervisor"])
def test_what_watches_over_calls_may_be_stopped_when_the_program_is_killed(world, start, gone, who):
    sweep = start()
    running = sweep.running(2)
    processes = sweep.processes(running)
    watcher = part(sweep, who, running[0])
    watcher.suspend()
    sweep.process.kill()
    if who in ("node", "guard"):  # nobody ends those who stand above all others
        watcher.resume()
    gone(processes, everything=True)
