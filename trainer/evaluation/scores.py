"""The Inception Score, summed as samples are made."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.host_group import HostGroup

SPLIT_SIZE = 5000
"""Samples of one split, as ADM's evaluation has it."""

_QUANTA = 2.0**38
"""In a probability of 1; those of 5,000 samples stay below 2^63 by far."""


class ScoreSums:
    """Sums of class probabilities and of their negative entropies, split by split, exact.

    Nothing is kept of an image, and no order of adding changes a bit: each number is a whole one of
    quanta of 2^-38.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._sums = torch.zeros(0, 0, dtype=torch.int64)

    def add(self, logits: Tensor, places: Tensor) -> None:
        """Take logits [n, c] of images and their places in the set, [n], which say the split.

        What is not finite is left out: the set's other sums refuse it.
        """
        logs = logits.double().log_softmax(dim=1)
        probabilities = logs.exp()
        negative_entropy = (probabilities * logs).sum(dim=1, keepdim=True)
        values = torch.cat((probabilities, negative_entropy), dim=1).cpu()
        usable = values.isfinite().all(1)
        splits = (places // SPLIT_SIZE)[usable]
        if len(splits):
            self._make_room(int(splits.max()) + 1, values.shape[1])
            self._counts += torch.bincount(splits, minlength=len(self._counts))
            self._sums.index_add_(0, splits, (values[usable] * _QUANTA).round().long())

    def reduce(self, ranks: HostGroup) -> None:
        """Add up what all ranks have taken; a collective call, after which all have it."""
        self._make_room(*(-ranks.reduce_min(-size) for size in self._sums.shape))
        self._counts = ranks.reduce_sum(self._counts)
        self._sums = ranks.reduce_sum(self._sums)

    def _make_room(self, splits: int, width: int) -> None:
        counts = torch.zeros(max(splits, len(self._counts)), dtype=torch.int64)
        sums = torch.zeros(len(counts), max(width, self._sums.shape[1]), dtype=torch.int64)
        counts[: len(self._counts)] = self._counts
        sums[: len(self._sums), : self._sums.shape[1]] = self._sums
        self._counts, self._sums = counts, sums

    def score(self) -> float | None:
        """Return the mean over splits of exp(mean KL(p(y|x) | p(y))); None without an image."""
        scores = [
            _score(count, sums / (count * _QUANTA))
            for count, sums in zip(self._counts.tolist(), self._sums.double(), strict=True)
            if count
        ]
        return math.fsum(scores) / len(scores) if scores else None


def _score(count: int, means: Tensor) -> float:
    *classes, negative_entropy = means.tolist()
    mixed = math.fsum(each * math.log(each) for each in classes if each > 0)
    return math.exp(negative_entropy - mixed)
