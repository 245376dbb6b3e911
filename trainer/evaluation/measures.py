"""Measuring of a set of images by one extractor: the figures beside the Fréchet distance."""

from __future__ import annotations

from typing import NamedTuple

from trainer.evaluation.feature_sets import FeatureSet
from trainer.evaluation.figures import Distance, Measures
from trainer.evaluation.frechet import FeatureStatistics, frechet_distance
from trainer.evaluation.pairs import ComparedImages, coverage, kernel_distance
from trainer.evaluation.sliced import sliced_wasserstein
from trainer.evaluation.sums import MIN_IMAGES


class Target(NamedTuple):
    """What images are measured against, in the features of one extractor."""

    images: int
    """How many they are, or 0 where only statistics are stored."""
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None
    """Of spatial features, where the extractor has them and so has the reference."""
    compared: ComparedImages | None
    """Images of which features are kept; None where only statistics are stored."""

    @classmethod
    def of(cls, images: FeatureSet, compared: ComparedImages) -> Target:
        """Measure against a set of images that all ranks have summed up."""
        return cls(
            images=images.sums.count,
            statistics=images.sums.statistics(),
            spatial=images.spatial.statistics() if images.spatial.count else None,
            compared=compared,
        )


class Measured(NamedTuple):
    """Figures of one set of samples."""

    distances: tuple[Distance, ...]
    """One for each extractor; none where there are too few held-out images."""
    nfe: tuple[float, ...]
    """Network evaluations for a sample in each segment."""


def measures(images: FeatureSet, compared: ComparedImages, target: Target) -> Measures:
    """Measure a set of images that all ranks have summed up; a collective call.

    Args:
        images: The set.
        compared: Those of which features are kept.
        target: What they are measured against.
    """
    spatial = None
    if target.spatial is not None and images.spatial.count:
        spatial = frechet_distance(images.spatial.statistics(), target.spatial)
    found = Measures(spatial_frechet=spatial, inception_score=images.scores.score())
    real = target.compared
    if real is None or min(compared.count, real.count) < MIN_IMAGES:
        return found
    near = coverage(compared, real)
    return Measures(
        spatial_frechet=found.spatial_frechet,
        inception_score=found.inception_score,
        kernel_distance=kernel_distance(compared, real),
        precision=None if near is None else near.precision,
        recall=None if near is None else near.recall,
        sliced_wasserstein=sliced_wasserstein(compared, real),
        compared=compared.count,
        compared_real=real.count,
    )
