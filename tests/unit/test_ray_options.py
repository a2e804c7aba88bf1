"""The options behind `ray:COUNT`, what is reserved for them, and the actor, which needs no Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.nodes.ray_bridge import AgentProcess
from gpu_launcher.nodes.ray_options import (
    RayOptions,
    bundle_of,
    can_provide,
    in_words,
    most_of_each,
    read_ray_options,
)

BIG: dict[str, float] = {"CPU": 64.0, "GPU": 8.0, "memory": 1e12, "accelerator_type:H100": 1.0}
SMALL: dict[str, float] = {"CPU": 16.0, "GPU": 4.0, "node:10.0.0.2": 1.0}
HEAD: dict[str, float] = {"CPU": 128.0}


def test_no_words_reserve_all_gpus_of_a_machine_and_one_cpu():
    assert read_ray_options([]) == RayOptions()
    assert bundle_of(RayOptions(), [HEAD, SMALL, BIG]) == {"GPU": 8, "CPU": 1}


def test_machines_without_gpus_reserve_none():
    assert bundle_of(RayOptions(), [HEAD]) == bundle_of(RayOptions(), []) == {"CPU": 1}
    assert bundle_of(RayOptions(gpus=0), [BIG]) == {"CPU": 1}


def test_words_in_any_order_and_either_spelling():
    words = "--cpus 16 --wait --resource=memory=64e9 --gpus=8 --resource accelerator_type:H100=0.5 --address=a:1"
    options = read_ray_options([*words.split(), "sh", "--gpus=9"])
    resources = {"memory": 64e9, "accelerator_type:H100": 0.5}
    assert options == RayOptions(8, 16, resources, "a:1", wait=True, command=("sh", "--gpus=9"))
    assert bundle_of(options, []) == {"GPU": 8, "CPU": 16, **resources}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--gpus", "--gpus needs a value"),
        ("--gpus=", "--gpus must be an integer >= 0, got ''"),
        ("--gpus=0.5", "--gpus must be an integer >= 0, got '0.5'"),
        ("--gpus -1", "--gpus must be an integer >= 0, got '-1'"),
        ("--cpus=0", "--cpus must be an integer >= 1, got '0'"),
        ("--cpus=" + "9" * 5000, "--cpus must be an integer >= 1"),
        ("--resource=memory", "--resource must be NAME=AMOUNT, such as accelerator_type:H100=1, got 'memory'"),
        ("--resource=a=0", "--resource must be NAME=AMOUNT"),
        ("--resource=a=nan", "--resource must be NAME=AMOUNT"),
        ("--resource=a=inf", "--resource must be NAME=AMOUNT"),
        ("--resource==1", "--resource must be NAME=AMOUNT"),
        ("--resource=GPU=1", "--resource does not set GPU: use --gpus"),
        ("--address=", "--address needs a value"),
        ("--address=ray://head:10001", "is the address of a Ray client. Start the sweep on a machine of the cluster"),
        ("--wait=yes", "'--wait' is not an option of ray"),
        ("-g 1", "'-g' is not an option of ray: give --gpus=N, --cpus=N, --resource=NAME=AMOUNT, --address=ADDRESS or"),
    ],
)
def test_wrong_option_is_refused(words: str, problem: str):
    with pytest.raises(ValueError, match=r".") as raised:
        read_ray_options(words.split())
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("bundle", "can"),
    [
        ({"GPU": 8, "CPU": 64}, True),
        ({"GPU": 8, "CPU": 65}, False),
        ({"GPU": 9, "CPU": 1}, False),
        ({"CPU": 128}, True),
        ({"GPU": 4, "CPU": 1, "node:10.0.0.2": 1}, True),
        ({"GPU": 8, "CPU": 1, "node:10.0.0.2": 1}, False),
        ({"CPU": 1, "unknown": 1}, False),
    ],
)
def test_one_machine_must_have_everything(bundle: dict[str, float], can: bool):
    assert can_provide([HEAD, SMALL, BIG], bundle) is can


def test_resources_are_named_in_words():
    assert in_words({"CPU": 1}) == "1 CPU"
    assert in_words({"GPU": 8, "CPU": 16, "memory": 64e9, "a": 0.5}) == "8 GPUs, 16 CPUs, memory=64000000000 and a=0.5"
    assert most_of_each([HEAD, SMALL], {"GPU": 8, "CPU": 1}) == "its machines have at most 4 GPUs and 128 CPUs"
    assert most_of_each([], {"GPU": 8, "CPU": 1}) == "its machines have at most 0 GPUs and 0 CPUs"


def test_bridge_without_ray_says_so():
    code = "import sys; sys.modules['ray'] = None; from gpu_launcher.nodes.ray_bridge import main; main()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as bridge:
        assert bridge.stdout is not None
        assert bridge.stderr is not None
        said = bridge.stdout.read(), bridge.stderr.read()  # while its input is open
    assert (bridge.returncode, *said) == (1, "", "Ray is not installed here\n")


def test_bridge_says_that_a_port_is_too_large():
    # Ray itself is not needed: the bridge tries the port first.
    code = "import sys, types; sys.modules['ray'] = types.SimpleNamespace(exceptions=types.SimpleNamespace("
    code += "RayError=KeyError), shutdown=lambda: None); from gpu_launcher.nodes.ray_bridge import main; main()"
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", code, "--address=localhost:65536"]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as bridge:
        assert bridge.stderr is not None
        said = bridge.stderr.read()
    assert (bridge.returncode, "Traceback" in said) == (1, False)
    assert said == "cannot connect to a Ray cluster at localhost:65536: the port must be at most 65535\n"


# The actor


def everything(agent: AgentProcess) -> tuple[bytes, bytes, Any]:
    """What an agent writes until it ends, and its exit status."""
    output, errors = b"", b""
    while True:
        more, more_errors, status = agent.read()
        output, errors = output + more, errors + more_errors
        if status is not None:
            return output, errors, status


def test_actor_passes_bytes_on_in_both_directions(tmp_path: Path):
    agent = AgentProcess()
    code = "cat; echo wrong >&2; pwd; exit 3"
    assert agent.start(("sh", "-c", code), str(tmp_path)) is None
    agent.write(b"\0one\n")
    assert agent.read() == (b"\0one\n", b"", None)
    agent.write(b"two\n")
    agent.end_input()
    assert everything(agent) == (f"two\n{tmp_path}\n".encode(), b"wrong\n", 3)
    agent.write(b"too late")


def test_bridge_that_has_no_agent_ends_with_its_input():
    code = "import sys, time; from gpu_launcher.nodes import ray_bridge as b; "
    code += "b._Bridge.run = lambda self: time.sleep(600); b.main()"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert done.returncode == 1


def test_actor_says_why_the_agent_does_not_start(tmp_path: Path):
    assert AgentProcess().start(("/no/such/python",), str(tmp_path)) == "/no/such/python: No such file or directory"


def test_agent_starts_where_its_directory_is_missing(tmp_path: Path):
    agent = AgentProcess()
    assert agent.start(("echo", "here"), str(tmp_path / "missing")) is None
    agent.end_input()
    assert everything(agent) == (b"here\n", b"", 0)


def test_number_of_threads_that_ray_sets_does_not_reach_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    begun_with = b"OMP_NUM_THREADS=" in Path("/proc/self/environ").read_bytes()
    agent = AgentProcess()
    assert agent.start(("sh", "-c", "echo $OMP_NUM_THREADS"), str(tmp_path)) is None
    agent.end_input()
    assert everything(agent) == (b"1\n" if begun_with else b"\n", b"", 0)
