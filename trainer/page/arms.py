"""Runs side by side: those that differ in their seed alone are one arm, drawn in one colour."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trainer.page.chart import LARGEST, Series
from trainer.page.story import RunStory

_MAX_POINTS = 300
_MAX_WORDS = 60
_MAX_VALUE = 500
_NOT_NAMED = ("data_set.", "autoencoder.")

Curve = Mapping[int, float]


class Arm(NamedTuple):
    """Runs whose settings differ in their seed alone."""

    label: str
    colour: int
    stories: list[RunStory]


def arms_of(stories: Sequence[RunStory]) -> list[Arm]:
    """Group runs into arms, in the order of their first runs.

    An arm is called after the settings in which it differs from others, or after its runs.
    """
    groups: dict[str, list[RunStory]] = {}
    for story in stories:
        key = json.dumps(story.science, sort_keys=True, default=str)
        groups.setdefault(key, []).append(story)
    flat = [flattened(group[0].science) for group in groups.values()]
    apart = _telling(flat)
    arms: list[Arm] = []
    for number, (group, settings) in enumerate(zip(groups.values(), flat, strict=True)):
        words = ", ".join(f"{key.rpartition('.')[2]}={settings.get(key, '')}" for key in apart)
        names = ", ".join(story.name for story in group)
        label = words if 0 < len(words) <= _MAX_WORDS else names
        if any(label == arm.label for arm in arms):
            label = f"{label} ({names})"
        arms.append(Arm(label, number, group))
    return arms


def _telling(flat: Sequence[Mapping[str, str]]) -> list[str]:
    """Choose few settings, of short values, that tell all arms apart."""
    keys = {key for each in flat for key in each if not key.startswith(_NOT_NAMED)}
    values = {key: [each.get(key, "") for each in flat] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1]
    chosen: list[str] = []
    for key in sorted(differing, key=lambda key: (len("".join(values[key])), key)):
        chosen.append(key)
        if len({tuple(values[each][arm] for each in chosen) for arm in range(len(flat))}) == len(
            flat
        ):
            break
    return chosen


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as texts by their full names, in their order."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            words = "null" if value is None else str(value)
            flat[f"{prefix}{key}"] = words if len(words) <= _MAX_VALUE else f"{words[:_MAX_VALUE]}…"
    return flat


def lines(arms: Sequence[Arm], curve: Callable[[RunStory], Curve]) -> list[Series]:
    """Return what a chart draws: a line for each arm, the mean of its runs with their spread.

    Args:
        arms: The arms.
        curve: What is drawn of a run; nothing leaves the run out.
    """
    drawn = []
    for arm in arms:
        curves = [found for story in arm.stories if (found := curve(story))]
        if len(curves) == 1:
            points = thinned(sorted(curves[0].items()))
            drawn.append(Series(label=arm.label, points=points, colour=arm.colour))
        elif curves:
            drawn += _with_spread(arm, curves)
    return drawn


def _with_spread(arm: Arm, curves: Sequence[Curve]) -> list[Series]:
    common = set.intersection(*(_known(each) for each in curves))
    single = [
        Series(
            label=arm.label,
            points=thinned(sorted(each.items())),
            colour=arm.colour,
            is_thin=bool(common),
        )
        for each in curves
    ]
    if not common:
        return single
    columns = [(images, [each[images] for each in curves]) for images in sorted(common)]
    mean = Series(
        label=f"{arm.label} (mean of {len(curves)})",
        points=thinned([(images, average(values)) for images, values in columns]),
        colour=arm.colour,
        band=[(x, min(values), max(values)) for x, values in thinned(columns)],
    )
    return [*single, mean]


def _known(curve: Curve) -> set[int]:
    return {images for images, value in curve.items() if abs(value) < LARGEST}


def thinned(points: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Leave evenly spread points, the first and the last among them."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    step = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(number * step)] for number in range(_MAX_POINTS)]


def mean_and_spread(values: Sequence[float]) -> str:
    """Write the mean of several values with their standard deviation, if they differ.

    Nothing is written of what is no number: a ratio may be larger than a number can be.
    """
    if len(set(values)) == 1:
        return f"{values[0]:.4g}"
    if not all(map(math.isfinite, values)):
        return ""
    size = max(map(abs, values))
    spread = statistics.stdev([value / size for value in values]) * size
    return f"{average(values):.4g} ± {spread:.2g}"


def average(values: Sequence[float]) -> float:
    """Return the mean of values, of which the sum may be larger than a number can be."""
    return sum(value / len(values) for value in values)
