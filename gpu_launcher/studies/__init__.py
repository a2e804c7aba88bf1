"""Optuna's part: where a study is kept."""
