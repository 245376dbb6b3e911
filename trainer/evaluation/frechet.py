"""The Fréchet distance (Heusel et al. 2017, equation 6) between summaries of features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.evaluation.learned_features import one_thread


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


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), 0 for equal statistics.

    The trace of the root is taken from eigenvalues of the symmetric product R^T C2 R with R R^T =
    C1, on one thread of the processor. R is C1's Cholesky factor. The rank-deficient covariances
    of small samples have none: there R has the eigenvectors whose values are more than rounding.

    Raises:
        FrechetError: It is not finite.
    """
    with one_thread():
        covariance = torch.from_numpy(first.covariance)
        root, is_deficient = torch.linalg.cholesky_ex(covariance)
        if is_deficient:
            values, vectors = torch.linalg.eigh(covariance)
            rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
            root = vectors[:, values > rounding] * values[values > rounding].sqrt()
        product = torch.linalg.eigvalsh(root.T @ torch.from_numpy(second.covariance) @ root)
        root_trace = float(product.clamp(min=0.0).sqrt().sum())
    shift = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    distance = float(shift @ shift + traces - 2.0 * root_trace)
    if not math.isfinite(distance):
        raise FrechetError("there is no Fréchet distance of statistics that are not finite")
    return max(0.0, distance)
