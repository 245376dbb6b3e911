from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.flow.sampler_config import (
    Piece,
    StepsError,
    adaptive_pieces,
    fixed_pieces,
    steps_per_segment,
)
from models.flow.stages import Segment, Stages

SEGMENT = Segment(start=0.2, end=0.6, active=1)


@pytest.mark.parametrize(
    ("times", "steps", "counts"),
    [
        ((), 5, (5,)),
        ((0.5,), 10, (5, 5)),
        ((0.67, 0.33), 3, (1, 1, 1)),
        ((0.67, 0.33), 40, (13, 14, 13)),
        ((0.9,), 10, (9, 1)),
        ((0.999,), 4, (3, 1)),
    ],
)
def test_steps_are_spread_by_length(
    times: tuple[float, ...], steps: int, counts: tuple[int, ...]
) -> None:
    assert steps_per_segment(Stages(times), steps=steps) == counts


def test_fewer_steps_than_segments_are_refused() -> None:
    with pytest.raises(StepsError, match=r"steps=2 .* 3 segments"):
        steps_per_segment(Stages((0.67, 0.33)), steps=2)


@given(
    st.integers(1, 30),
    st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: tuple(sorted(pair))),
)
def test_pieces_tile_the_segment_and_guide_the_steps_whose_middle_is_inside(
    steps: int, guidance: tuple[float, float] | None
) -> None:
    fixed = fixed_pieces(SEGMENT, steps=steps, guidance=guidance)
    assert sum(piece.steps for piece in fixed) == steps
    guided = [piece.guided for piece in fixed for _ in range(piece.steps)]
    middles = [0.2 + 0.4 * (step + 0.5) / steps for step in range(steps)]
    for middle, answer in zip(middles, guided, strict=True):
        edges = guidance or (-1, -1)
        if min(abs(middle - edge) for edge in edges) > 1e-9:
            assert answer == (edges[0] < middle < edges[1])
    for pieces in (fixed, adaptive_pieces(SEGMENT, guidance=guidance)):
        ends = [SEGMENT.start, *(piece.end for piece in pieces)]
        assert [piece.start for piece in pieces] == ends[:-1]
        assert ends[-1] == SEGMENT.end
    for before, after in pairwise(fixed):
        assert before.guided != after.guided


def test_an_adaptive_segment_is_cut_where_guidance_begins_and_ends() -> None:
    assert adaptive_pieces(SEGMENT, guidance=(0.3, 0.7)) == (
        Piece(start=0.2, end=0.3, steps=0, guided=False),
        Piece(start=0.3, end=0.6, steps=0, guided=True),
    )
    assert adaptive_pieces(SEGMENT, guidance=(0.0, 1.0)) == (
        Piece(start=0.2, end=0.6, steps=0, guided=True),
    )
    assert adaptive_pieces(SEGMENT, guidance=None) == (
        Piece(start=0.2, end=0.6, steps=0, guided=False),
    )
