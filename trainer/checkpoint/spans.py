"""Arithmetic of slices of one parameter. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """A slice of a flattened parameter, in elements."""

    start: int
    numel: int

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.numel


def subtract(spans: Iterable[Span], taken: Span) -> list[Span]:
    """Return what is left of `spans` without `taken`."""
    left = []
    for span in spans:
        before = Span(span.start, min(span.stop, taken.start) - span.start)
        after_start = max(span.start, taken.stop)
        after = Span(after_start, span.stop - after_start)
        left += [piece for piece in (before, after) if piece.numel > 0]
    return left


def intersect(one: Span, other: Span) -> Span:
    """Return what two spans share; its numel is 0 if that is nothing."""
    start = max(one.start, other.start)
    return Span(start, max(0, min(one.stop, other.stop) - start))
