"""CUDA_VISIBLE_DEVICES by CUDA's rules: examples from its documentation, and a slow, obviously right model."""

from __future__ import annotations

import re
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.devices import FixedProbe, Inventory, UnusableGpu, cpu_slots, environment, simulated_devices
from gpu_launcher.devices.visibility import read_mask, visible
from gpu_launcher.model import Device, DeviceKind

A, B, C, D = "GPU-8932f937-d72c", "GPU-8932aaaa-0000", "GPU-1b000000-0000", "GPU-1c000000-0000"
UUIDS = {0: A, 1: B, 2: C, 3: D}


def gpu(index: int, name: str = "NVIDIA H100") -> Device:
    return Device(UUIDS[index], index, name, DeviceKind.GPU, 80 * 2**30)


FOUR = Inventory(tuple(gpu(index) for index in range(4)))


@pytest.mark.parametrize(
    ("mask", "indices"),
    [
        # Examples of the CUDA programming guide.
        ("2,1", (2, 1)),
        ("0,2,-1,1", (0, 2)),
        ("", ()),
        ("GPU-8932f937", (0,)),
        # An unknown index, an ambiguous prefix, an unknown UUID end the list.
        ("0,4,1", (0,)),
        ("4", ()),
        ("GPU-1b,GPU-8932,GPU-1c", (2,)),
        ("GPU-1b,GPU-ffff,GPU-1c", (2,)),
        (f"{D},{A}", (3, 0)),
        # A GPU named twice hides all, also by two names; but not after the end of the list.
        ("0,0", ()),
        ("1,0,01", ()),
        (f"GPU-1b,{C}", ()),
        ("0,-1,0", (0,)),
        # Whitespace, and numbers as strtoul reads them.
        (" 0 ,\t2", (0, 2)),
        (f" {A} , {C} ", (0, 2)),
        ("+1,2nd", (1, 2)),
        # The usual ways to say `none`.
        ("-1", ()),
        ("NoDevFiles", ()),
        ("none", ()),
        ("  ", ()),
        ("0,,1", (0,)),
        ("0,", (0,)),
        # Indices and UUIDs do not mix; and there are no MIG instances here.
        (f"0,{C}", (0,)),
        (f"{C},0", (2,)),
        ("MIG-8932f937-d72c-4106-c12f-20bd9faed9f6", ()),
        (f"MIG-{A}/1/2,0", ()),
        (f"{A},MIG-{A}/1/2", (0,)),
        # Nothing that could be an index in any machine.
        ("9" * 5000, ()),
        ("٣", ()),
        ("gpu-8932f937", ()),
    ],
)
def test_a_mask_means_what_cuda_makes_of_it(mask: str, indices: tuple[int, ...]) -> None:
    assert read_mask(mask, UUIDS).indices == indices


INSTANCES = ("MIG-11aa", "MIG-11bb", f"MIG-{C}/1/0")


@pytest.mark.parametrize(
    ("mask", "instances"),
    [
        ("MIG-11bb,MIG-11aa", ("MIG-11bb", "MIG-11aa")),
        (f" MIG-11a , MIG-{C}/1/0", ("MIG-11aa", f"MIG-{C}/1/0")),
        # Ambiguous, unknown, of another kind: the end of the list.
        ("MIG-11aa,MIG-11", ("MIG-11aa",)),
        ("MIG-22,MIG-11aa", ()),
        (f"MIG-11aa,{A},MIG-11bb", ("MIG-11aa",)),
        ("MIG-11aa,0", ("MIG-11aa",)),
        ("0,MIG-11aa", ()),
        # Twice: nothing at all.
        ("MIG-11aa,MIG-11aa", ()),
    ],
)
def test_a_mask_of_mig_instances_follows_the_same_rules(mask: str, instances: tuple[str, ...]) -> None:
    assert read_mask(mask, UUIDS, INSTANCES).instances == instances


def test_mig_instances_are_handed_over_by_uuid_whatever_was_asked() -> None:
    instance = Device("MIG-11aa", 1, "NVIDIA H100 MIG 1g.10gb", DeviceKind.MIG, parent=B, instance=0)
    for by_uuid in (False, True):
        assert environment([instance], by_uuid=by_uuid)["CUDA_VISIBLE_DEVICES"] == "MIG-11aa"
    inventory = Inventory((gpu(0), instance))
    assert visible(inventory, environment([instance])).devices == (instance,)
    assert visible(inventory, {"CUDA_VISIBLE_DEVICES": "1"}).devices == (instance,)


ENTRIES = st.one_of(
    st.integers(-2, 6).map(str),
    st.sampled_from(["", " ", "00", "+1", "-0", "1x", "x1", "NoDevFiles", "MIG-1", "GPU-", "GPU-8", "GPU-1"]),
    st.sampled_from([A, B, C, D]).flatmap(lambda uuid: st.integers(4, len(uuid)).map(lambda n: uuid[:n])),
    st.text(max_size=4).filter(lambda text: "," not in text),
)
MACHINES = st.dictionaries(st.integers(0, 5), st.sampled_from([A, B, C, D, None]), max_size=5).filter(
    lambda machine: len({uuid for uuid in machine.values() if uuid}) == len([u for u in machine.values() if u])
)


def model(mask: str, uuids: dict[int, str | None]) -> tuple[int, ...]:
    """Of the entries before the first that names no GPU, the GPUs, if all are different."""
    entries = [entry.strip() for entry in mask.split(",")]

    def named(entry: str) -> list[int]:
        if entries[0][:4] == "GPU-":
            return [i for i in uuids if entry[:4] == "GPU-" and (uuids[i] or "")[: len(entry)] == entry]
        return [i for i in uuids if re.match(rf"([+]?0*{i}|-0+)(?![0-9])", entry) and (i == 0 or entry[0] != "-")]

    named_gpus = [named(entry) for entry in takewhile(lambda entry: len(named(entry)) == 1, entries)]
    indices = tuple(gpus[0] for gpus in named_gpus)
    return indices if len(set(indices)) == len(indices) else ()


@given(st.lists(ENTRIES, max_size=5).map(",".join), MACHINES)
def test_every_mask_means_what_the_model_says(mask: str, uuids: dict[int, str | None]) -> None:
    assert read_mask(mask, uuids).indices == model(mask, uuids)


@given(st.permutations(range(4)), st.integers(0, 4), st.booleans())
def test_the_mask_of_a_job_shows_exactly_its_devices_in_their_order(
    order: list[int], count: int, by_uuid: bool
) -> None:
    devices = tuple(gpu(index) for index in order[:count])
    mask = environment(devices, by_uuid=by_uuid)
    assert visible(FOUR, mask).devices == devices
    assert visible(FOUR, mask).notices == ()
    assert mask["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_job_without_gpus_sees_none() -> None:
    nothing = {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert environment(()) == nothing
    assert environment(cpu_slots(3)) == nothing
    assert environment(cpu_slots(3), by_uuid=True) == nothing


def test_simulated_devices_are_named_by_index() -> None:
    for by_uuid in (False, True):
        assert environment(simulated_devices(3)[1:], by_uuid=by_uuid)["CUDA_VISIBLE_DEVICES"] == "1,2"


def test_without_a_mask_every_gpu_is_visible() -> None:
    assert visible(FOUR, {}).devices == FOUR.devices


def test_a_mask_that_ends_on_purpose_gives_no_notice() -> None:
    for mask in ("", "0,-1,1", "NoDevFiles", "0,1,", "2,0"):
        assert visible(FOUR, {"CUDA_VISIBLE_DEVICES": mask}).notices == ()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("0,7,1", "'7' names no single GPU of this machine: CUDA leaves it and all that follow it out"),
        ("0,7", "'7' names no single GPU of this machine: CUDA leaves it out"),
        ("1,1", "GPU 1 is named twice, for which CUDA hides all GPUs"),
        ("MIG-1", "'MIG-1' names no single MIG instance of this machine: CUDA leaves it out"),
        ("MIG-1,0", "'MIG-1' names no single MIG instance of this machine: CUDA leaves it and all that follow it out"),
    ],
)
def test_a_mask_that_is_probably_a_mistake_gives_a_notice_with_its_text(mask: str, words: str) -> None:
    assert visible(FOUR, {"CUDA_VISIBLE_DEVICES": mask}).notices == (f"CUDA_VISIBLE_DEVICES={mask!r}: {words}",)


def test_an_unusable_gpu_counts_in_a_mask_and_does_not_end_it() -> None:
    lost = UnusableGpu(1, None, "is lost")
    seen = visible(Inventory((gpu(0), gpu(2)), (lost,)), {"CUDA_VISIBLE_DEVICES": "2,1,0"})
    assert seen.devices == (gpu(2), gpu(0))
    assert seen.unusable == (lost,)
    assert seen.notices == ()


def test_an_unusable_gpu_outside_the_mask_is_not_mentioned() -> None:
    inventory = FixedProbe(Inventory((gpu(0),), (UnusableGpu(1, None, "is lost"),))).inventory()
    assert visible(inventory, {"CUDA_VISIBLE_DEVICES": "0"}).unusable == ()


MIXED = Inventory((gpu(0, "NVIDIA T400"), gpu(1), gpu(2)))


def test_indices_among_unlike_gpus_without_pci_order_give_a_notice() -> None:
    seen = visible(MIXED, {"CUDA_VISIBLE_DEVICES": "0"})
    assert seen.devices == (gpu(0, "NVIDIA T400"),)
    assert len(seen.notices) == 1
    assert "as GPU 0 (NVIDIA T400); CUDA itself counts the fastest GPU first" in seen.notices[0]


@pytest.mark.parametrize(
    "environ",
    [
        {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        {"CUDA_VISIBLE_DEVICES": A},
        {"CUDA_VISIBLE_DEVICES": "2,0,1"},
        {"CUDA_VISIBLE_DEVICES": ""},
    ],
)
def test_where_the_order_of_unlike_gpus_cannot_matter_there_is_no_notice(environ: dict[str, str]) -> None:
    assert visible(MIXED, environ).notices == ()
