"""The trial that a job sees, over a real channel, and what the other processes of the job see of it."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import gpu_launcher
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.processes import job_channel, messages, rank_decisions
from gpu_launcher.processes.messages import JobMessage, JobReply
from gpu_launcher.studies import rank_reporters
from gpu_launcher.studies import trial as trial_module
from gpu_launcher.studies.rank_reporters import (
    VERDICT_SECONDS,
    Attribute,
    Intermediate,
    MainReporter,
    NullReporter,
    Verdict,
)
from gpu_launcher.studies.trial import JobTrial, NullTrial, TrialInfo

INFO = TrialInfo(
    number=7,
    study="digits",
    params={"lr": 0.1, "layers": 3, "kind": "a"},
    distributions={
        "lr": FloatDistribution(0.01, 1.0, log=True),
        "layers": IntDistribution(1, 4),
        "kind": CategoricalDistribution(["a", "b"]),
    },
    user_attrs={"owner": "me"},
    datetime_start=None,
    prunes=True,
    directions=(1,),
)


@dataclass
class Sweep:
    """The other end of the job's channel, in this process; the job is this process, too."""

    end: Any
    job: Any
    path: Path

    def begin(self, info: TrialInfo = INFO) -> JobTrial:
        job_channel.begin(self.job, info, self.path)
        return gpu_launcher.current_trial()

    def heard(self) -> list[Any]:
        self.end.setblocking(False)
        found = []
        try:
            while True:
                message, _ = messages.receive(self.end)
                assert isinstance(message, JobMessage)
                found.append(message.what)
        except BlockingIOError:
            return found

    def says(self, step: int, prune: bool) -> None:
        messages.send(self.end, JobReply(Verdict(step, prune)))

    def decisions(self) -> str:
        return self.path.with_suffix(".decisions").read_text()


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    for name in (*rank_decisions.RANK_VARIABLES, *rank_decisions.VARIABLES):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test does
        monkeypatch.delenv(name)
    monkeypatch.setattr(job_channel, "_current", None)
    monkeypatch.setattr(trial_module, "_here", None)
    end, job = messages.channel()
    with end, job:
        yield Sweep(end, job, tmp_path / "7.abc.trial")


# The job's main process


def test_a_report_is_one_message(sweep: Sweep) -> None:
    trial = sweep.begin()
    trial.report(0.5, 3)
    assert sweep.heard() == [Intermediate(3, 0.5)]


def test_it_is_the_trial_that_optuna_knows(sweep: Sweep) -> None:
    trial = sweep.begin()
    assert isinstance(trial, optuna.trial.BaseTrial)
    assert (trial.number, trial.study_name, trial.params, trial.distributions) == (
        7,
        "digits",
        INFO.params,
        INFO.distributions,
    )
    assert gpu_launcher.current_trial() is trial


def test_a_verdict_prunes_and_stays(sweep: Sweep) -> None:
    trial = sweep.begin()
    assert not trial.should_prune(), "nothing has been reported"
    trial.report(1.0, 0)
    sweep.says(0, False)
    assert not trial.should_prune()
    trial.report(2.0, 1)
    sweep.says(1, True)
    assert trial.should_prune()
    trial.report(0.0, 2)
    sweep.says(2, False)
    assert trial.should_prune()
    assert sweep.decisions() == "0011"


def test_a_verdict_that_takes_long_is_heard_by_a_later_call(sweep: Sweep) -> None:
    trial = sweep.begin()
    trial.report(1.0, 0)
    before = time.monotonic()
    assert not trial.should_prune()
    assert time.monotonic() - before >= VERDICT_SECONDS * 0.9
    sweep.says(0, True)
    assert trial.should_prune()


def test_without_a_pruner_nothing_is_waited_for(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_reporters, "VERDICT_SECONDS", 600.0)  # longer than a test may take
    trial = sweep.begin(replace(INFO, prunes=False))
    trial.report(1.0, 0)
    assert not any(trial.should_prune() for _ in range(10))


def test_verdicts_that_nobody_asks_for_do_not_pile_up(sweep: Sweep) -> None:
    trial = sweep.begin()
    for step in range(2000):
        trial.report(0.0, step)
        sweep.heard()
        messages.send(sweep.end, JobReply(Verdict(step, False)), wait=False)


@pytest.mark.parametrize("value", [None, "much", [1.0]])
def test_a_value_that_is_no_number_is_refused_as_optuna_does(sweep: Sweep, value: Any) -> None:
    with pytest.raises(TypeError, match="supposed to be a float"):
        sweep.begin().report(value, 0)
    assert sweep.heard() == []


@pytest.mark.parametrize(
    ("step", "error"), [("first", TypeError), (None, TypeError), (-1, ValueError)], ids=["text", "none", "negative"]
)
def test_a_step_that_is_none_is_refused_as_optuna_does(sweep: Sweep, step: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`step` argument"):
        sweep.begin().report(1.0, step)
    assert sweep.heard() == []


def test_what_can_be_a_number_is_one(sweep: Sweep) -> None:
    trial = sweep.begin()
    trial.report("0.25", 1)  # type: ignore[arg-type]
    trial.report(float("nan"), True)
    first, second = sweep.heard()
    assert first == Intermediate(1, 0.25)
    assert math.isnan(second.value)


def test_parameters_are_settled(sweep: Sweep) -> None:
    trial = sweep.begin()
    assert trial.suggest_float("lr", 0.01, 1.0, log=True) == 0.1
    assert trial.suggest_int("layers", 1, 8) == 3
    assert trial.suggest_categorical("kind", ["a", "b", "c"]) == "a"
    with pytest.raises(ValueError, match=r"'width' is not a parameter of this sweep \(it has lr, layers, kind\)"):
        trial.suggest_int("width", 1, 2)
    with pytest.raises(ValueError, match="'layers' is 3 in this trial, which IntDistribution"):
        trial.suggest_int("layers", 4, 8)


def test_a_name_that_no_database_takes_or_that_is_the_sweeps_own_is_refused_in_the_job(sweep: Sweep) -> None:
    trial = sweep.begin()
    with pytest.raises(ValueError, match="at most 512 characters, got 513"):
        trial.set_user_attr("a" * 513, 1)
    with pytest.raises(ValueError, match="are reserved, got 'gpu_launcher:owner'"):
        trial.set_user_attr("gpu_launcher:owner", {})
    assert trial.user_attrs.keys() == gpu_launcher.current_trial().user_attrs.keys()
    assert "gpu_launcher:owner" not in trial.user_attrs


def test_an_attribute_is_seen_here_and_told(sweep: Sweep) -> None:
    trial = sweep.begin()
    trial.set_user_attr("epochs", 3)
    assert trial.user_attrs == {"owner": "me", "epochs": 3}
    assert sweep.heard() == [Attribute("epochs", "3")]


def test_several_objectives_have_no_reports_as_in_optuna(sweep: Sweep) -> None:
    trial = sweep.begin(replace(INFO, directions=(1, 1)))
    with pytest.raises(NotImplementedError):
        trial.report(1.0, 0)
    with pytest.raises(NotImplementedError):
        trial.should_prune()


def test_threads_may_share_it(sweep: Sweep) -> None:
    trial = sweep.begin()
    sweep.job.setblocking(True)
    heard: list[Any] = []
    wanted = 8 * 50

    def listen() -> None:
        while len(heard) < wanted:
            message, _ = messages.receive(sweep.end)
            heard.append(message.what)
            sweep.says(message.what.step, len(heard) == wanted)

    def train(first: int) -> None:
        for step in range(first, first + 50):
            trial.report(0.0, step)
            trial.should_prune()

    threads = [threading.Thread(target=train, args=(50 * n,)) for n in range(8)]
    threads.append(threading.Thread(target=listen))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.step for one in heard) == list(range(wanted))
    assert trial.should_prune()
    decisions = sweep.decisions()
    assert len(decisions) == wanted + 1
    assert decisions == "".join(sorted(decisions)), "once it is pruned, it stays so"


def test_a_copy_is_the_trial_itself(sweep: Sweep) -> None:
    trial = sweep.begin()
    assert copy.deepcopy({"callback": [trial]})["callback"][0] is trial
    assert copy.copy(trial) is trial
    assert pickle.loads(pickle.dumps(trial)) is trial


def test_a_sweep_that_has_ended_is_not_waited_for(sweep: Sweep) -> None:
    trial = sweep.begin()
    sweep.end.close()
    trial.report(1.0, 0)
    trial.set_user_attr("a", 1)
    assert not trial.should_prune()


def test_a_job_that_starts_again_begins_with_no_decisions(sweep: Sweep) -> None:
    trial = sweep.begin()
    trial.report(0.0, 0)
    trial.should_prune()
    assert sweep.decisions() == "0"
    sweep.begin()
    assert not sweep.path.with_suffix(".decisions").exists()
    assert os.environ[rank_decisions.SO_FAR] == "0"


def test_what_is_withdrawn_is_gone_and_leads_nobody(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.begin().should_prune()
    rank_decisions.withdraw(sweep.path)
    assert list(sweep.path.parent.iterdir()) == []
    monkeypatch.setattr(job_channel, "_current", None)
    monkeypatch.setattr(trial_module, "_here", None)
    monkeypatch.setenv("RANK", "1")
    assert isinstance(gpu_launcher.current_trial(), NullTrial)


# No job at all


def test_outside_a_sweep_nothing_happens(sweep: Sweep) -> None:
    trial = gpu_launcher.current_trial()
    trial.report(1.0, 0)
    trial.set_user_attr("a", 1)
    assert not trial.should_prune()
    assert trial.params == {}
    assert isinstance(copy.deepcopy(trial), NullTrial)
    gpu_launcher.report(1.0, 0)


def test_outside_a_sweep_reporting_imports_no_optuna() -> None:
    code = "import gpu_launcher, sys; gpu_launcher.report(1.0, 0); print('optuna' in sys.modules)"
    environ = {name: value for name, value in os.environ.items() if name != rank_decisions.WHERE}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert (ran.stdout, ran.stderr) == ("False\n", "")


# Which rank a process is


@pytest.mark.parametrize(
    ("environ", "inherited", "later"),
    [
        ({}, {}, None),
        ({"RANK": "0"}, {}, False),
        ({"RANK": "1"}, {}, True),
        ({"LOCAL_RANK": "0"}, {}, False),  # Lightning's, whose NODE_RANK may be missing
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, {}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, {}, True),
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, {}, True),
        ({"OMPI_COMM_WORLD_RANK": "3"}, {}, True),
        ({"SLURM_PROCID": "2"}, {"SLURM_PROCID": "2"}, None),  # the sweep itself is a task of Slurm's
        ({"SLURM_PROCID": "2", "LOCAL_RANK": "0"}, {"SLURM_PROCID": "2"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, {"SLURM_PROCID": "0"}, True),
        ({"RANK": "0", "LOCAL_RANK": "1"}, {"RANK": "0"}, True),
    ],
)
def test_ranks_are_told_by_the_environment(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], inherited: dict[str, str], later: Any
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert rank_decisions.is_later_rank(inherited) is later


def test_the_process_with_the_channel_is_the_first_rank_whatever_the_environment_says(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    trial = sweep.begin()
    assert isinstance(trial._reporter, MainReporter)


# The job's other processes: real ones

OTHER = """
import json, os, sys, time
import optuna
import gpu_launcher
trial = gpu_launcher.current_trial()
trial.report(None, "nothing")
trial.set_user_attr("rank", 1)
print(json.dumps([trial.number, trial.params["lr"], trial.user_attrs]), flush=True)
while not trial.should_prune():
    print(0, flush=True)
print(1, flush=True)
raise optuna.TrialPruned("as the first rank does")
"""


def started_anew(code: str = OTHER, **environ: str) -> subprocess.Popen[str]:
    """The program started again, as Lightning does for its ranks."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_later_ranks_get_what_the_same_call_of_the_first_rank_returned(sweep: Sweep) -> None:
    trial = sweep.begin()
    with started_anew(RANK="1") as one, started_anew(LOCAL_RANK="2") as two:
        others = (one, two)
        for process in others:
            assert json.loads(line(process)) == [7, 0.1, {"owner": "me"}]
        for step, prune in enumerate([False, False, True]):
            trial.report(0.0, step)
            sweep.says(step, prune)
            assert trial.should_prune() is prune
            assert [line(process) for process in others] == [str(int(prune))] * 2
        for process in others:
            assert "TrialPruned: as the first rank does" in process.communicate(timeout=500)[1]
            assert process.returncode == 0, "Lightning kills the first rank where another one fails"
    assert {type(one) for one in sweep.heard()} == {Intermediate}, "only the first rank speaks"


def test_a_rank_that_waits_for_the_first_one_uses_no_cpu_to_speak_of(sweep: Sweep) -> None:
    sweep.begin()
    with started_anew(RANK="1") as process:
        line(process)
        before = sum(psutil.Process(process.pid).cpu_times()[:2])
        time.sleep(1)
        used = sum(psutil.Process(process.pid).cpu_times()[:2]) - before
        process.kill()
    assert used < 0.2


def test_a_rank_leaves_when_the_job_is_over(sweep: Sweep) -> None:
    sweep.begin()
    with started_anew(RANK="1") as process:
        line(process)
        rank_decisions.withdraw(sweep.path)
        assert line(process) == "1"
        process.communicate(timeout=500)


def test_another_process_of_the_job_is_left_alone(sweep: Sweep) -> None:
    trial = sweep.begin()
    code = "import gpu_launcher as g; t = g.current_trial(); t.report(1, 2); print(t.number, t.should_prune())"
    with started_anew(code) as process:
        assert process.communicate(timeout=500)[0] == "7 False\n"
    assert sweep.heard() == []
    trial.report(0.0, 0)
    sweep.says(0, True)
    assert trial.should_prune()
    assert sweep.decisions() == "1"


def test_where_the_first_rank_is_not_the_jobs_process_no_rank_is_pruned_and_it_says_why(sweep: Sweep) -> None:
    sweep.begin()
    code = "import gpu_launcher\nfor step in range(3): gpu_launcher.report(1.0, step)\nprint('done')"
    with started_anew(code, RANK="1", LOCAL_RANK="1") as later, started_anew(code, RANK="0", LOCAL_RANK="0") as first:
        assert later.communicate(timeout=500) == ("done\n", "")
        out, err = first.communicate(timeout=500)
    assert out == "done\n"
    assert err.count("reports of this process are ignored") == 1
    assert sweep.decisions() == "000"
    assert sweep.heard() == []


JOB = """
import multiprocessing, os, sys
from pathlib import Path
import gpu_launcher
from gpu_launcher.processes import job_channel, messages
from gpu_launcher.processes.messages import JobReply
from gpu_launcher.studies.trial import TrialInfo
from gpu_launcher.studies.rank_reporters import Verdict

def later_rank(start):
    if start != "at_once":
        os.environ["RANK"] = "1"
    trial = gpu_launcher.current_trial() if start != "fork" else before
    trial.report(0.0, 5)
    print(trial.number, *[trial.should_prune() for _ in range(2)], flush=True)

if __name__ == "__main__":
    end, job = messages.channel()
    job_channel.begin(job, TrialInfo(7, "s", {}, {}, {}, None, prunes=True, directions=(1,)), Path(sys.argv[1]))
    before = gpu_launcher.current_trial()
    for step in range(3):  # before there are other ranks
        before.report(0.0, step)
        messages.send(end, JobReply(Verdict(step, False)))
        before.should_prune()
    how = sys.argv[2]
    if how == "os.fork":
        if (child := os.fork()) == 0:
            later_rank("fork")
            os._exit(0)
    else:
        context = multiprocessing.get_context(how)
        process = context.Process(target=later_rank, args=(how,))
        process.start()
    for step in (3, 4):
        before.report(0.0, step)
        messages.send(end, JobReply(Verdict(step, step == 4)))
        assert before.should_prune() is (step == 4)
    if how == "os.fork":
        assert os.waitpid(child, 0)[1] == 0
    else:
        process.join()
        assert process.exitcode == 0
    heard = []
    end.setblocking(False)
    try:
        while True:
            heard.append(messages.receive(end)[0].what.step)
    except BlockingIOError:
        print(heard)
"""


@pytest.mark.parametrize("how", ["os.fork", "fork", "spawn"])
def test_a_rank_that_is_forked_or_spawned_in_the_middle_follows_from_there(tmp_path: Path, how: str) -> None:
    program = tmp_path / "job.py"
    program.write_text(JOB)
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in (*rank_decisions.RANK_VARIABLES, rank_decisions.WHERE)
    }
    ran = subprocess.run(
        [sys.executable, program, tmp_path / "7.trial", how], capture_output=True, text=True, timeout=500, env=environ
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["7 False True", "[0, 1, 2, 3, 4]"]


def test_a_forked_process_that_is_no_rank_is_left_alone(tmp_path: Path) -> None:
    program = tmp_path / "job.py"
    program.write_text(JOB.replace('os.environ["RANK"] = "1"', "pass"))
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in (*rank_decisions.RANK_VARIABLES, rank_decisions.WHERE)
    }
    ran = subprocess.run(
        [sys.executable, program, tmp_path / "7.trial", "os.fork"],
        capture_output=True,
        text=True,
        timeout=500,
        env=environ,
    )
    assert ran.stdout.splitlines() == ["7 False False", "[0, 1, 2, 3, 4]"]


def test_who_is_left_alone_has_a_voice_that_says_nothing() -> None:
    trial = JobTrial(INFO, NullReporter())
    trial.report(1.0, 0)
    assert not trial.should_prune()


def test_what_a_killed_launch_left_of_its_trials_is_removed_by_the_next(tmp_path: Path) -> None:
    dead, living = Recorder(tmp_path, [], "train.py"), Recorder(tmp_path, [], "train.py")
    left = [rank_decisions.path_for(recorder.report_path(3)) for recorder in (dead, living)]
    for path in left:
        path.touch()
        path.with_suffix(".decisions").touch()
    identity = json.loads(dead._file.read_text())
    dead._file.write_text(json.dumps({**identity, "pid": 2**22}))
    Recorder(tmp_path, [], "train.py")
    assert [path.exists() for path in left] == [False, True]
    assert [path.with_suffix(".decisions").exists() for path in left] == [False, True]
