"""The command `gpu-launcher`: what the pool is doing, and what is wrong with the machine."""
