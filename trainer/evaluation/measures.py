"""Figures of a set of images by one extractor; those beside the Fréchet distance are made here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trainer.evaluation.feature_sets import FeatureSet, Nearness
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


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Further figures of a set of images; None is what cannot be measured.

    Attributes:
        spatial_frechet: The Fréchet distance of spatial features, sFID; of "inception" alone.
        inception_score: The mean over splits of 5,000 images; of "inception" alone.
        kernel_distance: Squared maximum mean discrepancy with a cubic kernel; KID of "inception".
        precision: Share of the images near a real one.
        recall: Share of the real images near one of them.
        sliced_wasserstein: See `sliced_wasserstein`.
        compared: Images that the last four are of.
        compared_real: Real images that they are compared with.
    """

    spatial_frechet: float | None = None
    inception_score: float | None = None
    kernel_distance: float | None = None
    precision: float | None = None
    recall: float | None = None
    sliced_wasserstein: float | None = None
    compared: int = 0
    compared_real: int = 0

    def metrics(self, features: str, *, group: str) -> dict[str, float | None]:
        """Return the figures under the names the tracker shows.

        Args:
            features: Name of the extractor.
            group: What the names begin with.
        """
        return {
            f"{group}/{features}_spatial_frechet": self.spatial_frechet,
            f"{group}/inception_score": self.inception_score,
            f"{group}/{features}_kernel_distance": self.kernel_distance,
            f"{group}/{features}_precision": self.precision,
            f"{group}/{features}_recall": self.recall,
            f"{group}/{features}_sliced_wasserstein": self.sliced_wasserstein,
        }


@dataclass(frozen=True, kw_only=True)
class RealFigures:
    """What real training images reach in the place of the samples: the yardstick.

    Attributes:
        images: How many were measured: as many as there are samples, or all that there are.
        frechet: Their Fréchet distance to the held-out images.
        diversity: See `Distance`.
        nearest: How near held-out images are to training images.
        more: What else tells them from the reference; None in reports of older versions.
    """

    images: int
    frechet: float
    diversity: float | None
    nearest: Nearness
    more: Measures | None = None


@dataclass(frozen=True, kw_only=True)
class Distance:
    """One extractor's Fréchet distance with what it has to be compared with.

    Attributes:
        features: Name of the extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better.
        diversity: Variance of the samples' features within classes, summed over features.
        nearest: How near samples are to training images.
        more: What else tells samples from real images; None in reports of older versions.
        real: What real images reach; None where there are no training images to read, and in
            reports of older versions.
        held_out_accuracy: For "learned_conv": fraction of held-out images its classifier reads
            right.
    """

    features: str
    frechet: float
    diversity: float | None = None
    nearest: Nearness | None = None
    more: Measures | None = None
    real: RealFigures | None = None
    held_out_accuracy: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names the tracker shows.

        What no checkpoint changes is in a group of its own, or its dots would hide the curves.
        """
        name, real, nearest = self.features, self.real, self.nearest
        values = {f"eval/frechet_{name}": self.frechet, f"eval/{name}_diversity": self.diversity}
        if nearest is not None:
            values[f"eval/{name}_nearest_train"] = nearest.mean
            values[f"eval/{name}_close_to_train"] = nearest.close_share
        if self.more is not None:
            values |= self.more.metrics(name, group="eval")
        if real is not None:
            values[f"reference/frechet_{name}"] = real.frechet
            values[f"reference/{name}_diversity"] = real.diversity
            values[f"reference/{name}_nearest_train"] = real.nearest.mean
            if real.more is not None:
                values |= real.more.metrics(name, group="reference")
        return {key: value for key, value in values.items() if value is not None}


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
