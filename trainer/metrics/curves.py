"""Curves of a run's metrics over images, and how far two of them are apart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.documents import read_json, validate_as

Curves = Mapping[str, Mapping[int, float]]
"""For each metric its values by images seen."""


class CurvesError(ValueError):
    """Curves that cannot be read, or cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two curves of one metric are apart.

    Attributes:
        metric: Name of the metric.
        points: Positions at which both have a value.
        unmatched: Positions at which only one of them has.
        largest: Largest relative difference, |a - b| over the larger of |a| and |b|.
        largest_at: Images at which it is.
        first_at: Images at which the difference is first above the tolerance; None if never.
        first: The two values there.
    """

    metric: str
    points: int
    unmatched: int
    largest: float
    largest_at: int
    first_at: int | None
    first: tuple[float, float] | None


def differences(a: Curves, b: Curves, *, tolerance: float = 0.0) -> tuple[Difference, ...]:
    """Compare curves at the positions that both have.

    Args:
        a: Curves.
        b: Curves of the same metrics.
        tolerance: Relative difference up to which two values agree; 0 asks for equal bits.

    Returns:
        One difference for each metric, by name.

    Raises:
        CurvesError: They hold different metrics, or a metric has no position in common.
    """
    if not a or set(a) != set(b):
        raise CurvesError(
            f"the curves do not hold the same metrics: only the first has "
            f"{sorted(set(a) - set(b))}, only the second {sorted(set(b) - set(a))}, both have "
            f"{sorted(set(a) & set(b))}. Choose metrics that both have with --metrics."
        )
    return tuple(_difference(name, a[name], b[name], tolerance) for name in sorted(a))


def _difference(
    metric: str, a: Mapping[int, float], b: Mapping[int, float], tolerance: float
) -> Difference:
    common = sorted(set(a) & set(b))
    if not common:
        raise CurvesError(
            f"the curves of {metric} have no images in common: one is at {_span(a)}, the other at "
            f"{_span(b)}. Runs are comparable that use the same train.global_batch and "
            "runtime.log_interval_images."
        )
    apart = {images: _relative(a[images], b[images]) for images in common}
    largest_at = max(common, key=lambda images: apart[images])
    first_at = next((images for images in common if apart[images] > tolerance), None)
    return Difference(
        metric=metric,
        points=len(common),
        unmatched=len(set(a) ^ set(b)),
        largest=apart[largest_at],
        largest_at=largest_at,
        first_at=first_at,
        first=None if first_at is None else (a[first_at], b[first_at]),
    )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a file of curves holds."""

    images: list[int]
    metrics: dict[str, list[float]]


def read_curves(path: Path) -> Curves:
    """Read curves from a JSON file that `curves_as_json` wrote.

    Raises:
        CurvesError: The file is missing or holds something else.
    """
    try:
        # A loss that is no number is part of a curve.
        held = validate_as(_Held, read_json(path, finite=False))
        return {
            name: dict(zip(held.images, values, strict=True))
            for name, values in held.metrics.items()
        }
    except OSError as error:
        raise CurvesError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CurvesError(
            f'{path} does not hold curves: it must be JSON like {{"images": [64, 128], "metrics": '
            f'{{"loss/total": [2.0, 1.9]}}}} ({error}).'
        ) from error


def curves_as_json(curves: Curves, *, about: Mapping[str, Any]) -> str:
    """Render curves, every number to its last bit.

    Args:
        curves: Metrics that all have values at the same positions.
        about: What is known about their origin, for readers.

    Raises:
        CurvesError: The positions of the metrics differ.
    """
    positions = {tuple(sorted(curve)) for curve in curves.values()}
    if len(positions) != 1:
        raise CurvesError(f"the metrics {sorted(curves)} do not have the same positions.")
    (images,) = positions
    metrics = {name: [curve[at] for at in images] for name, curve in sorted(curves.items())}
    return json.dumps({"about": dict(about), "images": images, "metrics": metrics}, indent=1) + "\n"


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    apart = abs(a - b) / max(abs(a), abs(b))
    return apart if math.isfinite(apart) else math.inf


def _span(curve: Mapping[int, float]) -> str:
    return f"{min(curve)} … {max(curve)} ({len(curve)} points)" if curve else "no point"
