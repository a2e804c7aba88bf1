"""The command `gpu-launcher`: runs commands on the pool, and shows its state and its problems."""
