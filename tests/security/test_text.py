"""Text from elsewhere that is shown, and secrets in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.boot import Origin
from gpu_launcher.cli.checks.finding import problem
from gpu_launcher.cli.doctor import _to_json as doctor_json
from gpu_launcher.cli.printing import to_text
from gpu_launcher.cli.table import plain
from gpu_launcher.jobs.job import Job
from gpu_launcher.leases.file_format import LeaseRecord, decode
from gpu_launcher.leases.kernel import Process
from gpu_launcher.model import WHOLE
from gpu_launcher.processes.linux import command_lines
from gpu_launcher.redaction import redact
from gpu_launcher.text import MAX_SHOWN, one_line
from gpu_launcher.users import this_process

CLEAR = "\x1b[2J"
TITLE = "\x1b]0;mine\x07"
REVERSED = "\u202egnp.exe"


def is_safe(text: str) -> bool:
    """Whether a terminal prints it from left to right and does nothing else."""
    directional = {"RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI"}
    return not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in directional
        for character in text
    )


@given(
    st.lists(
        st.text() | st.sampled_from([CLEAR, TITLE, REVERSED, "\x9b2J", "\x1b", "\r\n", "\x1bP", "\x1b\\", "\udcff"])
    ).map("".join)
)
def test_one_line_has_nothing_that_acts_on_a_terminal(text: str) -> None:
    shown = one_line(text)
    assert is_safe(shown)
    assert one_line(shown) == shown


@pytest.mark.parametrize("text", ["x" * 10**7, "\x1b[1m" * 10**6, "\x1b]" + "x" * 10**6, "password=" * 10**6])
def test_one_line_is_bounded(text: str) -> None:
    assert len(one_line(text)) <= MAX_SHOWN
    assert len(one_line(text, 20)) <= 20


def test_lines_of_tables_are_safe_whatever_is_in_them() -> None:
    line = [(f"a{CLEAR}", "bold"), (f"b{TITLE}\n{REVERSED}", "")]
    assert is_safe(plain(line))
    assert is_safe(to_text(line).plain)


def test_commands_of_other_processes_are_safe_and_hide_secrets() -> None:
    words = ["sh", "-c", "echo; read line", f"x{CLEAR}{TITLE}{REVERSED}\ny", "--password", "hunter2"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has a command line by now
        shown = [Process.of(process.pid).command or "", *command_lines([process.pid])]
    assert all(is_safe(text) and "hunter2" not in text for text in shown)
    assert all("read line" in text for text in shown)


def test_label_and_owner_of_a_job_are_one_safe_line() -> None:
    assert Job(0, f"lr=1\n[gpu_pool] {CLEAR}done", None).label == "lr=1 [gpu_pool] done"
    owner = this_process(f"train.py{CLEAR} " + "x" * 10**6)
    assert is_safe(owner.command)
    assert len(owner.command) <= 1000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("train.py db.password=hunter2 lr=0.1", "train.py db.password=*** lr=0.1"),
        ("+db.pwd=x ++a.secret=y", "+db.pwd=*** ++a.secret=***"),
        ("--password hunter2 run", "--password *** run"),
        ("--verbose --password hunter2", "--verbose --password ***"),
        ("--api-key=abc --lr 0.1", "--api-key=*** --lr 0.1"),
        ("PGPASSWORD=abc psql dbpasswd=abc", "PGPASSWORD=*** psql dbpasswd=***"),
        ("AWS_SECRET_ACCESS_KEY=abc HF_TOKEN=g9 python", "AWS_SECRET_ACCESS_KEY=*** HF_TOKEN=*** python"),
        ("wandbApiKey=xyz", "wandbApiKey=***"),
        ("db.password='a b c' next=1", "db.password=*** next=1"),
        ("{'password': 'a b', 'lr': 1}", "{'password': ***, 'lr': 1}"),
        ('{"api_key": "a\\"b", "x": 2}', '{"api_key": ***, "x": 2}'),
        ("db={user: u, password: p}", "db={user: u, password: ***}"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("curl -H 'Authorization: Basic dXNlcjpwYXNz'", "curl -H 'Authorization: Basic ***'"),
        ("postgresql://u:p@host/db", "postgresql://u:***@host/db"),
        ("postgresql+psycopg2://u:p/w@x@host/db", "postgresql+psycopg2://u:***@host/db"),
        ("redis://:pw@host:1/0", "redis://:***@host:1/0"),
        ("mysql://u@host/db?ssl=1&password=hush", "mysql://u@host/db?ssl=1&password=***"),
        ("postgresql://h/db?user=u&password=hush&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("--token abcdefghijklmnopqrstuv", "--token ***"),
        ("login hf_abcdefghijklmnopqrst", "login ***"),
        ("sk-abcdefghijklmnop1234", "***"),
    ],
)  # fmt: skip
def test_secret_is_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown
    assert one_line(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "pad_token=0 max_tokens=512 tokenizer=bert num_tokens=3 vocab.eos_token=<|endoftext|> cls_token=true",
        "password_length=8 use_password=true passwords=5 compass=5 bypass=true n_pass=2 passes=1",
        "key=5 keys=1 sort_key=name id=5 session_id=7",
        "the secret of success is a password manager",
        "sqlite:///study.db http://host:8080/path git@github.com:user/project",
        "path=/data/secret/x.bin lr=1e-3 optimizer.betas=[0.9,0.999]",
        "--passes 5 -p 5 --author me",
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert redact(text) == text


@given(
    st.sampled_from(["password", "db.pwd", "API_KEY", "my-secret", "clientSecret", "x.auth_key"]),
    st.sampled_from(["{}={}", "--{}={}", "--{} {}", "'{}': '{}'", "{}: {}"]),
    st.from_regex(r"[A-Za-z][A-Za-z0-9!#$%*+./:<>?@^_~|-]{7,30}", fullmatch=True),
    st.text(alphabet="abcxyz= -.,", max_size=20),
)
def test_value_of_a_secret_name_never_shows(name: str, form: str, value: str, around: str) -> None:
    assert value not in redact(f"{around} {form.format(name, value)} {around}").replace(around, "")


def test_secrets_are_not_in_the_pool_nor_on_the_screen(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    environ = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(pool), "PYTHONPATH": str(Path(__file__).parents[2])}
    cli = [sys.executable, "-m", "gpu_launcher.cli"]
    look = f"cat {pool}/queue/lease-*; {sys.executable} -m gpu_launcher.cli status --devices simulated:1; echo done"
    command = [
        *cli,
        "run",
        "--devices",
        "simulated:1",
        "--",
        "sh",
        "-c",
        look,
        "--db-password=hunter2",
        "x://u:hunter3@h",
    ]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "hunter" not in ran.stderr
    assert ran.stdout.count("--db-password=***") == 2
    assert ran.stdout.endswith("done\n")
    assert "hunter" not in ran.stdout


def test_text_of_a_lease_and_of_findings_is_safe() -> None:
    record = LeaseRecord(
        {"GPU-1": WHOLE}, 1.0, None, 7, f"a{CLEAR}\nb password=hush", 2.0, Origin("boot", f"host{TITLE}")
    )
    read = decode(f"lease-{'0' * 32}", record.encode("0" * 32))
    assert isinstance(read, LeaseRecord)
    assert (read.command, read.origin.machine) == ("a b password=***", "host")
    shown = json.dumps(doctor_json([problem("program", f"x{CLEAR} storage=postgresql://u:hush@h/db", "rm\x1b[1m")]))
    assert "hush" not in shown
    assert "\\u001b" not in shown
