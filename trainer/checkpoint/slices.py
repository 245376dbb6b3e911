"""How parameters are cut into slices, and which rank writes each. Pure.

ZeRO-3 cuts each of a thousand parameters into as many parts as there are ranks: millions of slices,
which a run of equal ones describes in five numbers.

The slices of all ranks are rows of one array, as there are millions of them at a thousand ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


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


class Run(NamedTuple):
    """Slices of one parameter, equally long and end to end, of ranks at equal distances.

    Attributes:
        start: First element of the first slice.
        numel: Elements of each slice.
        rank: The rank that writes the first slice.
        step: From one slice's rank to the next one's.
        parts: How many slices there are.
    """

    start: int
    numel: int
    rank: int
    step: int = 1
    parts: int = 1

    @property
    def whole(self) -> Span:
        """All slices together."""
        return Span(self.start, self.numel * self.parts)

    @property
    def ranks(self) -> range:
        """The ranks that write the slices."""
        return range(self.rank, self.rank + self.step * self.parts, self.step)

    def slice_of(self, rank: int) -> Span | None:
        """Return the slice that a rank writes, if it writes one."""
        if rank not in self.ranks:
            return None
        return Span(self.start + self.numel * self.ranks.index(rank), self.numel)

    def slices_in(self, part: Span) -> Iterator[tuple[int, Span]]:
        """Return the slices that have something of `part`, and the ranks that write them."""
        if part.numel == 0:
            return
        first = (part.start - self.start) // self.numel
        stop = -(-(part.stop - self.start) // self.numel)
        for number in range(max(first, 0), min(stop, self.parts)):
            yield self.ranks[number], Span(self.start + self.numel * number, self.numel)


Cuts = Mapping[str, tuple[Run, ...]]
"""The slices of each parameter that any rank writes."""


class Read(NamedTuple):
    """One copy from a saved slice into a wanted one.

    Attributes:
        rank: Whose object holds the saved slice.
        name: The parameter.
        saved: The saved slice.
        part: What to copy of it, in elements of the parameter.
    """

    rank: int
    name: str
    saved: Span
    part: Span


def runs_of(slices: Iterable[tuple[int, int, int]]) -> tuple[Run, ...]:
    """Join slices of one parameter into as few runs as neighbours make.

    Args:
        slices: First element, number of elements and rank of each, by first element.
    """
    runs: list[Run] = []
    for start, numel, rank in slices:
        if numel == 0:
            continue
        last = runs[-1] if runs else None
        if last is not None and (last.numel, last.whole.stop) == (numel, start):
            step = last.step if last.parts > 1 else rank - last.rank
            if step > 0 and rank == last.rank + step * last.parts:
                runs[-1] = last._replace(step=step, parts=last.parts + 1)
                continue
        runs.append(Run(start, numel, rank))
    return tuple(runs)


def slices_of(rank: int, cuts: Cuts) -> dict[str, Span]:
    """Return the slice of each parameter that a rank writes, in the order of the parameters."""
    return {
        name: span
        for name, runs in cuts.items()
        for run in runs
        if (span := run.slice_of(rank)) is not None
    }


def common_order(orders: Iterable[Sequence[str]]) -> list[str]:
    """Return names in an order that agrees with all the given ones.

    Raises:
        CycleError: There is none.
    """
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for order in orders:
        for name in order[:1]:
            sorter.add(name)
        for before, after in pairwise(order):
            sorter.add(after, before)
    return list(sorter.static_order())


def missing_from(wanted: Mapping[str, Span], cuts: Cuts) -> dict[str, list[Span]]:
    """Return the parts of the wanted slices that nobody saved."""
    missing = {}
    for name, span in wanted.items():
        gaps = [span] if span.numel > 0 else []
        for run in cuts.get(name, ()):
            gaps = subtract(gaps, run.whole)
        if gaps:
            missing[name] = gaps
    return missing


def plan_reads(wanted: Mapping[str, Span], cuts: Cuts) -> list[Read]:
    """Plan how to fill the wanted slices from those that were saved.

    Args:
        wanted: Slice wanted of each parameter.
        cuts: The slices that were saved; the earlier run is used where two overlap.

    Returns:
        The reads, ordered by rank, which cover each wanted element at most once.
    """
    reads: list[Read] = []
    for name, span in wanted.items():
        gaps = [span]
        for run in cuts.get(name, ()):
            for part in (intersect(gap, run.whole) for gap in gaps):
                reads += [
                    Read(rank, name, saved, intersect(part, saved))
                    for rank, saved in run.slices_in(part)
                ]
            gaps = subtract(gaps, run.whole)
    return sorted(reads, key=lambda read: read.rank)


Rows = npt.NDArray[np.int64]
"""[slices, 4]: number of the parameter, first element, number of elements, rank."""


def rows_of(spans: Rows, parameters: Rows, rank: int) -> Rows:
    """Return a rank's slices as rows.

    Args:
        spans: [slices, 2]: first element and number of elements of each.
        parameters: [slices]: number of the parameter of each.
        rank: The rank that holds them.
    """
    return np.column_stack([parameters, spans, np.full(len(parameters), rank, np.int64)])


def share_writes(held: Rows, *, world_size: int) -> Rows:
    """Choose one writer for each slice that is not empty.

    Args:
        held: The slices that ranks hold.
        world_size: Number of ranks.

    Returns:
        One row for each slice, with the rank that writes it, by parameter and first element: of
        ranks that hold the same slice the one that has least to write so far, so replicated state
        leaves through all links.
    """
    held = held[held[:, 2] > 0]
    held = held[np.lexsort(held.T[::-1])]
    others = np.any(held[1:, :3] != held[:-1, :3], axis=1)
    firsts = np.flatnonzero(np.concatenate([np.ones(min(len(held), 1), bool), others]))
    counts = np.diff(firsts, append=len(held))
    written = held[firsts].copy()
    load = np.zeros(world_size, np.int64)
    # What only one rank can write comes first: the shared slices then even the loads out.
    single = written[counts == 1]
    np.add.at(load, single[:, 3], single[:, 2])
    shared = np.flatnonzero(counts > 1)
    for number in shared[np.argsort(counts[shared], kind="stable")]:
        holders = held[firsts[number] : firsts[number] + counts[number], 3]
        writer = holders[np.argmin(load[holders])]
        load[writer] += written[number, 2]
        written[number, 3] = writer
    return written


def cuts_of(written: Rows, *, parameters: int) -> list[tuple[Run, ...]]:
    """Describe the slices of each parameter by runs.

    Args:
        written: The slices, by parameter and first element.
        parameters: Number of parameters.
    """
    cuts: list[tuple[Run, ...]] = [()] * parameters
    bounds = np.searchsorted(written[:, 0], np.arange(parameters + 1)).tolist()
    for number, (first, stop) in enumerate(pairwise(bounds)):
        cuts[number] = runs_of(written[first:stop, 1:].tolist())
    return cuts
