"""What jobs are called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.jobs.labels import MAX_LABEL, Labels, short_number
from gpu_launcher.text import middle_cut

FIXED = ["model=big", "data.root=/data/imagenet", "trainer.max_epochs=90"]


def test_labels_leave_out_what_all_jobs_have_in_common() -> None:
    jobs = [[*FIXED, f"lr={lr}", f"seed={seed}"] for lr in (0.1, 0.2) for seed in (1, 2)]
    assert Labels().of_all(jobs) == ["lr=0.1 seed=1", "lr=0.1 seed=2", "lr=0.2 seed=1", "lr=0.2 seed=2"]


@pytest.mark.parametrize("jobs", [[["lr=0.1", "seed=1"]], [["lr=0.1", "seed=1"]] * 3])
def test_jobs_that_do_not_differ_are_called_by_all_they_have(jobs: list[list[str]]) -> None:
    assert Labels().of_all(jobs) == ["lr=0.1 seed=1"] * len(jobs)


def test_an_override_that_some_jobs_lack_is_shown() -> None:
    assert Labels().of_all([["a=1", "b=2"], ["a=1"], ["a=1", "b=3"]]) == ["b=2", "", "b=3"]


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("0.0012345678", "0.001235"),
        ("1.23456789e-05", "1.235e-05"),
        ("-0.98765432", "-0.9877"),
        ("3.14159", "3.142"),
        ("123456.789", "123457"),
        ("0.1", "0.1"),
        ("1e-3", "1e-3"),
        ("0.50000", "0.50000"),
        ("0.00001", "0.00001"),
    ],
)
def test_numbers_get_four_significant_digits(text: str, short: str) -> None:
    assert short_number(text) == short
    assert Labels().of_all([[f"x={text}"], ["x=7"]])[0] == f"x={short}"


@pytest.mark.parametrize("value", ["1234567890", "2026.11.29", "a/0.123456789", "v0.123456789", "m-0.123456.ckpt"])
def test_what_is_not_a_number_with_a_fraction_is_left_as_it_is(value: str) -> None:
    assert Labels().of_all([[f"x={value}"], ["x=7"]])[0] == f"x={value}"


def test_numbers_in_lists_are_short_too() -> None:
    assert Labels().of_all([["betas=[0.90000001,0.99912345]"], ["betas=[1,2]"]])[0] == "betas=[0.9,0.9991]"


def test_numbers_that_would_look_alike_get_more_digits() -> None:
    assert Labels().of_all([["x=0.12345678"], ["x=0.12345999"], ["x=0.9999"]]) == [
        "x=0.123457",
        "x=0.12346",
        "x=0.9999",
    ]


def test_long_values_lose_their_middle() -> None:
    paths = [[f"init=/data/runs/of/many/years/and/people/{name}/last.ckpt"] for name in ("resnet", "vit")]
    one, other = Labels().of_all(paths)
    assert len(one) < 50
    assert one.startswith("init=/data/")
    assert one.endswith("/last.ckpt")
    assert one != other


def test_long_labels_use_the_ends_of_dotted_keys() -> None:
    keys = ["model.optimizer.lr", "model.net.hidden", "data.batch_size", "ema.lr"]
    jobs = [[f"{key}={value}" for key in keys] for value in (1, 2)]
    assert Labels().of_all(jobs)[0] == "optimizer.lr=1 hidden=1 batch_size=1 ema.lr=1"
    assert Labels().of_all([["model.lr=1"], ["model.lr=2"]]) == ["model.lr=1", "model.lr=2"]


def test_jobs_that_come_one_by_one_lose_what_all_so_far_have() -> None:
    labels = Labels()
    shown = [labels.of([*FIXED, f"lr={lr}"]) for lr in (0.1, 0.2, 0.3)]
    assert shown[0].endswith("lr=0.1")
    assert shown[1:] == ["lr=0.2", "lr=0.3"]


def test_what_is_known_to_be_common_is_left_out_of_the_first_label() -> None:
    assert Labels(FIXED).of([*FIXED, "lr=0.123456789"]) == "lr=0.1235"
    assert Labels(FIXED).of(FIXED).endswith("max_epochs=90")


def test_a_label_is_bounded_however_many_parameters_there_are() -> None:
    assert len(Labels([]).of([f"p{i}={'x' * 1000}" for i in range(100)])) <= MAX_LABEL


values = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers().map(str),
    st.text("abcdefgh/._-0123456789", max_size=60),
    st.lists(st.floats(-1, 1), max_size=3).map(str),
)


@given(st.lists(st.tuples(values, values), min_size=2, max_size=20, unique=True))
def test_jobs_that_differ_have_labels_that_differ(pairs: list[tuple[str, str]]) -> None:
    labels = Labels().of_all([["fixed=1", f"a.x={one}", f"b.y={other}"] for one, other in pairs])
    assert len(set(labels)) == len(pairs)


@given(st.text(), st.integers(0, 40))
def test_a_cut_keeps_both_ends_and_fits(text: str, room: int) -> None:
    cut = middle_cut(text, room)
    assert len(cut) <= max(room, 0) or cut == text
    if len(text) > room > 4:
        assert cut[0] == text[0]
        assert cut[-1] == text[-1]
