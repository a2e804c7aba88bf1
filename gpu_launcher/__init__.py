"""Run many experiments on the GPUs one has. The public names, nothing else."""
