"""When each scale is active: critical times, stages and sampling segments."""

from dataclasses import dataclass
from itertools import pairwise

MAX_SCALES = 32
"""Each scale halves an image, and none has 2**32 elements along a side."""


class StagesError(ValueError):
    """Critical times that do not cut [0, 1] into segments."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the time axis on which the same scales are active.

    Attributes:
        start: Time at which it begins; the scale at position ``active - 1`` enters here.
        end: Time at which it ends.
        active: Number of active scales, the coarsest ones.
    """

    start: float
    end: float
    active: int


@dataclass(frozen=True)
class Stages:
    """Cuts the time axis at the critical times; scale k lives on [T_{k+1}, 1].

    Attributes:
        critical_times: T_1 > T_2 > ... > T_{K-1}, strictly inside (0, 1); empty for one scale.

    Raises:
        StagesError: The times are not strictly decreasing inside (0, 1).
    """

    critical_times: tuple[float, ...]

    def __post_init__(self) -> None:
        fences = (1.0, *self.critical_times, 0.0)
        if not all(later > earlier for later, earlier in pairwise(fences)):
            raise StagesError(
                f"critical_times={self.critical_times} must decrease strictly and lie inside "
                "(0, 1), as in (0.67, 0.33): the finest scale enters last and is listed first."
            )

    @property
    def scales(self) -> int:
        """Number of scales, K."""
        return len(self.critical_times) + 1

    @property
    def activation_times(self) -> tuple[float, ...]:
        """Time at which each scale enters, coarse to fine; the first is 0."""
        return (0.0, *reversed(self.critical_times))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments from noise (t = 0) to data (t = 1)."""
        starts = self.activation_times
        return tuple(
            Segment(start=start, end=end, active=active)
            for active, (start, end) in enumerate(zip(starts, (*starts[1:], 1.0), strict=True), 1)
        )


def default_critical_times(scales: int) -> tuple[float, ...]:
    """Critical times of the paper for 2 and 3 scales, equal parts for more.

    Args:
        scales: Number of scales, K.

    Returns:
        T_1 > ... > T_{K-1}; empty for one scale.

    Raises:
        StagesError: ``scales`` is not between 1 and `MAX_SCALES`.
    """
    if not 1 <= scales <= MAX_SCALES:
        raise StagesError(f"a flow needs 1 to {MAX_SCALES} scales, got scales={scales}.")
    paper = {2: (0.5,), 3: (0.67, 0.33)}
    return paper.get(scales, tuple(1 - k / scales for k in range(1, scales)))
