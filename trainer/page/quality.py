"""What was measured: a table and a curve for each protocol, for only those figures compare."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from trainer.evaluation.figures import Distance, RealFigures
from trainer.evaluation.reports import Measurement
from trainer.evaluation.spread import common_seeds
from trainer.page.arms import Arm, average, lines, mean_and_spread
from trainer.page.chart import line_chart, swatch
from trainer.page.markup import Html, join, tag
from trainer.page.story import RunStory
from trainer.page.tables import table

_REFERENCES = {
    "test": "held-out images",
    "train": "training images",
    "file": "statistics of a file",
}
_TOLD_ELSEWHERE = ("attempt", "extractors", "reference", "held_out_index", "samples", "seed")


class _Figure(NamedTuple):
    """One distance of one checkpoint."""

    arm: Arm
    story: RunStory
    images: int
    measurement: Measurement
    distance: Distance

    @property
    def protocol(self) -> tuple[str, str]:
        """What it has in common with figures that it compares with; seeds may differ."""
        features = self.distance.features
        return features, self.measurement.protocol(features, any_seed=True)

    @property
    def untrained(self) -> float | None:
        """What the initial weights reach, where the run's own report tells it."""
        final = self.story.final
        is_own = (
            final is not None
            and final.images == self.images
            and final.features == self.distance.features
            and final.measurement.protocol(final.features)
            == self.measurement.protocol(final.features)
        )
        return final.frechet_untrained if final is not None and is_own else None


_COLUMNS: tuple[tuple[str, str, Callable[[_Figure], float | None]], ...] = (
    ("Fréchet", ".4f", lambda each: each.distance.frechet),
    ("Fréchet of real images", ".4f", lambda each: _real(each.distance, "frechet")),
    ("times real", ".3g", lambda each: _times_real(each.distance)),
    ("untrained", ".4f", lambda each: each.untrained),
    ("spatial Fréchet", ".4g", lambda each: _more(each.distance, "spatial_frechet")),
    ("Inception Score", ".4g", lambda each: _more(each.distance, "inception_score")),
    ("kernel distance", ".4g", lambda each: _more(each.distance, "kernel_distance")),
    ("precision", ".3f", lambda each: _more(each.distance, "precision")),
    ("recall", ".3f", lambda each: _more(each.distance, "recall")),
    ("sliced Wasserstein", ".4g", lambda each: _more(each.distance, "sliced_wasserstein")),
    (
        "sliced Wasserstein of real images",
        ".4g",
        lambda each: _more(each.distance.real, "sliced_wasserstein"),
    ),
    ("diversity", ".4g", lambda each: each.distance.diversity),
    ("diversity of real images", ".4g", lambda each: _real(each.distance, "diversity")),
    ("nearest training image to samples", ".4g", lambda each: _nearest(each.distance, "mean")),
    ("nearest to held-out images", ".4g", lambda each: _real_nearest(each.distance)),
    (
        "samples closer than 99 % of held-out images",
        ".1%",
        lambda each: _nearest(each.distance, "close_share"),
    ),
    ("extractor's accuracy", ".1%", lambda each: each.distance.held_out_accuracy),
)


def _real(distance: Distance, name: str) -> float | None:
    value: float | None = None if distance.real is None else getattr(distance.real, name)
    return value


def _more(figures: Distance | RealFigures | None, name: str) -> float | None:
    if figures is None or figures.more is None:
        return None
    value: float | None = getattr(figures.more, name)
    return value


def _times_real(distance: Distance) -> float | None:
    real = _real(distance, "frechet")
    return distance.frechet / real if real else None


def _nearest(distance: Distance, name: str) -> float | None:
    value: float | None = None if distance.nearest is None else getattr(distance.nearest, name)
    return value


def _real_nearest(distance: Distance) -> float | None:
    return None if distance.real is None else distance.real.nearest.mean


def quality_section(arms: Sequence[Arm]) -> Html:
    """Return a table for each protocol, and a curve where several checkpoints were measured."""
    groups: defaultdict[tuple[str, str], list[_Figure]] = defaultdict(list)
    for figure in _figures(arms):
        groups[figure.protocol].append(figure)
    if not groups:
        return Html()
    # What is known of most runs and checkpoints first.
    ranked = sorted(groups.values(), key=lambda group: (-len(group), group[0].distance.features))
    parts = [_protocol(arms, group) for group in ranked]
    note = (
        "Figures compare only where they were measured alike, so each table is of one protocol. "
        "The yardstick is what real training images reach in the place of the samples."
    )
    return tag("section", tag("h2", "Quality"), tag("p", note, class_="note"), *parts, id="quality")


def _figures(arms: Sequence[Arm]) -> Iterable[_Figure]:
    """Return all that was measured; of what was measured again the same way, the last."""
    found: dict[tuple[object, ...], _Figure] = {}
    for arm in arms:
        for story in arm.stories:
            for images, measured in story.distances.items():
                for each in measured:
                    figure = _Figure(arm, story, images, each.measurement, each.distance)
                    key = (story.uri, images, *figure.protocol, each.measurement.seed)
                    found[key] = figure
    return found.values()


def _protocol(arms: Sequence[Arm], figures: Sequence[_Figure]) -> Html:
    measurement, features = figures[0].measurement, figures[0].distance.features
    reference = _REFERENCES.get(measurement.reference, measurement.reference)
    title = f"Fréchet distance by {features} to {reference}, {measurement.samples:,} samples"
    shown = _newest(figures)
    return tag(
        "div",
        tag("h3", title),
        tag("p", _protocol_words(measurement, features), class_="protocol"),
        _table(shown),
        _curve(arms, figures, features),
        class_="protocol-part",
    )


def _protocol_words(measurement: Measurement, features: str) -> str:
    told = {**asdict(measurement)}
    digest = measurement.extractors.get(features, "")
    words = [f"extractor {features}" + (f" (SHA-256 {digest[:12]}…)" if digest else "")]
    words.append(f"reference SHA-256 {measurement.held_out_index[:12]}…")
    for name, value in told.items():
        # Older reports do not tell everything.
        if name not in _TOLD_ELSEWHERE and value not in (None, ""):
            words.append(f"{name.replace('_', ' ')} {_in_words(value)}")
    return "; ".join(words)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={each}" for key, each in value.items() if each is not None)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _newest(figures: Sequence[_Figure]) -> list[_Figure]:
    """Leave of each run what was measured of its newest checkpoint of those measured."""
    newest: dict[str, int] = {}
    for each in figures:
        newest[each.story.uri] = max(each.images, newest.get(each.story.uri, 0))
    return [each for each in figures if each.images == newest[each.story.uri]]


def _table(figures: Sequence[_Figure]) -> Html:
    head = ["run", "seed", "images", "sampling seed"]
    columns = [
        column for column in _COLUMNS if any(column[2](each) is not None for each in figures)
    ]
    head += [title for title, _, _ in columns]
    rows = [
        [
            join(swatch(each.arm.colour), each.story.name),
            "" if each.story.seed is None else str(each.story.seed),
            f"{each.images:,}",
            str(each.measurement.seed),
            *(_written(value(each), how) for _, how, value in columns),
        ]
        for each in figures
    ]
    spreads = list(_spreads(figures, [value for _, _, value in columns]))
    return table(head, rows, last=spreads, numbers_from=1)


def _spreads(
    figures: Sequence[_Figure], columns: Sequence[Callable[[_Figure], float | None]]
) -> Iterator[list[str]]:
    """Return rows of mean and spread: over sampling seeds of a run, over runs of an arm."""
    by_arm: defaultdict[tuple[str, int], dict[str, list[_Figure]]] = defaultdict(dict)
    for each in figures:
        by_arm[each.arm.label, each.images].setdefault(each.story.uri, []).append(each)
    for (label, images), runs in by_arm.items():
        for group in runs.values():
            if len(group) > 1:
                name, count = group[0].story.name, f"{len(group)} seeds"
                values = [[column(each) for each in group] for column in columns]
                yield [name, "", f"{images:,}", count, *map(_spread, values)]
        # Two runs of one seed are one training done twice, whose mean counts once.
        trained: defaultdict[object, list[list[_Figure]]] = defaultdict(list)
        for uri, group in runs.items():
            seed = group[0].story.seed
            trained[uri if seed is None else ("seed", seed)].append(group)
        if len(trained) > 1:
            common = common_seeds(
                [{each.measurement.seed for each in run} for run in runs.values()]
            )
            used = [
                [
                    [each for each in run if not common or each.measurement.seed in common]
                    for run in alike
                ]
                for alike in trained.values()
            ]
            values = [
                [_mean([_mean([column(each) for each in run]) for run in alike]) for alike in used]
                for column in columns
            ]
            count = f"{len(trained)} seeds"
            yield [label, count, f"{images:,}", "", *map(_spread, values)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return average(known) if len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return mean_and_spread(known) if len(known) == len(values) else ""


def _written(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _curve(arms: Sequence[Arm], figures: Sequence[_Figure], features: str) -> Html:
    """Draw a curve for each run, all of it of the same sampling seeds."""
    curves = _alike(figures)
    if len({images for curve in curves.values() for images in curve}) < 2:
        return Html()
    real = [value for each in figures if (value := _real(each.distance, "frechet"))]
    return line_chart(
        f"Fréchet distance ({features})",
        "over the run, lower is better; by the protocol above",
        lines(arms, lambda story: curves.get(story.uri, {})),
        log=True,
        levels=[("real images", average(real))] if real else [],
    )


def _alike(figures: Sequence[_Figure]) -> dict[str, dict[int, float]]:
    """Return distances of each run by images: means over the seeds that all checkpoints share.

    Where they share none, only those with the seed of most checkpoints are in a curve.
    """
    measured: defaultdict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for each in figures:
        measured[each.story.uri, each.images][each.measurement.seed] = each.distance.frechet
    seeds = common_seeds(measured.values())
    if not seeds:
        counts = Counter(seed for by_seed in measured.values() for seed in by_seed)
        seeds = {min(counts, key=lambda seed: (-counts[seed], seed))}
    curves: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for (uri, images), by_seed in sorted(measured.items()):
        if seeds <= by_seed.keys():
            curves[uri][images] = average([by_seed[seed] for seed in sorted(seeds)])
    return dict(curves)
