"""Optuna studies: their storage, searches that run in jobs, and what a job sees of its trial."""
