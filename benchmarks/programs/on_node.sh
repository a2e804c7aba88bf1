# Give each node of this machine a pool of its own, and run the agent: `env NODE=a sh on_node.sh AGENT ...`, or by Slurm.
export GPU_LAUNCHER_POOL_DIR="$GPU_LAUNCHER_POOL_DIR-${NODE:-$SLURMD_NODENAME}"
exec "$@"
