"""The Hydra sweeper `optuna_async`: an Optuna search in which no trial waits for another."""
