"""`gpu_launcher.Pool` on GPUs, where programs outside the pool use some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Machine  # type: ignore[import-not-found]

GIB = 2**30


def two_gpus(machine: Machine, *first: str) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a", *first), *machine.gpu(1, "GPU-b"))


def test_a_gpu_in_use_outside_the_pool_is_not_granted_at_the_first_try(machine: Machine, tmp_path: Path) -> None:
    two_gpus(machine, f"memory_used {3 * GIB}")
    code = f"""
import gpu_launcher, asyncio
with gpu_launcher.Pool(pool_dir={str(tmp_path / "pool")!r}) as pool:
    with pool.lease(timeout=0) as lease:
        print(lease.devices[0].label, lease.environment({{}})["CUDA_VISIBLE_DEVICES"])
    async def main():
        async with pool.alease(timeout=0) as lease:
            print(lease.devices[0].label)
    asyncio.run(main())
    print(*[(seen.device.label, seen.state.value, seen.reason) for seen in pool.snapshot().devices], sep="; ")
    try:
        pool.lease(gpus=2, timeout=0.1)
    except gpu_launcher.LeaseTimeout as error:
        print(error)
"""
    assert machine.run(code).splitlines() == [
        "GPU 1 1",
        "GPU 1",
        "('GPU 0', 'busy', 'has 3 GiB in use by processes that cannot be told from here'); ('GPU 1', 'free', None)",
        "timed out after 0.1 s waiting for 2 GPUs: GPU 0 has 3 GiB in use by processes that cannot be told from here",
    ]


def test_it_is_granted_when_it_is_free_again(machine: Machine, tmp_path: Path) -> None:
    two_gpus(machine, f"memory_used {3 * GIB}")
    code = f"""
import gpu_launcher, logging, os, threading
logging.disable()
state = open(os.environ["NVML_DOUBLE_STATE"]).read().replace("memory_used {3 * GIB}", "memory_used 0")
def free():
    new = os.environ["NVML_DOUBLE_STATE"] + ".new"
    open(new, "w").write(state)
    os.replace(new, os.environ["NVML_DOUBLE_STATE"])
with gpu_launcher.Pool(pool_dir={str(tmp_path / "pool")!r}) as pool:
    timer = threading.Timer(0.5, free)
    timer.start()
    with pool.lease(gpus=2, timeout=200) as lease:
        print(lease.environment({{}})["CUDA_VISIBLE_DEVICES"])
    timer.join()
"""
    assert machine.run(code) == "0,1"


def test_whatever_others_use_is_granted_with_busy_memory_none(machine: Machine, tmp_path: Path) -> None:
    two_gpus(machine, f"memory_used {3 * GIB}")
    code = f"""
import gpu_launcher
with gpu_launcher.Pool(pool_dir={str(tmp_path / "pool")!r}, busy_memory=None) as pool:
    pool.lease(gpus=2, timeout=0).release()
"""
    assert machine.run(code) == ""


def test_the_mask_of_when_the_pool_was_made_holds(machine: Machine, tmp_path: Path) -> None:
    two_gpus(machine)
    code = f"""
import gpu_launcher, os
pool = gpu_launcher.Pool(pool_dir={str(tmp_path / "pool")!r})
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
print([device.label for device in pool.devices])
"""
    assert machine.run(code, CUDA_VISIBLE_DEVICES="1") == "['GPU 1']"


def test_calls_and_workers_of_a_pool_use_the_other_gpus_while_a_lease_of_it_is_applied(
    machine: Machine, tmp_path: Path
) -> None:
    two_gpus(machine)
    code = f"""
import gpu_launcher, os
def visible(record=None):
    return os.environ["CUDA_VISIBLE_DEVICES"]
with gpu_launcher.Pool(pool_dir={str(tmp_path / "pool")!r}) as pool, pool.lease() as lease:
    lease.apply()
    with gpu_launcher.PoolExecutor(pool=pool) as executor:
        called = executor.submit(visible).result(timeout=200)
    print(visible(), called, *gpu_launcher.parallel_map([1], function=visible, pool=pool))
"""
    assert machine.run(code) == "0 1 1"


def test_a_pool_that_masks_nothing_stays_so_while_a_lease_of_it_is_applied(machine: Machine, tmp_path: Path) -> None:
    two_gpus(machine)
    code = f"""
import gpu_launcher, os
with gpu_launcher.Pool(pool_dir={str(tmp_path / "pool")!r}) as pool:
    lease = pool.lease()
    lease.apply()
    executor = gpu_launcher.PoolExecutor(gpus=2, pool=pool)
    executor.submit(abs, -1)  # it would be refused: one GPU is visible here
    lease.release()
    executor.shutdown()
"""
    assert machine.run(code, PYTHONWARNINGS="ignore") == ""
