"""Arithmetic of slices: who writes which, and which saved ones make up the wanted ones. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """A slice of a flattened parameter, in elements."""

    start: int
    numel: int

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.numel


class Read(NamedTuple):
    """One copy from a saved slice into a wanted one.

    Attributes:
        source: Index of the object that holds the saved slice.
        name: The parameter.
        saved: The saved slice.
        part: What to copy of it, in elements of the parameter.
    """

    source: int
    name: str
    saved: Span
    part: Span


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


def plan_reads(
    wanted: Mapping[str, Span], sources: Sequence[Mapping[str, Span]]
) -> tuple[list[Read], dict[str, list[Span]]]:
    """Plan how to fill the wanted slices from as few sources as their order allows.

    Args:
        wanted: Slice wanted of each parameter.
        sources: Slices each source holds; the earlier one is used where two overlap.

    Returns:
        The reads, ordered by source, which cover each wanted element at most once; and the
        wanted slices no source holds.
    """
    reads = []
    missing = {name: [span] for name, span in wanted.items() if span.numel > 0}
    for index, source in enumerate(sources):
        if not missing:
            break
        for name, saved in source.items():
            for gap in missing.get(name, []):
                part = intersect(gap, saved)
                if part.numel > 0:
                    reads.append(Read(index, name, saved, part))
            if name in missing:
                missing[name] = subtract(missing[name], saved)
                if not missing[name]:
                    del missing[name]
    return reads, missing


def share_writes(held: Sequence[Mapping[str, Span]]) -> list[set[str]]:
    """Divide the writing of slices that several ranks hold, so that each is written once.

    Args:
        held: Slices each rank holds.

    Returns:
        For each rank, the parameters whose slice it writes: of ranks that hold the same slice the
        one that has least to write so far, so replicated state leaves through all links.
    """
    holders: dict[tuple[str, Span], list[int]] = {}
    for rank, slices in enumerate(held):
        for name, span in slices.items():
            if span.numel > 0:
                holders.setdefault((name, span), []).append(rank)
    load = [0] * len(held)
    writes: list[set[str]] = [set() for _ in held]
    # What only one rank can write comes first: the shared slices then even the loads out.
    for (name, span), ranks in sorted(holders.items(), key=lambda item: (len(item[1]), item[0])):
        writer = min(ranks, key=lambda rank: (load[rank], rank))
        load[writer] += span.numel
        writes[writer].add(name)
    return writes
