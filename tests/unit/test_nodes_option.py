"""The option `nodes`: what it accepts, the error for anything else, and the command line of each node."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from gpu_launcher.errors import OptionError
from gpu_launcher.nodes.engines import NodeSpec, read_nodes

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
    page = (Path(__file__).parents[2] / "docs" / "nodes.md").read_text()
    lines = re.findall(r"^(?:python train\.py|gpu-launcher doctor|gpu-launcher map) .*", page, flags=re.MULTILINE)
    assert len(lines) >= 6
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
    assert all(kind in "".join(lines) for kind in ("local", "ssh:", "slurm:", "command:"))


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
    (spec,) = read_nodes("slurm:1", grace=1e9)
    assert spec.command is not None
    assert "--signal=TERM@65535" in spec.command


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
        "command:",
        "command:  ",
        ["local", ""],
    ],
    ids=repr,
)
def test_what_names_no_nodes_is_refused_with_examples(value):
    with pytest.raises(
        OptionError, match=r"names no nodes?: give local, ssh:HOST, slurm:COUNT, 'command:COMMAND ...'"
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
