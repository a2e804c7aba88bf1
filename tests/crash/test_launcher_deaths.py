"""Real sweeps whose parts are killed, one by one and several at once, and the world asserted afterwards.

The promise: within seconds no process of the affected jobs is alive, whatever it did to escape, and no device of
theirs is leased; the other jobs go on, and every result comes back, in order.
"""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.waiting import alive, until


def smoke(*values):
    """Parameters that `make test` runs: one death of each process. tests/unit/test_processes_jobs.py kills several.

    Spawned jobs are killed in test_executor_deaths.py there.
    """
    return pytest.param(*values, marks=pytest.mark.smoke)


@pytest.fixture
def gone(world):
    """Assert that these processes and the leases of these jobs, or simply everything, are gone in time."""

    def check(processes, numbers=(), everything=False):
        def is_gone():
            if any(alive(process) for process in processes):
                return False
            if everything:
                return not world.marked() and not world.leased()
            return not any(f" #{number} " in lease for lease in world.leased() for number in numbers)

        until(is_gone, "they are not gone", seconds=60)

    return check


def assert_a_new_sweep_runs_at_once(world, sweep):
    sweep.finish(2)
    again = world.start("n=0,1", "grandchildren=false", name="again")  # on all devices
    assert again.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]
    assert "waits" not in again.output.read_text()
    assert world.marked() == []
    assert world.leased() == []


@pytest.mark.parametrize(
    ("who", "method"),
    [
        smoke("launcher", "fork"),
        ("launcher", "spawn"),
        smoke("launcher and node", "fork"),
        ("launcher and node and guard", "fork"),
        ("launcher and node and server", "fork"),
        ("launcher and guard", "fork"),
        ("launcher and server", "fork"),
        ("launcher and supervisor", "fork"),
        ("launcher and main", "fork"),
        ("launcher and guard and server", "fork"),
        ("launcher and server and supervisor", "fork"),
        ("launcher and server and supervisor", "spawn"),
    ],
)
def test_when_the_launching_program_is_killed_nothing_of_it_is_left(world, kill_together, gone, who, method):
    sweep = world.start("n=0,1,2,3,4", method=method)
    running = sweep.running(2)  # the next job is prepared, or will be, and its ticket waits
    processes = sweep.processes(running)
    kill_together([sweep.part(name, running[0]) for name in who.split(" and ")])
    gone(processes, everything=True)
    assert_a_new_sweep_runs_at_once(world, sweep)


@pytest.mark.parametrize(
    ("who", "method"),
    [
        smoke("server", "fork"),
        ("server", "spawn"),
        ("server and supervisor", "fork"),
        ("server and guard", "fork"),
        smoke("guard", "fork"),
        ("guard and supervisor", "fork"),
    ],
)
def test_when_the_fork_server_is_killed_its_jobs_are_gone_and_the_others_run(world, kill_together, gone, who, method):
    sweep = world.start("n=0,1,2,3,4", method=method)
    running = sweep.running(2)
    processes = sweep.processes(running)
    kill_together([sweep.part(name, running[0]) for name in who.split(" and ")])
    gone(processes, running)
    sweep.running(4)
    sweep.finish(5)
    returns = sweep.returns()
    assert len(returns) == 5
    # The supervisor's end is told before the guard's reaches the fork server, and the device is free by then.
    begun_in_between = [
        number
        for number, (status, _) in enumerate(returns)
        if who == "guard and supervisor" and status == "FAILED" and number not in running
    ]
    assert len(begun_in_between) <= 1
    for number, (status, value) in enumerate(returns):
        if number in (*running, *begun_in_between):
            assert status == "FAILED"
            both = who == "guard and supervisor" and number == running[0]
            killed = r"(its supervisor|the fork server)" if both else "the fork server"
            assert re.search(rf"job {number} \(n={number}\) was ended because {killed} was killed", value)
        else:
            assert (status, value) == ("COMPLETED", number)
    assert sweep.process.returncode == 1
    assert world.marked() == []
    assert world.leased() == []


@pytest.mark.parametrize("who", ["node", "node and guard", "node and server"])
def test_when_the_node_is_killed_its_jobs_fail_and_a_resumption_runs_them(world, kill_together, gone, who):
    sweep = world.start("n=0,1,2,3,4")
    done = sweep.running(2)[0]
    (world.directory / f"finish-{done}").touch()
    until(lambda: f"job {done} (n={done}) completed" in sweep.output.read_text())
    running = [number for number in sweep.running(3) if number != done]
    processes = sweep.processes(running)
    kill_together([sweep.part(name, running[0]) for name in who.split(" and ")])
    gone(processes, running)
    returns = sweep.returns()
    assert returns[done] == ("COMPLETED", done)
    assert [status for status, _ in returns].count("FAILED") == 4
    assert "the process that starts jobs was killed (`dmesg` may know why)" in sweep.output.read_text()
    sweep.finish(5)
    again = world.start("n=0,1,2,3,4", "hydra.launcher.resume=true")
    assert again.returns() == [("COMPLETED", number) for number in range(5)]
    assert "resumed: 1 of 5 jobs completed before" in again.output.read_text()
    assert world.marked() == []
    assert world.leased() == []


@pytest.mark.parametrize(
    ("who", "why", "method"),
    [
        smoke("supervisor", "was ended because its supervisor was killed", "fork"),
        ("supervisor", "was ended because its supervisor was killed", "spawn"),
        smoke("main", "was killed by SIGKILL after", "fork"),
        ("supervisor and main", "was ended because its supervisor was killed", "fork"),
    ],
)
def test_when_a_job_is_killed_its_descendants_are_gone_and_the_others_run(world, kill_together, gone, who, why, method):
    sweep = world.start("n=0,1,2,3", method=method)
    victim, other = sweep.running(2)
    processes = sweep.processes([victim])
    others = sweep.processes([other])
    kill_together([sweep.part(name, victim) for name in who.split(" and ")])
    gone(processes, [victim])
    sweep.running(3)  # on the dead job's device
    assert all(alive(process) for process in others)
    sweep.finish(4)
    returns = sweep.returns()
    assert len(returns) == 4
    status, message = returns.pop(victim)
    assert status == "FAILED"
    assert f"job {victim} (n={victim}) {why}" in message
    assert returns == [("COMPLETED", number) for number in range(4) if number != victim]
    assert world.marked() == []
    assert world.leased() == []


@pytest.mark.parametrize("who", ["child", "session", "daemon"])
def test_the_death_of_a_grandchild_is_its_jobs_own_affair(world, who):
    sweep = world.start("n=0,1")
    sweep.running(2)
    tree = sweep.tree(0)
    tree[who].kill()
    until(lambda: not alive(tree[who]))
    assert alive(tree["main"])
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]
    assert world.marked() == []


def test_the_fork_server_may_be_killed_again_and_again_until_that_is_no_accident(world):
    sweep = world.start("n=0,1,2,3,4,5,6,7,8,9", "hydra.launcher.max_parallel=1")
    for killed in range(5):
        sweep.running(killed + 1)
        sweep.part("server", 0).kill()
    sweep.process.wait(60)
    assert sweep.process.returncode == 1
    assert "the fork server was killed 5 times" in sweep.output.read_text()
    assert world.marked() == []
    assert world.leased() == []


# The launching program is killed at each point of a job's life.


@pytest.mark.parametrize(
    ("point", "method"),
    [
        *((point, "fork") for point in ("started", "prepared", "queued", "claimed", "granted")),
        *((point, "fork") for point in ("exited", "released", "concluded")),
        ("granted", "spawn"),
    ],
)
def test_when_the_launching_program_dies_at_any_point_a_new_sweep_runs_at_once(world, gone, point, method):
    for number in (0, 1):  # one of these is among the first two that run
        (world.directory / f"finish-{number}").touch()
    sweep = world.start("n=0,1,2,3", method=method, die_at=point)
    assert sweep.process.wait(60) == -signal.SIGKILL, sweep.output.read_text()
    gone([], everything=True)
    assert_a_new_sweep_runs_at_once(world, sweep)


# Jobs that do not want to end.


def test_a_stopped_job_goes_with_its_launching_program(world, gone):
    sweep = world.start("n=0,1")
    processes = sweep.processes(sweep.running(2))
    for process in processes:
        process.suspend()
    sweep.process.kill()
    gone(processes, everything=True)


@pytest.mark.parametrize("stopped", ["supervisor", "server", "guard"])
def test_what_watches_over_a_job_may_be_stopped_when_the_launching_program_is_killed(world, gone, stopped):
    sweep = world.start("n=0,1")
    processes = sweep.processes(sweep.running(2))
    watcher = sweep.part(stopped, 0)
    watcher.suspend()
    sweep.process.kill()
    if stopped == "guard":  # nobody ends the one who outlives all, but it has nothing left
        gone(processes, [0, 1])
        watcher.resume()
    gone(processes, everything=True)


def test_a_job_that_ignores_every_signal_goes_with_its_launching_program(world, gone):
    sweep = world.start("n=0,1", "stubborn=true")
    processes = sweep.processes(sweep.running(2))
    sweep.process.kill()
    gone(processes, everything=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_ignores_every_signal_is_killed_after_its_grace(world, gone, signum):
    sweep = world.start("n=0,1,2", "stubborn=true", "hydra.launcher.grace=0.5")
    processes = sweep.processes(sweep.running(2))
    began = time.monotonic()
    sweep.process.send_signal(signum)
    sweep.process.wait(60)
    assert time.monotonic() - began >= 0.5
    gone(processes, everything=True)


def test_hundreds_of_processes_of_one_job_go_with_its_launching_program(world, gone):
    sweep = world.start("n=0", "bomb=200", "stubborn=true")
    sweep.running(1)
    until(lambda: len(world.marked()) > 400)
    processes = world.marked()
    sweep.process.kill()
    gone(processes, everything=True)


def test_hundreds_of_processes_of_one_job_go_when_its_main_process_is_killed(world, gone):
    sweep = world.start("n=0", "bomb=200")
    sweep.running(1)
    supervisor = sweep.part("supervisor", 0)
    until(lambda: len(supervisor.children(recursive=True)) > 400)
    processes = supervisor.children(recursive=True)
    sweep.part("main", 0).kill()
    gone(processes, [0])
    ((status, message),) = sweep.returns()
    assert status == "FAILED"
    assert "was killed by SIGKILL" in message


def test_a_device_is_not_free_while_a_child_with_its_lease_lives_and_that_child_is_ended(world):
    sweep = world.start("n=0", "linger=true", "grandchildren=false", devices=1)
    sweep.running(1)
    tree = sweep.tree(0)
    supervisor = sweep.part("supervisor", 0)
    supervisor.suspend()  # which would end the child
    sweep.finish(1)
    until(lambda: not alive(tree["main"]))
    assert alive(tree["child"])
    assert not world.claimable(1)
    supervisor.resume()
    while alive(tree["child"]):
        if world.claimable(1):
            assert not alive(tree["child"])
    assert sweep.returns() == [("COMPLETED", 0)]
    assert world.claimable(1)
    assert world.marked() == []
