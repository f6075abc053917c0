import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsem.data.boxes import check_box, format_box, from_square, iou, read_box, to_square
from jaxsem.errors import InputError


@st.composite
def boxes(draw):
    left, right = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
    return left, top, right, bottom


@given(boxes())
def test_a_box_comes_back_to_within_a_percent(box):
    again = read_box(format_box(box))
    assert again is not None
    assert max(abs(one - other) for one, other in zip(again, box, strict=True)) <= 0.01 + 1e-9


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[12, 30, 55, 80]", (0.12, 0.3, 0.55, 0.8)),
        ("[12 , 30 , 55 , 80]", (0.12, 0.3, 0.55, 0.8)),
        ("(12,30,55,80).", (0.12, 0.3, 0.55, 0.8)),
        ("12, 30, 55, 80", (0.12, 0.3, 0.55, 0.8)),
        ("[0.12, 0.3, 0.55, 0.8]", (0.12, 0.3, 0.55, 0.8)),
        ("Answer: [0.120,0.300,0.550,0.800] .", (0.12, 0.3, 0.55, 0.8)),
        ("[0, 0, 1, 1.0]", (0, 0, 1, 1)),
        ("[0, 0, 1, 1]", (0, 0, 0.01, 0.01)),
        ("[12.5, 30, 55, 100]", (0.125, 0.3, 0.55, 1)),
        ("2, 3, 4, 5 of them, at [10, 20, 30, 40] or [1, 2, 3, 4]", (0.1, 0.2, 0.3, 0.4)),
        ("[.1, .2, .3, .4]", (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_percents_and_decimals_are_read(text, box):
    assert read_box(text) == pytest.approx(box)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[30, 10, 20, 40]",
        "[10, 10, 10, 40]",
        "[-1, 10, 20, 40]",
        "[10, 10, 20, 101]",
        "[1e5, 2, 3, 4]",
        "[nan, 0, 1, 1]",
        "[243, 469, 558, 746]",
        "[1٣, 20, 30, 40]",
        f"[0, 0, 1, {'9' * 5000}]",
        "[" * 10_000,
        ("1" + " " * 99) * 1000,
        "1, " * 20_000,
    ],
)
def test_what_is_no_box_is_none(text):
    assert read_box(text) is None


@given(st.text(alphabet="[](),. -0123456789ab\n", max_size=80))
def test_any_text_gives_a_box_within_the_picture_or_none(text):
    box = read_box(text)
    assert box is None or check_box(box) == box


def test_a_thin_box_keeps_a_percent():
    assert format_box((0.501, 0.9991, 0.503, 1.0)) == "[50, 99, 51, 100]"


@pytest.mark.parametrize("box", [(), (0, 0, 1), (0.5, 0, 0.5, 1), (0, 0, 1, 1.01), (0, 0, float("nan"), 1), "abcd"])
def test_what_is_no_box_is_not_written(box):
    with pytest.raises(InputError):
        format_box(box)


def test_iou_by_hand():
    assert iou((0, 0, 0.2, 0.2), (0.1, 0.1, 0.3, 0.3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 0.2, 0.2), (0, 0, 0.2, 0.2)) == 1
    assert iou((0, 0, 0.2, 0.2), (0.3, 0, 0.4, 0.2)) == 0
    assert iou((0.2, 0.2, 0.2, 0.2), (0.2, 0.2, 0.2, 0.2)) == 0


def test_bars_of_a_wide_picture_are_above_and_below():
    assert to_square((0, 0, 1, 1), (100, 200)) == (0, 0.25, 1, 0.75)
    assert to_square((0, 0, 1, 1), (200, 100)) == (0.25, 0, 0.75, 1)
    assert from_square((0, 0, 1, 0.2), (100, 200)) == (0, 0, 1, 0)


@given(boxes(), st.tuples(st.integers(1, 500), st.integers(1, 500)))
def test_the_square_and_back(box, size):
    assert from_square(to_square(box, size), size) == pytest.approx(box, abs=1e-9)
