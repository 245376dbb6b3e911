"""Sums of features and of their products that are exact, so no order of adding changes a bit.

A feature becomes a whole number of quanta. Whole numbers below 2^53 are exact in float64, also in
the matrix products of the fastest library, whatever its order; from there they go into int64. So
the sums of any batches, added on any number of ranks, are the same numbers, and so is every figure
made of them. What a feature loses by its rounding is below 5e-10, and nothing from 2^-6 on: float32
has no finer values there.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluation.frechet import FeatureStatistics, FrechetError
from trainer.host_group import HostGroup

MIN_IMAGES = 2

_QUANTA = 2.0**30
"""In a feature of 1."""
_LIMIT = 2.0**13
"""No feature may reach it; then a feature has less than 2^43 quanta."""
_LOW_BITS = 24
_WORD_BITS = 48
_ROWS = 128
"""Multiplied at a time: 128 products of 2^23 quanta by as many are 2^53."""
_CARRY_AFTER = 256
"""Products that a low word takes, of less than 2^54 each, before its upper bits move up."""


class FeatureSums:
    """Counts, sums and products of feature vectors, by class; at most 2^24 of them.

    They take the memory of two matrices of the features' size, however many images there are.

    Args:
        classes: Number of classes, which are 0 … classes - 1.
    """

    def __init__(self, *, classes: int = 1) -> None:
        self._counts = torch.zeros(classes, dtype=torch.int64)
        self._unusable = torch.zeros(3, dtype=torch.int64)  # not finite, too large, of no class
        self._sums = torch.zeros(2, classes, 0, dtype=torch.int64)
        self._products = torch.zeros(2, 0, 0, dtype=torch.int64)
        self._uncarried = 0

    def add(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Take features of shape [n, d] and classes of shape [n]; None is class 0 for all.

        Values that are not finite, or 2^13 and beyond, are counted and told by `statistics`: then
        it is told on all ranks. So are labels of no class.
        """
        wide = features.double()
        self._make_room(wide)
        of = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
        of = of.to(wide.device)
        finite, small = wide.isfinite().all(1), (wide.abs() < _LIMIT).all(1)
        known = (of >= 0) & (of < len(self._counts))
        self._unusable += torch.stack([~finite, finite & ~small, ~known]).sum(1).cpu()
        of, quanta = of[small & known], (wide[small & known] * _QUANTA).round()
        high = (quanta / 2.0**_LOW_BITS).round()
        low = quanta - high * 2.0**_LOW_BITS
        self._counts += torch.bincount(of.cpu(), minlength=len(self._counts))
        for word, part in zip(self._sums, (high, low), strict=True):
            word.index_add_(0, of, part.long())
        for rows in range(0, len(quanta), _ROWS):
            self._add_products(high[rows : rows + _ROWS], low[rows : rows + _ROWS])

    def _make_room(self, features: Tensor) -> None:
        """Take the number of features and the device of the first batch."""
        if self._sums.shape[2] == 0:
            classes, size, device = len(self._counts), features.shape[1], features.device
            self._sums = torch.zeros(2, classes, size, dtype=torch.int64, device=device)
            self._products = torch.zeros(2, size, size, dtype=torch.int64, device=device)

    def _add_products(self, high: Tensor, low: Tensor) -> None:
        mixed = high.T @ low
        mixed = (mixed + mixed.T).long()
        upper, lower = self._products
        upper += (high.T @ high).long() + (mixed >> _LOW_BITS)
        lower += (low.T @ low).long() + ((mixed & (2**_LOW_BITS - 1)) << _LOW_BITS)
        self._uncarried += 1
        if self._uncarried == _CARRY_AFTER:
            self._carry()

    def _carry(self) -> None:
        upper, lower = self._products
        upper += lower >> _WORD_BITS
        lower &= 2**_WORD_BITS - 1
        self._uncarried = 0

    def reduce(self, ranks: HostGroup) -> None:
        """Add up what all ranks have taken; a collective call, after which all have it.

        A rank may have taken nothing.
        """
        self._carry()
        size = -ranks.reduce_min(-self._sums.shape[2])
        self._make_room(torch.zeros(0, size))
        self._counts = ranks.reduce_sum(self._counts)
        self._unusable = ranks.reduce_sum(self._unusable)
        self._sums = ranks.reduce_sum(self._sums.cpu())
        self._products = ranks.reduce_sum(self._products.cpu())
        self._carry()

    @property
    def count(self) -> int:
        """How many vectors were taken and can be used."""
        return int(self._counts.sum())

    def statistics(self) -> FeatureStatistics:
        """Return mean and covariance of everything taken so far, each number rounded once.

        Raises:
            FrechetError: A value was not finite or too large, or there were fewer than two vectors.
        """
        self._check()
        count, sums = self.count, _whole(self._sums.sum(1), _LOW_BITS)
        divisor = count * (count - 1) * int(_QUANTA) ** 2
        upper, lower = self._products.cpu()
        covariance = np.empty(upper.shape)
        # Row by row, as whole numbers of Python take ten times the memory.
        for row, total in enumerate(sums):
            products = _whole(torch.stack((upper[row, row:], lower[row, row:])), _WORD_BITS)
            covariance[row, row:] = (count * products - total * sums[row:]) / divisor
            covariance[row:, row] = covariance[row, row:]
        return FeatureStatistics(
            mean=(sums / (count * int(_QUANTA))).astype(np.float64), covariance=covariance
        )

    def within_class_variance(self) -> float | None:
        """Return the mean square of the distance to a class's mean, how varied its images are.

        None where no class has two images.
        """
        counts = self._counts.tolist()
        free = sum(counts) - sum(count > 0 for count in counts)
        if free == 0:
            return None
        diagonal = self._products.cpu().diagonal(dim1=1, dim2=2)
        squares = Fraction(int(_whole(diagonal, _WORD_BITS).sum()))
        for count, words in zip(counts, self._sums.cpu().unbind(1), strict=True):
            if count:
                squares -= Fraction(int((_whole(words, _LOW_BITS) ** 2).sum()), count)
        return float(squares / (free * int(_QUANTA) ** 2))

    def _check(self) -> None:
        not_finite, too_large, unknown = self._unusable.tolist()
        if not_finite:
            raise FrechetError(
                f"features of {not_finite} images hold values that are not finite: the samples "
                "have diverged. Look at the loss; train with a lower optim.learning_rate, or "
                "measure an earlier checkpoint"
            )
        if too_large:
            raise FrechetError(
                f"features of {too_large} images reach {_LIMIT:g}, beyond which they are not "
                "measured: divide the extractor's values by a constant"
            )
        if unknown:
            raise FrechetError(
                f"labels of {unknown} images are not among the {len(self._counts)} classes: set "
                "data.classes to the number of classes of the data set"
            )
        if self.count < MIN_IMAGES:
            raise FrechetError(
                f"a Fréchet distance needs at least {MIN_IMAGES} images, got {self.count}: hold "
                "out more images of the data set"
            )


def _whole(words: Tensor, bits: int) -> NDArray[Any]:
    """Join a high and a low word of each number, [2, n], to whole numbers without bounds, [n]."""
    high, low = words.cpu().numpy().astype(object)
    joined: NDArray[Any] = high * 2**bits + low
    return joined
