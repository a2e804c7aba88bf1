"""What the option `devices` selects, and what is said where it cannot."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.devices import FixedProbe, Inventory, UnusableGpu, cpu_slots, select_devices, simulated_devices
from gpu_launcher.errors import OptionError
from gpu_launcher.model import Device, DeviceKind

UUIDS = ("GPU-8932f937-d72c", "GPU-8932aaaa-0000", "GPU-1b000000-0000")
GPUS = tuple(Device(uuid, index, "NVIDIA H100", DeviceKind.GPU, 80 * 2**30) for index, uuid in enumerate(UUIDS))
THREE = FixedProbe(Inventory(GPUS))
NONE = FixedProbe(Inventory(nothing_because="no NVIDIA driver found (none installed)"))
AVAILABLE = (
    "available: GPU 0 (NVIDIA H100, GPU-8932f937), GPU 1 (NVIDIA H100, GPU-8932aaaa), GPU 2 (NVIDIA H100, GPU-1b000000)"
)


MIGS = (
    GPUS[0],
    Device("MIG-aaaa-0", 1, "NVIDIA H100 MIG 1g.10gb", DeviceKind.MIG, parent=UUIDS[1], instance=0),
    Device("MIG-aabb-1", 1, "NVIDIA H100 MIG 1g.10gb", DeviceKind.MIG, parent=UUIDS[1], instance=1),
    GPUS[2],
)
SPLIT = FixedProbe(Inventory(MIGS))


class ForbiddenProbe(FixedProbe):
    def __init__(self) -> None:
        super().__init__(Inventory())

    def inventory(self) -> Inventory:
        raise AssertionError("NVML was asked")


def indices(spec: object, environ: dict[str, str] | None = None) -> list[int]:
    selection = select_devices(spec, environ or {}, THREE)
    assert all(device.kind is DeviceKind.GPU for device in selection.devices)
    meant = ("devices=1 means GPU number 1, not how many GPUs to use",) if spec in (1, "1") else ()
    assert selection.notices == meant
    return [device.index for device in selection.devices]


def problem(spec: object, environ: dict[str, str] | None = None, nvml: FixedProbe = THREE) -> str:
    with pytest.raises(OptionError) as caught:
        select_devices(spec, environ or {}, nvml)
    assert caught.value.option == "devices"
    assert str(caught.value).startswith("devices: ")
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return caught.value.problem


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("auto", [0, 1, 2]),
        (" Auto ", [0, 1, 2]),
        (1, [1]),
        ("1", [1]),
        ([0, 2], [0, 2]),
        ((2, 0), [2, 0]),
        (["2", 0], [2, 0]),
        ("0,2", [0, 2]),
        (" 2 , 0 ", [2, 0]),
        (UUIDS[2], [2]),
        ("GPU-1b", [2]),
        ("gpu-1B", [2]),
        (f"{UUIDS[1]},0", [1, 0]),
        ([UUIDS[0], "GPU-1"], [0, 2]),
    ],
)
def test_gpus_are_selected_by_index_uuid_or_unique_prefix_in_the_order_named(spec: object, expected: list[int]) -> None:
    assert indices(spec) == expected


def test_an_inherited_mask_restricts_auto() -> None:
    assert indices("auto", {"CUDA_VISIBLE_DEVICES": "2,0"}) == [2, 0]


def test_indices_are_the_machines_also_under_a_mask() -> None:
    assert indices([2], {"CUDA_VISIBLE_DEVICES": "1,2"}) == [2]


def test_a_gpu_outside_the_mask_is_refused_with_what_there_is() -> None:
    assert problem([0], {"CUDA_VISIBLE_DEVICES": "1,2"}) == (
        "GPU 0 is hidden by CUDA_VISIBLE_DEVICES='1,2'; available: GPU 1 (NVIDIA H100, GPU-8932aaaa), "
        "GPU 2 (NVIDIA H100, GPU-1b000000); change or unset CUDA_VISIBLE_DEVICES to use others"
    )


def test_a_gpu_named_under_a_mask_that_hides_all_is_refused() -> None:
    message = problem("GPU-1b", {"CUDA_VISIBLE_DEVICES": ""})
    assert message.startswith("'GPU-1b' is hidden by CUDA_VISIBLE_DEVICES=''; no GPU is available")


def test_cpu_slots_and_simulated_devices_are_made_without_asking_nvml() -> None:
    assert select_devices("cpu:4", {}, ForbiddenProbe()).devices == cpu_slots(4)
    assert select_devices("cpu:4", {}, ForbiddenProbe()).notices == ()
    assert select_devices("CPU", {}, ForbiddenProbe(), cpu_count=3).devices == cpu_slots(3)
    assert select_devices("cpu", {}, ForbiddenProbe()).devices
    assert select_devices("simulated:8", {}, ForbiddenProbe()).devices == simulated_devices(8)


def test_simulated_devices_are_always_announced() -> None:
    (notice,) = select_devices("simulated:8", {"CUDA_VISIBLE_DEVICES": "0"}, ForbiddenProbe()).notices
    assert "8 devices are simulated" in notice
    (notice,) = select_devices("simulated:1", {}, ForbiddenProbe()).notices
    assert "1 device is simulated" in notice


def test_simulated_devices_are_the_same_for_everyone_on_the_machine() -> None:
    assert [device.uuid for device in simulated_devices(2)] == ["SIMULATED-0", "SIMULATED-1"]
    assert simulated_devices(8)[:2] == simulated_devices(2)
    assert [device.uuid for device in cpu_slots(2)] == ["CPU-0", "CPU-1"]


def test_without_a_driver_auto_means_cpu_slots_and_one_notice_says_why() -> None:
    selection = select_devices("auto", {}, NONE, cpu_count=2)
    assert selection.devices == cpu_slots(2)
    assert selection.notices == (
        "no NVIDIA driver found (none installed); using 2 CPU slots instead (devices=cpu:N for another number)",
    )


def test_without_a_driver_a_mask_is_not_blamed() -> None:
    for mask in ("", "0,1", "0,0"):
        (notice,) = select_devices("auto", {"CUDA_VISIBLE_DEVICES": mask}, NONE, cpu_count=1).notices
        assert notice.startswith("no NVIDIA driver found (none installed); using 1 CPU slot instead")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("", "CUDA_VISIBLE_DEVICES='' hides all 3 GPUs of the machine: change or unset it to use them; using"),
        ("-1", "CUDA_VISIBLE_DEVICES='-1' hides all 3 GPUs of the machine: change or unset it to use them; using"),
        ("7", "CUDA_VISIBLE_DEVICES='7': '7' names no single GPU of this machine"),
        ("0,0", "CUDA_VISIBLE_DEVICES='0,0': GPU 0 is named twice, for which CUDA hides all GPUs"),
        ("MIG-1", "CUDA_VISIBLE_DEVICES='MIG-1': 'MIG-1' names no single MIG instance of this machine"),
    ],
)
def test_a_mask_that_hides_all_gpus_is_named_in_the_one_notice(mask: str, words: str) -> None:
    selection = select_devices("auto", {"CUDA_VISIBLE_DEVICES": mask}, THREE, cpu_count=2)
    assert selection.devices == cpu_slots(2)
    (notice,) = selection.notices
    assert notice.startswith(words)
    assert notice.endswith("; using 2 CPU slots instead (devices=cpu:N for another number)")


def test_a_mask_that_is_partly_wrong_gives_a_notice_also_for_named_gpus() -> None:
    for spec in ("auto", [0]):
        selection = select_devices(spec, {"CUDA_VISIBLE_DEVICES": "0,9"}, THREE)
        assert selection.devices == GPUS[:1]
        assert len(selection.notices) == 1


def test_jobs_are_told_uuids_exactly_where_some_gpu_cannot_be_used() -> None:
    broken = FixedProbe(Inventory(GPUS[:2], (UnusableGpu(2, None, "is lost"),)))
    assert select_devices("auto", {}, broken).by_uuid
    assert select_devices([0], {"CUDA_VISIBLE_DEVICES": "0"}, broken).by_uuid
    assert not select_devices("auto", {}, THREE).by_uuid


def test_an_unusable_gpu_is_mentioned_where_it_was_wanted_and_only_there() -> None:
    broken = FixedProbe(Inventory(GPUS[:2], (UnusableGpu(2, UUIDS[2], "is lost: reboot"),)))
    assert select_devices("auto", {}, broken).notices == ("GPU 2 is left out: it is lost: reboot",)
    assert select_devices([0], {}, broken).notices == ()
    assert select_devices("auto", {"CUDA_VISIBLE_DEVICES": "1,0"}, broken).notices == ()
    for spec in (2, "GPU-1b"):
        assert problem(spec, nvml=broken).startswith("GPU 2 cannot be used: it is lost: reboot; available: GPU 0")


@pytest.mark.parametrize(
    ("spec", "mask", "expected"),
    [
        ("auto", None, [0, 1, 2, 3]),
        (1, None, [1, 2]),
        (UUIDS[1], None, [1, 2]),
        (["MIG-aabb", 0], None, [2, 0]),
        ("mig-AAAA-0", None, [1]),
        ([1], "MIG-aabb-1", [2]),
        ("auto", "MIG-aabb-1,MIG-aaaa-0", [2, 1]),
        ("auto", "2,1", [3, 1, 2]),
    ],
)
def test_mig_instances_are_devices_and_their_gpu_means_all_of_them(
    spec: object, mask: str | None, expected: list[int]
) -> None:
    selection = select_devices(spec, {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}, SPLIT)
    assert selection.devices == tuple(MIGS[position] for position in expected)
    assert selection.by_uuid
    assert len(selection.notices) == (spec == 1)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([1, "MIG-aaaa"], "MIG 1:0 is named twice, as 1 and as 'MIG-aaaa'; name each device once"),
        ("MIG-aa", "'MIG-aa' fits MIG 1:0 (MIG-aaaa-0) and MIG 1:1 (MIG-aabb-1); write more of the UUID"),
        ("GPU-8932", f"'GPU-8932' fits GPU 0 ({UUIDS[0]}) and GPU 1 ({UUIDS[1]}); write more of the UUID"),
        ("MIG-cc", "'MIG-cc' is not in this machine; available: GPU 0 (NVIDIA H100, GPU-8932f937), MIG 1:0 (NVIDIA H1"),
    ],
)
def test_a_name_that_fits_no_mig_instance_or_several_is_refused(spec: object, words: str) -> None:
    assert problem(spec, nvml=SPLIT).startswith(words)


def test_a_mig_instance_outside_the_mask_is_refused() -> None:
    message = problem("MIG-aaaa", {"CUDA_VISIBLE_DEVICES": "MIG-aabb-1"}, SPLIT)
    assert message.startswith("'MIG-aaaa' is hidden by CUDA_VISIBLE_DEVICES='MIG-aabb-1'; available: MIG 1:1")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (3, f"GPU 3 is not in this machine; {AVAILABLE}; devices=3 means GPU number 3; for 3 GPUs"),
        ([0, 7], f"GPU 7 is not in this machine; {AVAILABLE}"),
        ("GPU-ffff", f"'GPU-ffff' is not in this machine; {AVAILABLE}"),
        ("GPU-8932", "'GPU-8932' fits GPU 0 (GPU-8932f937-d72c) and GPU 1 (GPU-8932aaaa-0000); write more"),
        ([1, 1], "GPU 1 is named twice; name each device once"),
        ([0, UUIDS[0]], f"GPU 0 is named twice, as 0 and as {UUIDS[0]!r}; name each device once"),
        ("1,01", "GPU 1 is named twice; name"),
        (-1, "-1 is negative; GPUs are counted from 0"),
        ("0,-1", "-1 is negative; GPUs are counted from 0"),
        ([], "the list is empty; use auto, a list"),
        ("", "an entry is empty; use auto"),
        ("0,,1", "an entry is empty; use auto"),
        ("all", "'all' is neither a GPU's index nor its UUID (GPU-...); use auto, a list"),
        ("0-2", "'0-2' is neither a GPU's index nor its UUID"),
        ("cuda:0", "'cuda:0' is neither a GPU's index nor its UUID"),
        (["auto"], "'auto' stands alone, not in a list"),
        (["cpu:2", 0], "'cpu:2' stands alone, not in a list"),
        ("0,simulated:2", "'simulated:2' stands alone, not in a list"),
        (True, "True is not a device; use auto"),
        ([0, False], "False is not a device; use auto"),
        (1.0, "1.0 is not a device; use auto"),
        ([[0]], "[0] is not a device; use auto"),
        ({"a": 1}, "{'a': 1} is not a device; use auto"),
        (None, "None is not a device; use auto"),
        ("MIG-1", f"'MIG-1' is not in this machine; {AVAILABLE}"),
        ("cpu:0", "'cpu:0' needs a number from 1 to 4096, such as cpu:4"),
        ("cpu:-1", "'cpu:-1' needs a number from 1 to 4096, such as cpu:4"),
        ("cpu:", "'cpu:' needs a number from 1 to 4096, such as cpu:4"),
        ("cpu:two", "'cpu:two' needs a number"),
        ("simulated", "'simulated' needs a number from 1 to 4096, such as simulated:4"),
        ("simulated:0", "'simulated:0' needs a number"),
        ("simulated:1.5", "'simulated:1.5' needs a number"),
        ("simulated:99999", "'simulated:99999' needs a number from 1 to 4096"),
        ("cpu:2,3", "'cpu:2' stands alone, not in a list"),
        ("auto:2", "'auto:2' stands alone, not in a list"),
        ("cpu:1\n2", "'cpu:1\\n2' needs a number"),
        ("GPU-\n", "'GPU-' fits GPU 0"),
        ("9" * 5000, "is neither a GPU's index nor its UUID"),
    ],
)
def test_what_is_no_device_is_refused_in_one_message_with_the_remedy(spec: object, words: str) -> None:
    assert words in problem(spec)


def test_naming_a_gpu_where_there_is_none_says_why_there_is_none() -> None:
    assert problem([0], nvml=NONE) == (
        "there is no GPU to choose: no NVIDIA driver found (none installed); use auto, cpu:4, or simulated:8"
    )


def test_messages_name_the_option_that_the_caller_offers() -> None:
    with pytest.raises(OptionError, match=r"^--devices: 9 is|^--devices: GPU 9 is"):
        select_devices(9, {}, THREE, option="--devices")
    (notice,) = select_devices("auto", {}, NONE, 2, "--devices").notices
    assert "(--devices=cpu:N for another number)" in notice


@pytest.mark.parametrize(
    ("spec", "option", "says"),
    [
        (2, "devices", "devices=2 means GPU number 2; for 2 GPUs write devices=[0,1]"),
        ("2", "hydra.launcher.devices", "for 2 GPUs write hydra.launcher.devices=[0,1]"),
        (" 02 ", "--devices", "--devices 2 means GPU number 2; for 2 GPUs write --devices 0,1"),
        (1, "--devices", "--devices 1 means GPU number 1, not how many GPUs to use"),
    ],
)
def test_bare_number_gets_a_notice_of_what_it_means(spec: object, option: str, says: str) -> None:
    (notice,) = select_devices(spec, {}, THREE, option=option).notices
    assert says in notice


@pytest.mark.parametrize("spec", [0, "0", [2], "0,2", ["2"], UUIDS[2]])
def test_what_cannot_be_a_number_of_gpus_gets_no_notice(spec: object) -> None:
    assert select_devices(spec, {}, THREE).notices == ()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (4, "GPU 4 is not in this machine; available: GPU 0"),
        (4, "; devices=4 means GPU number 4; for 4 GPUs write devices=[0,1,2,3]"),
        ("8", "for 8 GPUs write devices=[0,1,2,3,4,5,6,7]"),
        (99, "for 99 GPUs write devices=[0,1,...,98]"),
        ([4], "; a number is a GPU's index, how many GPUs a job gets is another option"),
    ],
)
def test_number_of_a_gpu_that_does_not_exist_is_explained(spec: object, says: str) -> None:
    assert says in problem(spec)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["cpu:2", "GPU-1", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@given(PLAIN, st.none() | st.text(max_size=5))
def test_any_value_selects_devices_each_once_or_is_an_option_error(spec: object, mask: str | None) -> None:
    environ = {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    try:
        selection = select_devices(spec, environ, THREE, cpu_count=2)
    except OptionError as error:
        message = str(error)
    else:
        assert selection.devices
        assert len({device.uuid for device in selection.devices}) == len(selection.devices)
        return
    assert message.startswith("devices: ")
    assert "\n" not in message
