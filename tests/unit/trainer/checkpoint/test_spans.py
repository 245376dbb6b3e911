"""Slice arithmetic against brute force over single elements."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.spans import Span, intersect, plan_reads, share_writes, subtract

QUICK = settings(max_examples=100, deadline=None)
SPANS = st.builds(Span, st.integers(0, 20), st.integers(0, 12))
SLICES = st.dictionaries(st.sampled_from("abc"), SPANS)


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


@QUICK
@given(SLICES, st.lists(SLICES, max_size=5))
def test_reads_cover_what_there_is_once_and_name_what_is_missing(
    wanted: dict[str, Span], sources: list[dict[str, Span]]
) -> None:
    reads, missing = plan_reads(wanted, sources)
    for name, span in wanted.items():
        held = set().union(*(elements(each[name]) for each in sources if name in each))
        read = [n for each in reads if each.name == name for n in elements(each.part)]
        gaps = [n for gap in missing.get(name, []) for n in elements(gap)]
        assert sorted(read) == sorted(elements(span) & held)
        assert sorted(gaps) == sorted(elements(span) - held)
    for each in reads:
        assert each.saved == sources[each.source][each.name]
        assert elements(each.part) <= elements(each.saved)
        assert each.part.numel > 0
    assert [each.source for each in reads] == sorted(each.source for each in reads)


@QUICK
@given(SLICES, st.lists(SLICES, max_size=4))
def test_a_source_that_adds_nothing_is_not_read(
    wanted: dict[str, Span], sources: list[dict[str, Span]]
) -> None:
    reads, _ = plan_reads(wanted, [wanted, *sources])
    assert {each.source for each in reads} <= {0}


@QUICK
@given(st.lists(SLICES, min_size=1, max_size=5))
def test_each_held_slice_is_written_by_exactly_one_holder(held: list[dict[str, Span]]) -> None:
    writes = share_writes(held)
    written = [(name, held[rank][name]) for rank, names in enumerate(writes) for name in names]
    assert sorted(written) == sorted(
        {(name, span) for each in held for name, span in each.items() if span.numel > 0}
    )


def test_replicated_slices_are_shared_evenly() -> None:
    everything = {f"layer{n}": Span(0, 100) for n in range(8)}
    assert [len(names) for names in share_writes([everything] * 4)] == [2, 2, 2, 2]


def test_shared_slices_even_out_what_single_ranks_hold() -> None:
    shared = {"s0": Span(0, 10), "s1": Span(0, 10)}
    assert share_writes([{**shared, "own": Span(0, 100)}, shared]) == [{"own"}, {"s0", "s1"}]
