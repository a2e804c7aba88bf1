"""Work on leased GPUs: here and now, in a subprocess, and in many asyncio tasks at once.

Runs as it is, also without a GPU (then on CPU slots), and beside whatever else uses the machine's pool.
"""

import argparse
import asyncio
import subprocess
import sys

import gpu_launcher

SHOW = "import os; print('a subprocess sees CUDA_VISIBLE_DEVICES=' + repr(os.environ['CUDA_VISIBLE_DEVICES']))"


def in_this_process(pool):
    """Before anything here initialises CUDA, as `torch.cuda` does when it is first used."""
    with pool.lease(gpus=1, timeout="10m") as lease:
        lease.apply()
        print("this process has", ", ".join(device.label for device in lease.devices))


def in_a_subprocess(pool):
    with pool.lease(gpus=1) as lease:
        # With pass_fds the devices stay taken until the child ends, whatever becomes of this process.
        subprocess.run([sys.executable, "-c", SHOW], env=lease.environment(), pass_fds=lease.pass_fds, check=True)


async def evaluate(pool, number):
    async with pool.alease(gpus=1) as lease:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", f"print({number} ** 2)"],
            env=lease.environment(),
            pass_fds=lease.pass_fds,
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await process.communicate()
        return int(printed)


async def evaluate_all(pool, numbers):
    """All ask at once; as many run as there are devices."""
    return await asyncio.gather(*(evaluate(pool, number) for number in numbers))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="auto", help="auto, 0,1, cpu:4 or simulated:4")
    arguments = parser.parse_args()
    with gpu_launcher.Pool(arguments.devices) as pool:
        in_this_process(pool)
        in_a_subprocess(pool)
        print("squares:", asyncio.run(evaluate_all(pool, range(8))))


if __name__ == "__main__":
    main()
