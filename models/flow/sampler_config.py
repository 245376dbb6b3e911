"""How to draw samples: solver, guidance, and the steps that each segment takes."""

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

from models.flow.stages import Segment, Stages
from models.flow.tableaus import SOLVERS


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


_ADAPTIVE = "dopri5"
MAX_STEPS = 10_000
"""Beyond it, rounding errors of so many steps in fp32 are larger than what shorter ones gain."""
MIN_TOLERANCE = 1e-9
"""A hundredth of what fp32 tells apart; below, every error that a solver estimates is rounding."""


class SamplerConfigError(ValueError):
    """Sampler settings that cannot be carried out."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to draw samples.

    Attributes:
        solver: "euler", "midpoint", "heun" or "ab2" (Adams-Bashforth of order 2) with fixed steps;
            "dopri5" (paper) with steps of its own choice.
        steps: Steps over the whole time axis, spread over the segments by their length, at most
            10,000; dopri5 does not use them.
        absolute_tolerance: Error that dopri5 allows in one step, whatever the state; 1e-9 to 1.
        relative_tolerance: Error that dopri5 allows in one step, in proportion to the state; 1e-9
            to 1.
        adaptive_group: Images that dopri5 integrates together, with common steps. At 1 an image
            depends on its own noise and label alone; more images make fewer and larger network
            calls, but each then depends, within the tolerances, on the others of its group.
        guidance_scale: Classifier-free guidance scale; 1 is no guidance.
        guidance_interval: First and last time at which guidance acts; None means always. A fixed
            step is guided when its middle lies inside.

    Raises:
        SamplerConfigError: A value is out of range or unknown.
    """

    solver: Literal["euler", "midpoint", "heun", "ab2", "dopri5"] = "heun"
    steps: int = 40
    absolute_tolerance: float = 1e-5
    relative_tolerance: float = 1e-5
    adaptive_group: int = 1
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.adaptive and self.solver not in SOLVERS:
            known = sorted((*SOLVERS, _ADAPTIVE))
            raise SamplerConfigError(f"solver={self.solver!r} is unknown; use one of {known}.")
        for name in ("steps", "adaptive_group"):
            if getattr(self, name) < 1:
                raise SamplerConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.steps > MAX_STEPS:
            raise SamplerConfigError(
                f"steps={self.steps} must be at most {MAX_STEPS}; usual is 40. More add rounding "
                "errors, and no accuracy."
            )
        for name in ("absolute_tolerance", "relative_tolerance"):
            if not MIN_TOLERANCE <= getattr(self, name) <= 1:
                raise SamplerConfigError(
                    f"{name}={getattr(self, name)} must lie in {MIN_TOLERANCE:g} … 1; usual is "
                    "1e-5. No network in fp32 can keep to less."
                )
        if self.guidance_scale < 0:
            raise SamplerConfigError(
                f"guidance_scale={self.guidance_scale} must not be negative; 1 is no guidance."
            )
        interval = self.guidance_interval
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise SamplerConfigError(
                f"guidance_interval={interval} must be two times with 0 <= first <= last <= 1."
            )

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.solver == _ADAPTIVE

    def plan(self, stages: Stages) -> tuple[tuple[Piece, ...], ...]:
        """Cut every segment into pieces that are guided throughout or not at all.

        Raises:
            StepsError: There are fewer steps than segments.
        """
        segments = stages.segments
        guidance = None if self.guidance_scale == 1 else self.guidance_interval or (0.0, 1.0)
        if self.adaptive:
            return tuple(adaptive_pieces(segment, guidance=guidance) for segment in segments)
        return tuple(
            fixed_pieces(segment, steps=steps, guidance=guidance)
            for segment, steps in zip(
                segments, steps_per_segment(stages, steps=self.steps), strict=True
            )
        )


def check_shared(share_coarse: int, *, stages: Stages, config: SamplerConfig, images: int) -> None:
    """Refuse to share coarse scales where that cannot be done.

    Args:
        share_coarse: How many images share them; 1 is always possible.
        stages: Those of the flow.
        config: The sampler.
        images: How many images are drawn.

    Raises:
        SamplerConfigError: Naming what is in the way.
    """
    if share_coarse < 1:
        raise SamplerConfigError(f"share_coarse={share_coarse} must be at least 1.")
    if images % share_coarse:
        raise SamplerConfigError(
            f"{images} images are no whole layouts of share_coarse={share_coarse} images each."
        )
    if share_coarse > 1 and stages.scales == 1:
        raise SamplerConfigError(
            f"share_coarse={share_coarse} needs two or more scales: with one there is nothing "
            "coarse to share."
        )
    if share_coarse > 1 and config.adaptive:
        raise SamplerConfigError(
            f"share_coarse={share_coarse} needs a solver of fixed steps, such as heun: with "
            f"solver={config.solver} the steps of the coarse scales depend on the finest."
        )


def whole_layouts(batch: int, share_coarse: int) -> int:
    """Return the most images of one network call that are whole layouts.

    Args:
        batch: Most images of a call.
        share_coarse: How many images are variations of one layout; 1 or more.

    Raises:
        SamplerConfigError: There is room for none.
    """
    if batch < 1:
        raise SamplerConfigError(f"a batch of {batch} images must have at least 1.")
    if batch < share_coarse:
        raise SamplerConfigError(
            f"share_coarse={share_coarse} images of one layout are drawn together, and "
            f"batch={batch} has no room for them; raise batch, or share among fewer."
        )
    return batch - batch % share_coarse


def nfe_per_segment(config: SamplerConfig, stages: Stages) -> tuple[int, ...]:
    """Count by formula the network evaluations of one sample in each segment.

    Args:
        config: Sampler with fixed steps; a guided pair counts as two.
        stages: The flow's.

    Raises:
        SamplerConfigError: The solver chooses its own steps.
        StepsError: There are fewer steps than segments.
    """
    if config.adaptive:
        raise SamplerConfigError(
            f"solver={config.solver} chooses its own steps: its evaluations are known once they "
            "are made, from Samples.nfe."
        )
    solver = SOLVERS[config.solver]
    return tuple(
        sum(solver.evaluations(piece.steps) * (1 + piece.guided) for piece in pieces)
        for pieces in config.plan(stages)
    )
