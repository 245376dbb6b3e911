"""Counts and tables for people; sizes and durations are tested where they are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.formats import format_count, format_table


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (1, ("shard",), "1 shard"),
        (0, ("shard",), "0 shards"),
        (1234, ("class", "classes"), "1,234 classes"),
    ],
)
def test_a_count_knows_its_plural(number, words, text):
    assert format_count(number, *words) == text


def test_columns_are_aligned_and_lines_end_with_their_text():
    rows = [("run", "images", "kept because"), ("a", "12", "newest"), ("long", "1,234", "")]
    assert format_table(rows, align="<>").splitlines() == [
        "run   images  kept because",
        "a         12  newest",
        "long   1,234",
    ]


CELLS = st.text(st.characters())  # lone surrogates and line breaks too


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[CELLS] * n), min_size=1)))
def test_a_row_is_a_line_whatever_it_holds(rows):
    lines = format_table(rows).split("\n")
    assert len(lines) == len(rows)
    assert all(map(str.isprintable, lines))
