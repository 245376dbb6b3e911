"""Figures over seeds: what the noise of samples changes, and what the seed of training does.

Only figures of one protocol are put together. Runs count as one training if their settings differ
in `train.seed` alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from trainer.config.job import changed_science
from trainer.evaluation.figures import Distance
from trainer.evaluation.reports import Measurement

_SEED = "train.seed:"
_SAMPLES = "eval/"


@dataclass(frozen=True, kw_only=True)
class FigureSpread:
    """One figure over seeds.

    Attributes:
        mean: Over seeds of training, of the mean over each run's sets of samples.
        sampling: Standard deviation over sets of samples of one run, the mean over runs of its
            square; None for one set each.
        training: Standard deviation of what the mean is taken over; None for one seed. Runs of the
            same seed are one training done twice, whose agreement tells nothing of seeds.
    """

    mean: float
    sampling: float | None
    training: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredSet:
    """One set of samples of one checkpoint, measured with one extractor.

    Attributes:
        run: What tells its run from all others.
        images: Images that the weights were trained on.
        science: Settings of the run, as its checkpoint records them.
        measurement: How it was measured.
        distance: What was.
        arm: What the run has in common with those that it may be put together with, beside the
            science: in a sweep what varies, but for the seed.
    """

    run: str
    images: int
    science: Mapping[str, Any]
    measurement: Measurement
    distance: Distance
    arm: Mapping[str, str] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        """What sets must have in common to be put together: all but the seeds."""
        return self.measurement.protocol(self.distance.features, any_seed=True)

    @property
    def training_seed(self) -> str:
        """The seed of its training; what tells the run where nothing tells the seed."""
        train = self.science.get("train")
        seed = train.get("seed") if isinstance(train, Mapping) else None
        return f"run {self.run}" if seed is None else f"seed {seed}"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Figures of one training, by one protocol, over seeds.

    Attributes:
        runs: Its runs.
        images: Images that their weights were trained on.
        features: The extractor.
        protocol: Digest of how they were measured, without the seed.
        measurement: The first of the measurements.
        science: Settings of the first run.
        seeds: Seeds of the samples' noise.
        figures: Those of samples, by the names that the tracker shows.
    """

    runs: tuple[str, ...]
    images: int
    features: str
    protocol: str
    measurement: Measurement
    science: Mapping[str, Any] = field(repr=False)
    seeds: tuple[int, ...]
    figures: Mapping[str, FigureSpread]

    def told(self) -> dict[str, Any]:
        """Return what programs are told."""
        told = ("runs", "images", "features", "protocol", "seeds", "figures")
        return {name: getattr(self, name) for name in told}

    @property
    def frechet(self) -> FigureSpread:
        """The Fréchet distance."""
        return self.figures[f"eval/frechet_{self.features}"]


def spreads(measured: Sequence[MeasuredSet]) -> list[Spread]:
    """Put sets of samples together that differ in seeds alone.

    Of a run's sets those count whose seed all runs of the training have, if there is such a seed:
    the noise is then the same for all. Of two measurements of the same set the last counts.

    Args:
        measured: Sets of samples, in any number of runs and protocols.

    Returns:
        One for each training, number of images and protocol, in the order of their first sets.
    """
    groups: list[list[MeasuredSet]] = []
    for each in measured:
        for group in groups:
            if _is_alike(group[0], each):
                group.append(each)
                break
        else:
            groups.append([each])
    return [_spread(group) for group in groups]


def common_seeds(runs: Iterable[Collection[int]]) -> set[int]:
    """Return the seeds of sets of samples that all runs have: the noise is then the same for all.

    Args:
        runs: Of each run, at least one, the seeds of its sets.
    """
    return set.intersection(*map(set, runs))


def _is_alike(one: MeasuredSet, other: MeasuredSet) -> bool:
    if (one.protocol, one.images, one.arm) != (other.protocol, other.images, other.arm):
        return False
    pairs = ((one.science, other.science), (other.science, one.science))  # either may be older
    return one.run == other.run or any(
        all(change.startswith(_SEED) for change in changed_science(*pair)) for pair in pairs
    )


def _spread(group: Sequence[MeasuredSet]) -> Spread:
    runs: dict[str, dict[int, Mapping[str, float]]] = {}
    trained: dict[str, str] = {}
    for each in group:
        runs.setdefault(each.run, {})[each.measurement.seed] = each.distance.metrics()
        trained[each.run] = each.training_seed
    common = common_seeds(runs.values())
    used = [[run[seed] for seed in sorted(common or run)] for run in runs.values()]
    names = [name for name in used[0][0] if name.startswith(_SAMPLES)]
    first = group[0]
    seeds = [trained[run] for run in runs]
    return Spread(
        runs=tuple(runs),
        images=first.images,
        features=first.distance.features,
        protocol=first.protocol,
        measurement=first.measurement,
        science=first.science,
        seeds=tuple(sorted(common or {seed for run in runs.values() for seed in run})),
        figures={
            name: _over_seeds(seeds, [[figures[name] for figures in run] for run in used])
            for name in names
            if all(name in figures for run in used for figures in run)
        },
    )


def _over_seeds(seeds: Sequence[str], values: Sequence[Sequence[float]]) -> FigureSpread:
    """Summarise a figure: of each run, of each set of samples; `seeds` are those of training."""
    by_seed: dict[str, list[float]] = {}
    for seed, run in zip(seeds, values, strict=True):
        by_seed.setdefault(seed, []).append(fmean(run))
    means = [fmean(runs) for runs in by_seed.values()]
    within = [stdev(run) for run in values if len(run) > 1]
    return FigureSpread(
        mean=fmean(means),
        sampling=math.hypot(*within) / len(within) ** 0.5 if within else None,
        training=stdev(means) if len(means) > 1 else None,
    )
