"""A trial that reports at each step and does nothing else, and measures how long each call takes it."""

import json
import os
import time
from pathlib import Path

import hydra
import optuna
from omegaconf import DictConfig

import gpu_launcher


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> float:
    trial = gpu_launcher.current_trial()
    began, value, pruned = time.monotonic(), cfg.x, False
    report, ask, lag, late = [], [], [], 0
    due = began
    for step in range(cfg.steps):
        # At whole intervals from the beginning, so that what a call takes does not slow the reports down.
        due += cfg.interval
        time.sleep(max(0.0, due - time.monotonic()))
        value = cfg.x + 1.0 / (step + 1)
        before = time.perf_counter_ns()
        trial.report(value, step)
        between = time.perf_counter_ns()
        pruned = trial.should_prune()
        after = time.perf_counter_ns()
        report.append(between - before)
        ask.append(after - between)
        # Private names: the step that the latest verdict is about, and hearing of one, where `should_prune` gave up.
        reporter = trial._reporter
        late += reporter._judged != step
        while reporter._judged != step and (patience := due + cfg.interval / 2 - time.monotonic()) > 0:
            reporter._listen(patience)
        if reporter._judged == step:
            lag.append(time.perf_counter_ns() - before)
        if pruned:
            break
    record = {"began": began, "ended": time.monotonic(), "pruned": pruned}
    record |= {"report_ns": report, "should_prune_ns": ask, "verdict_ns": lag, "late": late}
    (Path(os.environ["BENCH_PLACE"]) / f"{trial.number}.json").write_text(json.dumps(record))
    if pruned:
        raise optuna.TrialPruned
    return float(value)


if __name__ == "__main__":
    main()
