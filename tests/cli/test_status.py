"""Tests `gpu-launcher status` on terminals, in pipes and as JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import pytest

from gpu_launcher.cli.status import status
from gpu_launcher.cli.top import top
from gpu_launcher.users import user_name
from hydra_plugins.gpu_pool_launcher.config import GpuPoolLauncherConf

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Cli, Lab, Terminal  # type: ignore[import-not-found]

GIB = 2**30
ME = user_name(os.geteuid())
REPOSITORY = Path(__file__).parents[2]
DOCUMENT = (REPOSITORY / "docs" / "status.md").read_text()


def rows(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if line.startswith(start)]


def test_without_a_gpu_and_before_any_sweep_it_says_so_and_makes_nothing(cli: Cli) -> None:
    lines = cli.lines("status")
    assert lines[0].startswith(f"pool {cli.pool} (not there yet: nothing is leased): ")
    assert "no NVIDIA driver found" in lines[1]
    assert rows(lines, "CPU slot")[0].endswith("free")
    assert lines[-1] == "the queue is empty"
    assert not cli.pool.exists()


@pytest.mark.smoke
def test_what_another_program_holds_is_shown_with_user_pid_and_command(cli: Cli) -> None:
    holder = cli.hold(["simulated@3", 1, None, 0, "train.py #7 lr=0.1"])
    (line,) = rows(cli.lines("status"), "simulated GPU 3")
    assert re.fullmatch(
        rf"simulated GPU 3  Simulated GPU  80 GiB +-  1 +{ME}  +{holder.pid}  \d+ s +-  train\.py #7 lr=0\.1", line
    )


def test_what_is_released_is_shown_no_more(cli: Cli) -> None:
    holder = cli.hold(["simulated@3", 1, None, 0, "train.py"])
    holder.communicate()
    assert rows(cli.lines("status"), "simulated") == []


def test_every_share_of_a_device_has_a_line_of_its_own_that_says_everything(cli: Cli) -> None:
    cli.hold(
        ["simulated:1", 0.5, None, 0, "half.py"],
        ["simulated:1", None, 20 * GIB, 0, "some.py", {"timeout": 7199}],
    )
    half, some = rows(cli.lines("status"), "simulated GPU 0")
    assert "  0.5  " in half
    assert half.endswith("half.py")
    assert f"  0.25, 20 GiB  {ME}" in some
    assert re.search(r"  1h \d\dm  some\.py$", some)


def test_the_queue_is_in_order_with_the_reason_why_each_ticket_waits(cli: Cli) -> None:
    cli.hold(["simulated:2", 2, None, 0, "train.py #0"])
    cli.hold(
        ["simulated:2", 2, None, 0, "both.py"],
        ["simulated:2", 0.5, None, 5, "urgent.py"],
        ["simulated:1", 1, 20 * GIB, 9, "most urgent.py"],
    )
    both = "simulated GPU 0, simulated GPU 1"
    assert [re.split(" {2,}", line) for line in cli.lines("status") if line.startswith("#")] == [
        ["#1", "9", "1 device, 20 GiB", ME, ANY, ANY, "most urgent.py", ANY],
        [
            "#2",
            "5",
            "0.5 of one",
            ME,
            ANY,
            ANY,
            "urgent.py",
            f"waits for 1 more of {both}; behind {ME} #1; held by {ME}",
        ],
        [
            "#3",
            "0",
            "2 devices",
            ME,
            ANY,
            ANY,
            "both.py",
            f"waits for 2 more of {both}; behind {ME} #1, {ME} #2; held by {ME}",
        ],
    ]


def test_a_stranger_on_a_device_is_named(lab: Lab) -> None:
    (line,) = rows(lab.cli.lines("status"), "GPU 2")
    assert re.search(rf"  busy: it is used by jupyter 600 \(pid {lab.stranger}, \w+, 12 GiB\)$", line)


def test_a_stranger_beside_a_whole_lease_is_named_too(lab: Lab) -> None:
    lab.machine.now(f"0.compute {lab.stranger}:{GIB}")
    held, stranger = rows(lab.cli.lines("status"), "GPU 0")
    assert ME in held
    assert "also used from outside the pool by jupyter 600" in stranger


def test_who_is_busy_is_judged_by_the_memory_that_is_given(lab: Lab) -> None:
    lab.machine.now(f"3.memory_used {GIB}")

    def state(*arguments: str) -> list[str]:
        return [device["state"] for device in lab.cli.json("status", *arguments)["devices"][2:]]

    assert state() == state("--busy-memory", "1023MiB") == ["busy", "busy"]
    assert state("--busy-memory", "1GiB") == ["busy", "free"], "whoever is seen to compute is busy all the same"
    assert state("--busy-memory", "null") == ["free", "free"]


def test_without_another_memory_it_is_that_of_a_sweep() -> None:
    defaults = [{option.name: option.default for option in command.params}["busy_memory"] for command in (status, top)]
    assert defaults == [GpuPoolLauncherConf().busy_memory] * 2


def test_a_device_that_is_set_aside_is_shown_with_the_reason(lab: Lab) -> None:
    lab.machine.now("3.compute_mode 2", "2.*.error 15")
    lines = lab.cli.lines("status")
    assert "set aside: it is set to compute mode PROHIBITED: `nvidia-smi -i 3 -c DEFAULT`" in rows(lines, "GPU 3")[0]
    assert "set aside: it does not answer" in rows(lines, "GPU 2")[0]


def test_a_lease_on_a_gpu_that_is_lost_meanwhile_stays_in_sight(lab: Lab) -> None:
    lab.machine.now("0.name.error 15")
    held, aside = rows(lab.cli.lines("status"), "GPU 0")
    assert ME in held
    assert "set aside" in aside


def test_a_driver_that_fails_hides_neither_leases_nor_its_failure(lab: Lab) -> None:
    lab.machine.now("init.error 18")
    lines = lab.cli.lines("status")
    assert any(line.startswith("note: the machine's GPUs cannot be read: ") for line in lines)
    assert [line for line in lines if "train.py #0" in line]


def test_a_mask_restricts_what_is_shown_to_it_and_to_what_is_held(lab: Lab) -> None:
    lines = lab.cli.lines("status", CUDA_VISIBLE_DEVICES="3")
    assert any("CUDA_VISIBLE_DEVICES='3' hides 3 devices here" in line for line in lines)
    assert rows(lines, "GPU 0")
    (line,) = rows(lines, "GPU 3")
    assert line.endswith("free")


def test_named_devices_are_shown_alone_and_others_that_are_held_counted(lab: Lab) -> None:
    lines = lab.cli.lines("status", "--devices", "3,2")
    assert [line.split("  ")[0] for line in lines if line.startswith("GPU")] == ["GPU 3", "GPU 2"]
    assert any(line.startswith("note: 2 more devices are held in this pool: GPU 0, GPU 1") for line in lines)


def test_an_older_driver_and_one_without_process_lists_do(cli: Cli, older_machine: Any, old_machine: Any) -> None:
    for machine in (older_machine, old_machine):
        machine.has("count 1", *machine.gpu(0, "GPU-a", f"memory_used {3 * GIB}"))
        (line,) = rows(cli.lines("status", **machine.environment()), "GPU 0")
        assert line.startswith("GPU 0   NVIDIA Double  3.0/24 GiB     -  busy: it has 3 GiB in use by processes that")


def test_in_a_pipe_there_are_no_colours_whatever_the_environment_says(lab: Lab) -> None:
    for environ in ({}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "40"}):
        assert "\x1b" not in lab.cli("status", **environ).stdout
        assert max(map(len, lab.cli("status", **environ).stdout.splitlines())) > 100


def test_a_terminal_gets_lines_that_fit_and_colours_unless_it_wants_none(
    lab: Lab, terminal: Callable[..., Terminal]
) -> None:
    coloured = terminal("status", size=(80, 24))
    assert coloured.wait() == 0
    assert "\x1b[33mbusy" in coloured.text
    shown = re.sub(r"\x1b\[[0-9;]*m", "", coloured.text).splitlines()
    assert max(map(len, shown)) <= 80
    bare = terminal("status", NO_COLOR="1")
    assert bare.wait() == 0
    assert "\x1b[33m" not in bare.text


def test_what_others_wrote_cannot_break_the_table(cli: Cli) -> None:
    cli.hold(["simulated:1", 1, None, 0, "evil\x1b[2J\n#9 fake\x07"])
    (line,) = rows(cli.lines("status"), "simulated GPU 0")
    assert line.endswith("evil #9 fake")


def test_a_lease_that_cannot_be_read_holds_everything_and_says_so(cli: Cli) -> None:
    cli.hold(["simulated:1", 1, None, 0, "newer.py"])
    for name in (cli.pool / "queue").glob("[lt][ew]*-*"):
        name.write_text('{"format": 99}')
    lines = cli.lines("status", "--devices", "simulated:2")
    assert any(line.startswith("note: a lease in the pool cannot be read") for line in lines)
    assert [line for line in lines if line.endswith("held by a lease that cannot be read")] == lines[4:6]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--devices", "simulated:0"), 2, "gpu-launcher: --devices: 'simulated:0' needs a number from 1 to 4096"),
        (("--devices", "7"), 2, "gpu-launcher: --devices: there is no GPU to choose"),
        (("--busy-memory", "much"), 2, "gpu-launcher: --busy-memory: 'much' is not an amount of memory"),
        (("--pool-dir", ""), 1, "gpu-launcher: pool directory '': the name is empty"),
        (("--pool-dir", "/dev/null"), 1, "gpu-launcher: pool directory /dev/null: is not a directory"),
        (("--nonsense",), 2, "No such option"),
    ],
)
def test_bad_input_is_named_on_stderr(cli: Cli, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = cli("status", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_had_enough_is_no_error(cli: Cli) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m gpu_launcher.cli status | true"],
        env=cli.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def keys_of(value: Any, path: str = "") -> set[str]:
    """All paths to a value, such as `devices[].memory.total`."""
    if isinstance(value, dict):
        return {inner for key, one in value.items() for inner in {f"{path}.{key}", *keys_of(one, f"{path}.{key}")}}
    if isinstance(value, list):
        return {inner for one in value for inner in keys_of(one, f"{path}[]")}
    return set()


def test_the_json_has_the_keys_that_the_document_has(lab: Lab) -> None:
    (example,) = [json.loads(block) for block in re.findall(r"```json\n(\{\n  \"schema\".*?)```", DOCUMENT, re.DOTALL)][
        :1
    ]
    survey = lab.cli.json("status")
    assert keys_of(survey) == keys_of(example)
    assert survey["schema"] == example["schema"] == 1


def test_every_key_of_the_json_is_explained(lab: Lab) -> None:
    explained = set(re.findall(r"^\| `([^`]+)` \|", DOCUMENT, re.MULTILINE))
    paths = {path.removeprefix(".").replace("[]", "") for path in keys_of(lab.cli.json("status"))}
    assert paths - {"pool", "devices.memory", "queue.request"} <= explained


@pytest.mark.smoke
def test_the_json_says_what_the_table_says(lab: Lab) -> None:
    survey = lab.cli.json("status")
    assert [(one["label"], one["state"]) for one in survey["devices"]] == [
        ("GPU 0", "held"),
        ("GPU 1", "partly held"),
        ("GPU 2", "busy"),
        ("GPU 3", "free"),
    ]
    assert survey["devices"][0]["memory"] == {"total": 80 * GIB, "used": int(61.3 * GIB)}
    assert survey["devices"][0]["utilisation"] == 0.97
    (process,) = survey["devices"][2]["processes"]
    assert (process["pid"], process["foreign"], process["memory"]) == (lab.stranger, True, 12 * GIB)
    leases = {lease["id"]: lease for lease in survey["leases"]}
    half, quarter = (leases[id] for id in survey["devices"][1]["leases"])
    assert half["shares"][0]["fraction"] == 0.5
    assert (quarter["user"], quarter["shares"][0]["memory"]) == (ME, 20 * GIB)
    assert 7100 < quarter["seconds_left"] <= 7200
    assert [(ticket["position"], ticket["user"], ticket["request"]["devices"]) for ticket in survey["queue"]] == [
        (1, ME, 4),
        (2, ME, 1),
    ]
    assert survey["queue"][1]["reason"].startswith("waits for 1 more of GPU 0, GPU 1; ")


def test_the_document_shows_what_a_terminal_shows(lab: Lab, terminal: Callable[..., Terminal]) -> None:
    (documented,) = re.findall(r"```text\n(pool .*?)```", DOCUMENT, re.DOTALL)
    seen = terminal("status", size=(80, 24))
    assert seen.wait() == 0
    # The path of the test's directory does not fit on the line with the facts.
    where, facts, *rest = re.sub(r"\x1b\[[0-9;]*m", "", seen.text).splitlines()
    assert where == f"pool {lab.cli.pool}"
    assert alike("\n".join([f"pool /var/tmp/gpu-launcher: {facts}", *rest])) == alike(documented)


def alike(text: str) -> list[str]:
    """The lines without anything that differs between runs: times, process ids, users, and column widths."""
    text = re.sub(rf"\b(?:anna|bert|carla|dora|{ME})\b", "USER", text).replace("USER, USER", "USER")
    text = re.sub(r"\b\d+ s\b|\b\d+m \d+s\b|\b\d+h \d+m\b", "TIME", text)
    text = re.sub(r"(?<=pid )\d+, \w+", "PID, USER", text)
    text = re.sub(r"(?<= )\d{2,7}(?= +TIME)", "PID", text)
    return [" ".join(line.split()) for line in text.splitlines()]
