"""Arithmetic of slices against brute force over single elements."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.slices import Span, intersect, subtract

QUICK = settings(max_examples=100, deadline=None)
SPANS = st.builds(Span, st.integers(0, 20), st.integers(0, 12))


def elements(span: Span) -> set[int]:
    return set(range(span.start, span.stop))


@QUICK
@given(SPANS, SPANS)
def test_intersect(one: Span, other: Span) -> None:
    assert elements(intersect(one, other)) == elements(one) & elements(other)


@QUICK
@given(st.lists(SPANS, max_size=4), SPANS)
def test_subtract(spans: list[Span], taken: Span) -> None:
    left = subtract(spans, taken)
    assert sorted(n for span in left for n in elements(span)) == sorted(
        n for span in spans for n in elements(span) - elements(taken)
    )
    assert all(span.numel > 0 for span in left)
