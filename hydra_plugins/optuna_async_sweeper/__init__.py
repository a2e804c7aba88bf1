"""The Hydra sweeper `optuna_async`: Optuna's search, in which no trial waits for another."""
