"""The option `nodes`: what it accepts, the error for anything else, and the command line of each node."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from gpu_launcher.errors import OptionError
from gpu_launcher.nodes.engines import NodeSpec, needed, read_nodes
from gpu_launcher.nodes.rendezvous import RendezvousDirectory
from gpu_launcher.nodes.sbatch_bridge import command_of_job
from gpu_launcher.nodes.slurm_time import EARLY_SECONDS

PRINTS_ITS_ARGUMENTS = """#!/bin/sh
for argument; do printf '<%s>' "$argument"; done
"""


def names(value: object) -> list[str]:
    return [spec.name for spec in read_nodes(value)]


def agent_of(spec: NodeSpec) -> tuple[str, ...]:
    """The end of a command line, which runs the agent. It is one word for ssh."""
    assert spec.command is not None
    return tuple(shlex.split(spec.command[-1])) if spec.command[0] == "ssh" else spec.command[-3:]


# What is accepted


def test_no_value_names_no_nodes():
    assert read_nodes(None) == ()


def test_local_is_a_node_without_a_command():
    assert read_nodes("local") == read_nodes(["local"]) == read_nodes(("  local ",)) == (NodeSpec("local", None),)


@pytest.mark.parametrize("host", ["gpu2", "anna@gpu3", "10.0.0.7", "gpu2.example.org", "fe80::1", "käthe"])
def test_host_is_the_word_before_the_command_of_ssh(host):
    (spec,) = read_nodes(f"ssh:{host}")
    assert spec.name == host
    assert spec.command is not None
    assert spec.command[0] == "ssh"
    assert spec.command[-3:-1] == ("--", host)
    assert agent_of(spec)[:2] == (sys.executable, "-c")


@pytest.mark.parametrize(
    ("text", "words", "name"),
    [
        ("command:env", ["env"], "env"),
        ("command: kubectl exec -i trainer -- ", ["kubectl", "exec", "-i", "trainer", "--"], "kubectl"),
        ("command:/opt/bin/srun -w 'node 2'", ["/opt/bin/srun", "-w", "node 2"], "srun"),
        ("command:'kubectl exec -i trainer --'", ["kubectl", "exec", "-i", "trainer", "--"], "kubectl"),
        ("command:'/opt/my programs/enter' a:b", ["/opt/my programs/enter", "a:b"], "enter"),
    ],
)
def test_command_is_split_like_a_line_of_a_shell(text, words, name):
    (spec,) = read_nodes(text)
    assert spec.name == name
    assert spec.command is not None
    assert list(spec.command[:-3]) == words
    assert agent_of(spec)[:2] == (sys.executable, "-c")


def test_all_nodes_run_the_same_agent():
    by_ssh, by_command = read_nodes(["ssh:gpu2", "command:env"])
    assert agent_of(by_ssh) == agent_of(by_command)
    compile(agent_of(by_ssh)[2], "agent", "exec")


def test_commands_in_the_documentation_name_nodes_in_bash():
    docs = Path(__file__).parents[2] / "docs"
    page = "".join((docs / f"{name}.md").read_text() for name in ("nodes", "ssh", "slurm", "ray"))
    lines = re.findall(r"^(?:python train\.py|gpu-launcher doctor|gpu-launcher map) .*", page, flags=re.MULTILINE)
    assert len(lines) >= 15
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", f'run() {{ printf "%s\\0" "$@"; }}; run {line}'], capture_output=True, text=True, check=True
        )
        words = done.stdout.split("\0")[:-1]
        if words[0] == "python":
            (override,) = OverridesParser.create().parse_overrides([word for word in words if ".nodes=" in word])
            value = override.value()
            nodes = [str(one) for one in value] if isinstance(value, list) else str(value)
        else:
            nodes = [after for option, after in pairwise(words) if option == "--nodes"]
        assert read_nodes(nodes), line
    assert all(kind in "".join(lines) for kind in ("local", "ssh:", "slurm:", "sbatch:", "ray:", "command:"))


def test_slurm_is_as_many_nodes_as_its_number_with_options_of_srun():
    nodes = read_nodes(["slurm:3 --partition=gpu --comment='two words'", "slurm:1"])
    assert [spec.name for spec in nodes] == ["slurm", "slurm-2", "slurm-3", "slurm-4"]
    for spec in nodes[:3]:
        assert spec.command is not None
        assert spec.command[0] == "srun"
        assert spec.command[-5:-3] == ("--partition=gpu", "--comment=two words")
        assert agent_of(spec)[:2] == (sys.executable, "-c")


def test_slurm_signals_before_the_end_unless_the_user_says_when():
    (spec,) = read_nodes("slurm:1 --signal=TERM@300", grace=12.5)
    assert spec.command is not None
    ours, users = spec.command.index("--signal=TERM@43"), spec.command.index("--signal=TERM@300")
    assert ours < users  # srun takes the last one
    assert spec.notice == 300.0
    (spec,) = read_nodes("slurm:1 --signal B:USR1@200", grace=12.5)
    assert spec.notice == 200.0
    (spec,) = read_nodes("slurm:1 --signal=TERM", grace=12.5)
    assert spec.notice == 60.0
    (spec,) = read_nodes("slurm:1", grace=12.5)
    assert spec.notice == 43.0
    (spec,) = read_nodes("slurm:1", grace=1e9)
    assert spec.command is not None
    assert "--signal=TERM@65535" in spec.command


def test_allocations_of_their_own_are_elastic_and_steps_of_others_are_not(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [spec.elastic for spec in read_nodes(["local", "ssh:gpu2", "command:env", "slurm:1"])] == [0, 0, 0, 1]
    for named in ("--jobid=7", "--jobid 7", "--gpus 2 --jobi 7"):
        assert [(spec.elastic, spec.lasts) for spec in read_nodes([f"slurm:1 --time=10 {named}"])] == [(0, math.inf)]
    assert [spec.elastic for spec in read_nodes(["slurm:1 --job-name=--jobid sh --jobid 7"])] == [1]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [spec.elastic for spec in read_nodes(["slurm:1"])] == [0]


@pytest.mark.parametrize(
    ("at_once", "left"),
    [(None, ["local", "slurm", "slurm-2", "slurm-3"]), (2, ["local", "slurm", "slurm-2"]), (0, [])],
)
def test_no_more_allocations_are_asked_for_than_jobs_can_use(monkeypatch, at_once, left):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [spec.name for spec in needed(read_nodes(["local", "slurm:3"]), at_once)] == left


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ("--time=90", 90 * 60),
        ("--time 90:30", 90 * 60 + 30),
        ("-t 2:00:00 --gpus=8", 7200),
        ("-t90 sh run_first.sh", 90 * 60),
        ("--time=1-0", 86400),
        ("--time=1-2:30", 86400 + 9000),
        ("--time=1-02:30:01", 86400 + 9001),
        ("--time=5 --time=10", 600),
        ("--time=UNLIMITED", math.inf),
        ("--time=0", math.inf),
        ("--time=1:2:3:4", math.inf),
        ("--gpus=8 --time", math.inf),
        ("--time-min=5", math.inf),
        ("", math.inf),
    ],
)
def test_time_limit_is_read_as_slurm_reads_it(monkeypatch, options, seconds):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (spec,) = read_nodes(f"slurm:1 {options}", grace=10.0)
    assert spec.lasts == seconds - 40 - EARLY_SECONDS


@pytest.mark.parametrize("kind", ["slurm", "sbatch"])
@pytest.mark.parametrize(
    "words",
    [
        "sh run.sh --time=5 --signal=USR1@7",
        "--exclusive sh --time=5",
        "-p gpu -Qv -O ./run.sh -t 5",
        "--partition gpu run.sh --signal USR1",
        "-pgpu -k5 -K run.sh -t5",
        "-- run.sh -t5",
    ],
)
def test_options_of_the_users_command_are_not_those_of_slurm(monkeypatch, kind, words):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (spec,) = read_nodes(f"{kind}:1 {words}", grace=10.0)
    assert (spec.lasts, spec.notice) == (math.inf, 40.0)
    (spec,) = read_nodes(f"{kind}:1 --time=10 {words}", grace=10.0)
    assert spec.lasts == 600 - 40 - EARLY_SECONDS


def test_sbatch_is_as_many_nodes_as_its_number_each_with_a_bridge(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # a job of its own all the same
    nodes = read_nodes("sbatch:2 --partition=gpu --time=10 --comment='two words' on_node.sh", grace=12.5)
    assert [spec.name for spec in nodes] == ["sbatch", "sbatch-2"]
    for spec in nodes:
        assert spec.command is not None
        assert spec.command[:2] == (sys.executable, "-c")
        assert "sbatch_bridge import main" in spec.command[2]
        words = ("--signal=B:TERM@43", "--partition=gpu", "--time=10", "--comment=two words", "on_node.sh")
        assert spec.command[3:] == words
        assert (spec.elastic, spec.notice, spec.lasts) == (True, 43.0, 600 - 43 - EARLY_SECONDS)


def test_signal_of_sbatch_must_reach_the_agent():
    (spec,) = read_nodes("sbatch:1 --signal=B:TERM@300")
    assert spec.notice == 300
    assert read_nodes("sbatch:1 --signal=RB:SIGTERM@300")[0].notice == 300
    for wrong in ("TERM@300", "ABRT@300", "B:USR1@300"):
        with pytest.raises(OptionError, match=r"the signal would not reach the agent: give --signal=B:TERM@SECONDS"):
            read_nodes(f"sbatch:1 --signal={wrong}")


def test_job_of_sbatch_runs_the_users_script_with_ours_behind_it(tmp_path):
    directory = RendezvousDirectory(tmp_path / "100%j")
    command = command_of_job(["--gpus=8", "on_node.sh", "x"], directory)
    assert command[:3] == ("sbatch", "--parsable", "--nodes=1")
    assert "--no-requeue" in command
    assert f"--output={tmp_path}/100%%j/output" in command  # Slurm replaces %j
    words = command.index("--gpus=8")
    assert command[words : words + 5] == ("--gpus=8", "on_node.sh", "x", str(directory.script), sys.executable)
    assert command[-4] == str(directory.key_file)
    assert "nodes.agent import main" in command[-1]


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("cannot run sbatch: No such file or directory", "start the sweep where Slurm's commands are installed"),
        ("submitted Slurm job 7 the node could not connect to this machine, at port 1 of a", "let the nodes connect"),
        ("submitted Slurm job 7 the job ended before its agent was there (FAILED)", "see `scontrol show job`"),
        (f"the job ended before its agent was there (FAILED): {sys.executable}: not found", "install the same env"),
        ("submitted Slurm job 7", "`squeue --me` says why it waits"),
        ("sbatch: error: invalid partition", "`sbatch --wrap=true --gpus=1` must succeed without a question"),
    ],
)
def test_problem_of_sbatch_has_a_remedy(said, remedy):
    (spec,) = read_nodes("sbatch:1 --gpus=1")
    assert spec.remedy(1, said).startswith(remedy)


@pytest.mark.parametrize("count", ["0", "129", "-1", "four", "--gpus=8 4"])
def test_number_of_sbatch_nodes_must_be_a_number_in_its_range(count):
    with pytest.raises(OptionError, match=r"no number of nodes from 1 to 128: give sbatch:COUNT, followed by options"):
        read_nodes(f"sbatch:{count}")


def test_ray_is_as_many_nodes_as_its_number_each_with_a_bridge():
    nodes = read_nodes(["ray:2 --gpus=8 --cpus 16 sh 'on node.sh'", "ray:'1 --address=local'"])
    assert [spec.name for spec in nodes] == ["ray", "ray-2", "ray-3"]
    for spec in nodes:
        assert spec.command is not None
        assert spec.command[:2] == (sys.executable, "-c")
        assert "ray_bridge import main" in spec.command[2]
        assert agent_of(spec)[:2] == (sys.executable, "-c")
    assert nodes[0].command is not None
    assert nodes[0].command[3:-3] == ("--gpus=8", "--cpus", "16", "sh", "on node.sh")


def test_new_cluster_of_ray_that_the_environment_asks_for_is_one_node(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert names("ray:1") == ["ray"]
    assert names("ray:2 --address=auto") == ["ray", "ray-2"]
    with pytest.raises(OptionError, match="a new cluster on this machine is one node: give ray:1"):
        read_nodes("ray:2")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Ray is not installed here", "pip install 'gpu-launcher[ray]'"),
        ("cannot connect to a Ray cluster at auto: Could not find any", "run this on a machine of the cluster"),
        ("[... W 1 1] rpc_client.h:153: Failed to connect to GCS at address 10.0.0.1:6379", "run this on a machine"),
        ("the Ray cluster has other versions at auto: Version mismatch", "install the same versions here"),
        ("the Ray cluster has no machine with 9 GPUs and 1 CPU: its machines have at most", "reserve less, or give"),
        ("waits until the Ray cluster has 8 GPUs and 1 CPU free on one machine", "`ray status` says what is in use"),
        ("ModuleNotFoundError: No module named 'gpu_launcher'", "install gpu-launcher "),
        (f"{sys.executable}: No such file or directory", "install the same environment there"),
        ("something else", "`ray status` must succeed without a question"),
    ],
)
def test_problem_of_ray_has_a_remedy(said, remedy):
    (spec,) = read_nodes("ray:1")
    assert spec.remedy(1, said).startswith(remedy)


# Names


def test_nodes_keep_their_order_and_get_different_names():
    nodes = ["ssh:gpu2", "local", "ssh:gpu2", "command:env A=1", "command:/usr/bin/env", "ssh:gpu2"]
    assert names(nodes) == ["gpu2", "local", "gpu2-2", "env", "env-2", "gpu2-3"]


def test_name_with_a_number_is_not_given_twice():
    assert names(["ssh:a", "ssh:a-2", "ssh:a", "ssh:a"]) == ["a", "a-2", "a-3", "a-4"]
    assert names(["ssh:a", "ssh:a", "ssh:a-2"]) == ["a", "a-2", "a-2-2"]


@pytest.mark.parametrize("other", ["ssh:local", "command:/opt/bin/local"])
def test_only_this_machine_is_called_local(other):
    assert names([other, "local"]) == ["local-2", "local"]
    assert names(["local", other]) == ["local", "local-2"]
    assert names([other]) == ["local-2"]


# What is refused


@pytest.mark.parametrize(
    "value",
    [
        "",
        "  ",
        [],
        (),
        {},
        {"ssh": "gpu2"},
        {"local"},
        0,
        2,
        True,
        b"local",
        [None],
        ["local", 2],
        [["local"]],
        "Local",
        "gpu2",
        "local,ssh:gpu2",
        "localhost",
        "ssh",
        "ssh:",
        "ssh: ",
        "SSH:gpu2",
        "slurm",
        "slurm:",
        "sbatch",
        "sbatch:",
        "ray",
        "ray:",
        "command:",
        "command:  ",
        ["local", ""],
    ],
    ids=repr,
)
def test_what_names_no_nodes_is_refused_with_examples(value):
    with pytest.raises(
        OptionError,
        match=r"names no nodes?: give local, ssh:HOST, slurm:COUNT, sbatch:COUNT, ray:COUNT, 'command:COMMAND ...'",
    ) as raised:
        read_nodes(value)
    assert raised.value.option == "nodes"


@pytest.mark.parametrize("host", ["-oProxyCommand=evil", "--", "-", "gpu2 -oProxyCommand=evil", "a\tb", "a\nb"])
def test_option_of_ssh_is_not_a_host(host):
    with pytest.raises(OptionError, match=r"is not the name of a host: give ssh:HOST or ssh:USER@HOST"):
        read_nodes(["local", f"ssh:{host}"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("command:sh -c 'exec", "cannot be split into words: No closing quotation"),
        ("command:env \\", "cannot be split into words: No escaped character"),
        ("slurm:4 --comment='x", "cannot be split into words: No closing quotation"),
        ("command:''", "'' in \"command:''\" is not the name of a program"),
        ("command:/opt/bin/ -x", "'/opt/bin/' in 'command:/opt/bin/ -x' is not the name of a program"),
        ("ray:4 --comment='x", "cannot be split into words: No closing quotation"),
        ("ray:4 --gpu=1", "'--gpu' is not an option of ray: give --gpus=N, --cpus=N, "),
        ("ray:2 --address=local", "a new cluster on this machine is one node: give ray:1"),
        ("command:env \0", "contains a null character"),
        ("ssh:gpu2\0", "contains a null character"),
    ],
    ids=repr,
)
def test_command_that_cannot_be_run_is_refused(text, problem):
    with pytest.raises(OptionError) as raised:
        read_nodes(text)
    assert problem in str(raised.value)
    assert "\0" not in str(raised.value)


@pytest.mark.parametrize(
    "count", ["0", "513", "-1", "1.5", "four", "4gpus", "''", "--partition=gpu 4", "4,8", "9" * 5000]
)
def test_number_of_slurm_nodes_must_be_a_number_in_its_range(count):
    with pytest.raises(OptionError, match=r"has no number of nodes from 1 to 512: give slurm:COUNT"):
        read_nodes(f"slurm:{count}")


@pytest.mark.parametrize("count", ["0", "65", "-1", "four", "--gpus=8 4"])
def test_number_of_ray_nodes_must_be_a_number_in_its_range(count):
    with pytest.raises(OptionError, match=r"has no number of nodes from 1 to 64: give ray:COUNT, followed by options"):
        read_nodes(f"ray:{count}")


@pytest.mark.parametrize("value", [["local", "local"], ["local", "ssh:gpu2", " local "]])
def test_this_machine_cannot_be_two_nodes(value):
    with pytest.raises(OptionError, match="local is named twice: this machine is one node"):
        read_nodes(value)


# Quoting


@pytest.mark.parametrize(
    "directory",
    [
        "a b",
        "it's",
        'say "hi"',
        "$HOME",
        "`date`",
        "a;exit 3",
        "a\\b",
        "a\nb",
        "*",
        "käthe",
        "~",
        "-c",
        "a&b|c>d",
        "!!",
    ],
    ids=repr,
)
def test_shell_on_the_other_side_runs_the_python_with_a_strange_path(tmp_path: Path, monkeypatch, directory):
    python = tmp_path / directory / "python"
    python.parent.mkdir()
    python.write_text(PRINTS_ITS_ARGUMENTS)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    by_ssh, by_command = read_nodes(["ssh:gpu2", "command:env"])
    assert by_ssh.command is not None
    assert by_command.command is not None
    # What sshd does with the words after the host, which ssh joins.
    done = subprocess.run(["sh", "-c", by_ssh.command[-1]], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"<-c><{agent_of(by_ssh)[2]}>"
    done = subprocess.run(by_command.command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"<-c><{agent_of(by_ssh)[2]}>"
