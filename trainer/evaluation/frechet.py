"""The Fréchet distance (Heusel et al. 2017, equation 6), to and between real images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import rng
from trainer.evaluation.features import FeatureExtractor

MIN_IMAGES = 2
MIN_IMAGES_IN_HALVES = 2 * MIN_IMAGES


class FrechetError(ValueError):
    """There is no distance of these images."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Gaussian summary of a feature set, in float64.

    Attributes:
        mean: Mean vector, shape [d].
        covariance: Unbiased covariance, shape [d, d].
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @staticmethod
    def of(features: NDArray[np.floating[Any]]) -> FeatureStatistics:
        """Summarise features of shape [n, d].

        Raises:
            FrechetError: If there are fewer than two rows, or a value that is not finite.
        """
        _check_count(len(features))
        wide = _to_finite_float64(features)
        return FeatureStatistics(mean=wide.mean(axis=0), covariance=np.cov(wide, rowvar=False))


class FeatureMoments:
    """Summarises features that come in batches, without keeping them.

    Batches are merged by their means and squared deviations (Chan, Golub and LeVeque 1979), which
    does not cancel as sums of squares would.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: NDArray[np.float64] = np.zeros(0)
        self._deviations: NDArray[np.float64] = np.zeros((0, 0))

    def add(self, features: NDArray[np.floating[Any]]) -> None:
        """Take a batch of shape [n, d].

        Raises:
            FrechetError: If a value is not finite.
        """
        wide = _to_finite_float64(features)
        mean = wide.mean(axis=0)
        deviations = (wide - mean).T @ (wide - mean)
        if self._count:
            shift, total = mean - self._mean, self._count + len(wide)
            share = len(wide) / total
            self._deviations += deviations + np.outer(shift, shift) * (self._count * share)
            self._mean += shift * share
        else:
            self._mean, self._deviations = mean, deviations
        self._count += len(wide)

    def statistics(self) -> FeatureStatistics:
        """Return the summary of everything taken so far.

        Raises:
            FrechetError: If there were fewer than two rows.
        """
        _check_count(self._count)
        return FeatureStatistics(
            mean=self._mean.copy(), covariance=self._deviations / (self._count - 1)
        )


def _check_count(images: int) -> None:
    if images < MIN_IMAGES:
        raise FrechetError(
            f"a Fréchet distance needs at least {MIN_IMAGES} images, got {images}: hold out more "
            "images of the data set"
        )


def _to_finite_float64(features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    wide = features.astype(np.float64)
    if not np.isfinite(wide).all():
        raise FrechetError(
            "features hold values that are not finite: the samples have diverged. Look at the "
            "loss; train with a lower optim.learning_rate, or measure an earlier checkpoint"
        )
    return wide


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), 0 for equal statistics.

    The trace of the root is taken from eigenvalues of the symmetric product C1^½ C2 C1^½, which
    is stable for the rank-deficient covariances of small samples.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.covariance @ root)
    root_trace = np.sqrt(np.clip(product, 0.0, None)).sum()
    shift = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(max(0.0, shift @ shift + traces - 2.0 * root_trace))


class DistanceToReal:
    """Measures sets of samples against the same real images with the same features.

    Args:
        extractor: Maps images to features.
        real: Batches of held-out real images [b, c, h, w] in [-1, 1].
        device: Where features are extracted.
        batch: Samples whose features are extracted at a time.

    Attributes:
        real_images: How many real images there are.
        between_halves: One half of the real images against the other: what a perfect generator
            could reach with so few images; None where the halves would be too small.

    Raises:
        FrechetError: There are fewer than two real images.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        real: Iterable[Tensor],
        *,
        device: torch.device,
        batch: int,
    ) -> None:
        self._extractor = extractor
        self._device = device
        self._batch = batch
        self._moments = FeatureMoments()
        parts = [self._extract(images) for images in real]
        features = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        self._reference = FeatureStatistics.of(features)
        self.real_images = len(features)
        self.between_halves = _between_halves(features)

    def __call__(self, samples: Tensor) -> float:
        """Return the distance of samples [n, c, h, w]."""
        self.add(samples)
        return self.take()

    def add(self, samples: Tensor) -> None:
        """Take part of the samples, seen as the 8-bit pictures they become; none are kept."""
        seen = ((samples * 127.5 + 127.5).round().clamp(0, 255) - 127.5) / 127.5
        for part in torch.split(seen, self._batch):
            self._moments.add(self._extract(part))

    def take(self) -> float:
        """Return the distance of all samples added, and begin again with none."""
        moments, self._moments = self._moments, FeatureMoments()
        return frechet_distance(moments.statistics(), self._reference)

    def _extract(self, images: Tensor) -> NDArray[np.float32]:
        features: NDArray[np.float32] = self._extractor(images.to(self._device)).cpu().numpy()
        return features


def _between_halves(features: NDArray[np.float32]) -> float | None:
    if len(features) < MIN_IMAGES_IN_HALVES:
        return None
    generator = torch.Generator().manual_seed(rng.derive_seed(0, "real halves"))
    order = torch.randperm(len(features), generator=generator).numpy()
    half = len(features) // 2
    return frechet_distance(
        FeatureStatistics.of(features[order[:half]]), FeatureStatistics.of(features[order[half:]])
    )
