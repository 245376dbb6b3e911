"""Runs of slices against brute force over single elements, and the sharing of writes."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.slices import (
    Cuts,
    Run,
    Span,
    common_order,
    cuts_of,
    missing_from,
    plan_reads,
    rows_of,
    runs_of,
    share_writes,
    slices_of,
)

QUICK = settings(max_examples=100, deadline=None)
NAMES = "abc"
SPANS = st.builds(Span, st.integers(0, 20), st.integers(0, 12))
HELD = st.dictionaries(st.sampled_from(NAMES), SPANS)
SLICES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=8).map(
    lambda cuts: [(start, numel, rank) for rank, (start, numel) in enumerate(cuts)]
)
CUTS = st.fixed_dictionaries(dict.fromkeys(NAMES, SLICES.map(lambda each: runs_of(sorted(each)))))


def elements(span: Span) -> set[int]:
    return set(range(span.start, span.stop))


@QUICK
@given(SLICES)
def test_runs_are_the_slices_they_were_made_of(slices: list[tuple[int, int, int]]) -> None:
    runs = runs_of(sorted(slices))
    assert len(runs) <= len(slices)
    found = [
        (run.start + number * run.numel, run.numel, rank)
        for run in runs
        for number, rank in enumerate(run.ranks)
    ]
    assert found == sorted(slices)
    for _, _, rank in slices:
        mine = slices_of(rank, {"w": runs})["w"]
        assert (*mine, rank) in slices
    assert slices_of(99, {"w": runs}) == {}


def test_an_even_cut_is_one_run_whatever_distance_its_ranks_have() -> None:
    assert runs_of([(4 * n, 4, 1 + 8 * n) for n in range(100)]) == (Run(0, 4, 1, 8, 100),)
    uneven = [(0, 4, 0), (4, 4, 1), (8, 4, 2), (12, 2, 3)]
    assert runs_of(uneven) == (Run(0, 4, 0, 1, 3), Run(12, 2, 3))


@QUICK
@given(HELD, CUTS)
def test_reads_cover_what_there_is_once_and_what_is_missing_is_named(
    wanted: dict[str, Span], cuts: Cuts
) -> None:
    reads, missing = plan_reads(wanted, cuts), missing_from(wanted, cuts)
    saved = {
        name: {
            (rank, Span(run.start + number * run.numel, run.numel))
            for run in cuts[name]
            for number, rank in enumerate(run.ranks)
        }
        for name in NAMES
    }
    for name, span in wanted.items():
        there = set().union(*(elements(each) for _, each in saved[name]))
        read = [n for each in reads if each.name == name for n in elements(each.part)]
        gaps = [n for gap in missing.get(name, []) for n in elements(gap)]
        assert sorted(read) == sorted(elements(span) & there)
        assert sorted(gaps) == sorted(elements(span) - there)
    for each in reads:
        assert (each.rank, each.saved) in saved[each.name]
        assert elements(each.part) <= elements(each.saved)
        assert each.part.numel > 0
    assert [each.rank for each in reads] == sorted(each.rank for each in reads)


@QUICK
@given(st.lists(st.permutations("abcdef"), min_size=1, max_size=1), st.data())
def test_a_common_order_agrees_with_all(whole: list[list[str]], data: st.DataObject) -> None:
    pieces = st.lists(st.sampled_from(whole[0]), unique=True).map(
        lambda names: sorted(names, key=whole[0].index)
    )
    orders = data.draw(st.lists(pieces, max_size=5))
    joined = common_order(orders)
    assert sorted(joined) == sorted(set().union(*orders))
    for order in orders:
        assert [name for name in joined if name in order] == order


def writes(held: list[dict[str, Span]]) -> list[dict[str, Span]]:
    """What each rank writes of what the ranks hold."""
    rows = [
        rows_of(
            np.array([*mine.values()], np.int64).reshape(-1, 2),
            np.array([NAMES.index(name) for name in mine], np.int64),
            rank,
        )
        for rank, mine in enumerate(held)
    ]
    written = share_writes(np.concatenate(rows), world_size=len(held))
    cuts = dict(zip(NAMES, cuts_of(written, parameters=len(NAMES)), strict=True))
    return [slices_of(rank, cuts) for rank in range(len(held))]


@QUICK
@given(st.lists(HELD, min_size=1, max_size=5))
def test_each_held_slice_is_written_by_exactly_one_holder(held: list[dict[str, Span]]) -> None:
    written = Counter()
    for rank, mine in enumerate(writes(held)):
        assert mine.items() <= held[rank].items()
        written.update(mine.items())
    there = {(name, span) for mine in held for name, span in mine.items() if span.numel > 0}
    assert written == dict.fromkeys(there, 1)


def test_replicated_slices_are_shared_evenly() -> None:
    everything = {name: Span(0, 100) for name in NAMES}
    assert [len(mine) for mine in writes([everything] * 3)] == [1, 1, 1]


def test_shared_slices_even_out_what_single_ranks_hold() -> None:
    shared = {"a": Span(0, 10), "b": Span(0, 10)}
    own, others = writes([{**shared, "c": Span(0, 100)}, shared])
    assert (list(own), list(others)) == (["c"], ["a", "b"])
