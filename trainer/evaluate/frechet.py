"""Fréchet distance between two sets of features (Heusel et al. 2017, equation 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_IMAGES = 2
LEAST_IMAGES_IN_HALVES = 2 * LEAST_IMAGES


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
        wide = _checked(features)
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
        wide = _checked(features)
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
    if images < LEAST_IMAGES:
        raise FrechetError(
            f"a Fréchet distance needs at least {LEAST_IMAGES} images, got {images}: hold out more "
            "images of the data set"
        )


def _checked(features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
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
