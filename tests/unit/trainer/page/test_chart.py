"""Charts: axes that hold what they show, and lines at their places."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.page.chart import Series, axis, compact, line_chart, number_field, share_bar

numbers = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-12)


@given(st.lists(numbers, min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_every_value(values, log):
    found = axis(values, log=log)
    assert all(-1e-9 <= found.share(value) <= 1 + 1e-9 for value in values)
    assert 1 <= len(found.ticks) <= 9
    assert list(found.ticks) == sorted(set(found.ticks))
    assert found.is_log <= (min(values) > 0)


def test_ticks_are_round():
    assert axis([0.0, 97.0]).ticks == (0, 25, 50, 75, 100)
    ticks = axis([0.01, 0.1, 3.0], log=True).ticks
    assert ticks == pytest.approx((0.01, 0.03, 0.1, 0.3, 1.0, 3.0))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (999.6, "1k"),
        (12_800, "12.8k"),
        (2.5e6, "2.5M"),
        (-3e9, "-3B"),
    ],
)
def test_numbers_are_short(value, told):
    assert compact(value) == told


def test_what_is_no_number_leaves_a_gap():
    points = [(0, 1.0), (1, math.nan), (2, 3.0), (3, math.inf), (4, 2.0), (5, 1.0)]
    drawn = line_chart("a", "b", [Series(label="x", points=points)])
    (path,) = re.findall(r'<path d="([^"]*)"', drawn)
    assert (path.count("M"), path.count("L")) == (3, 1)
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert line_chart("a", "b", [Series(label="x", points=[(0, math.nan)])]) == ""
    assert line_chart("a", "b", []) == ""


anything = st.floats() | st.just(1e308) | st.just(-1e308)


@given(st.lists(st.tuples(st.integers(0, 2**63), anything), max_size=8), st.booleans(), anything)
@example([(0, 5e-324)], False, 0.0)
def test_whatever_a_store_holds_can_be_drawn(points, log, level):
    shown = sorted(dict(points).items())
    series = [Series(label="x", points=shown)]
    drawn = line_chart("a", "b", series, log=log, from_zero=not log, levels=[("l", level)])
    drawn += share_bar("a", "b", [("x", y, "") for _, y in shown if y >= 0])
    drawn += number_field("a", "b", [("x", [y for _, y in shown])], ["t"] * max(1, len(shown)))
    for value in re.findall(r' (?:x|y|cx|cy|x1|y1|width|d|points)="([^"]*)"', drawn):
        assert not re.search("nan|inf", value)


def test_what_is_not_positive_has_no_place_on_a_logarithmic_axis():
    drawn = line_chart("a", "b", [Series(label="x", points=[(0, 1.0), (1, 100.0)])], log=True)
    assert ">10<" in drawn
    mixed = line_chart("a", "b", [Series(label="x", points=[(0, 0.0), (1, 100.0)])], log=True)
    assert ">50<" in mixed


def test_shares_add_up_to_the_whole():
    drawn = share_bar("a", "b", [("step", 3.0, "3s"), ("start", 1.0, "1s"), ("none", 0.0, "0s")])
    assert re.findall(r"<span>([\d.]+%)</span>", drawn) == ["75.0%", "25.0%"]
    assert share_bar("a", "b", [("step", 0.0, "0s")]) == ""


def test_a_field_leaves_out_what_is_not_there():
    drawn = number_field("a", "b", [("x", [1.0, None]), ("y", [2.0, 0.0])], ["p", "q"])
    assert drawn.count("<rect") == 3
    assert number_field("a", "b", [("x", [None])], ["p"]) == ""
