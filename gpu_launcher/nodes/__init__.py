"""Nodes on other machines: agents that Slurm, SSH or another command starts, and the jobs that they share."""
