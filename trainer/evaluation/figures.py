"""Figures of sets of images, as reports tell them; who reads them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CLOSE = 0.01
"""Share of the held-out images that count as close to a training image."""


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """How near images are to training images, beside held-out ones.

    Attributes:
        mean: Mean distance to the nearest training image.
        close_share: Share of them that are nearer to a training image than 99 % of the held-out
            images are: 0.01 for new images, and more where training images are copied.
    """

    mean: float
    close_share: float

    @classmethod
    def of(cls, distances: Tensor, *, held_out: Tensor) -> Nearness:
        """Summarise distances beside those of held-out images."""
        bound = held_out.quantile(_CLOSE)
        return cls(
            mean=float(distances.mean()), close_share=float((distances < bound).double().mean())
        )


@dataclass(frozen=True, kw_only=True)
class LabelAgreement:
    """How often a classifier reads the requested class.

    Attributes:
        samples: Share of generated images read as the class they were asked to show.
        held_out: Share of held-out real images read right; the classifier's own limit.
    """

    samples: float
    held_out: float


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
