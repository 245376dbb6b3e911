"""The plan of a sampling run: which steps each segment takes, and where guidance acts."""

from dataclasses import dataclass
from itertools import groupby, pairwise

from models.flow.stages import Segment, Stages


class StepsError(ValueError):
    """Too few steps for the segments."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a segment on which guidance is on or off throughout.

    The velocity is smooth in it, so a solver keeps its order, and starts anew with the next piece.

    Attributes:
        start: Time at which it begins.
        end: Time at which it ends.
        steps: Number of equal steps; 0 where the solver chooses them.
        guided: Whether guidance acts.
    """

    start: float
    end: float
    steps: int
    guided: bool


def steps_per_segment(stages: Stages, *, steps: int) -> tuple[int, ...]:
    """Spread ``steps`` over the segments in proportion to length, at least one for each.

    Raises:
        StepsError: There are fewer steps than segments.
    """
    segments = stages.segments
    if steps < len(segments):
        raise StepsError(
            f"steps={steps} is too few: each of the {len(segments)} segments needs at least one."
        )
    ideal = [(segment.end - segment.start) * steps for segment in segments]
    counts = [1] * len(segments)
    for _ in range(steps - len(segments)):
        behind = [want - have for want, have in zip(ideal, counts, strict=True)]
        counts[behind.index(max(behind))] += 1
    return tuple(counts)


def fixed_pieces(
    segment: Segment, *, steps: int, guidance: tuple[float, float] | None
) -> tuple[Piece, ...]:
    """Cut a segment's equal steps into pieces; a step is guided when its middle is.

    Args:
        segment: The segment.
        steps: Number of its steps.
        guidance: First and last time at which guidance acts; None means never.
    """
    length = segment.end - segment.start
    edges = [segment.start + length * (step / steps) for step in range(steps)] + [segment.end]
    middles = [(start + end) / 2 for start, end in pairwise(edges)]
    pieces, first = [], 0
    for guided, run in groupby(middles, lambda time: _acts(guidance, time)):
        last = first + len(list(run))
        pieces.append(Piece(start=edges[first], end=edges[last], steps=last - first, guided=guided))
        first = last
    return tuple(pieces)


def adaptive_pieces(segment: Segment, *, guidance: tuple[float, float] | None) -> tuple[Piece, ...]:
    """Cut a segment where guidance begins and ends.

    Args:
        segment: The segment.
        guidance: First and last time at which guidance acts; None means never.
    """
    inside = {time for time in guidance or () if segment.start < time < segment.end}
    edges = (segment.start, *sorted(inside), segment.end)
    return tuple(
        Piece(start=start, end=end, steps=0, guided=_acts(guidance, (start + end) / 2))
        for start, end in pairwise(edges)
    )


def _acts(guidance: tuple[float, float] | None, time: float) -> bool:
    return guidance is not None and guidance[0] <= time <= guidance[1]
