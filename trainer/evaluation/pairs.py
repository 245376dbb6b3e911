"""Figures of pairs of images: precision and recall, and the kernel distance.

They need the features of every image, so a part of each set is kept, by the rank that saw it, and
goes around the ranks block by block. Features become whole numbers in two words, whose products
are exact in float64 matrices, whatever library, batch or rank multiplies. So every distance and
every kernel value is the same number on any number of ranks, and so are the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer.host_group import HostGroup

NEIGHBOUR = 3
"""Among an image's neighbours, the one to which its ball reaches (Kynkäänniemi et al. 2019)."""

_BITS = 33
"""Of the largest feature: float32 holds 24, and its smaller neighbours some more below these."""
_WORD = 2.0**16
_SUM_BITS = 62
_AT_ONCE = 1024


class _Words(NamedTuple):
    """Features as whole numbers `high · 2^16 + low`: 18 and 16 bits, in float64.

    Products of up to 2^17 of them add up to less than 2^53, in any order.
    """

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, features: Tensor, *, unit: float) -> _Words:
        whole = (features.double() / unit).round()
        high = (whole / _WORD).round()
        return cls(high, whole - high * _WORD)

    def products(self, other: _Words) -> tuple[Tensor, Tensor, Tensor]:
        """Return the exact words of all products, [n, m]."""
        mixed = self.high @ other.low.T + self.low @ other.high.T
        return self.high @ other.high.T, mixed, self.low @ other.low.T

    def squares(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the exact words of each one's product with itself, [n]."""
        high, low = self
        return (high * high).sum(1), 2 * (high * low).sum(1), (low * low).sum(1)


def _joined(words: tuple[Tensor, Tensor, Tensor], unit: float) -> Tensor:
    high, mixed, low = words
    return ((high * _WORD + mixed) * _WORD + low) * unit**2


class _Block(NamedTuple):
    """What one rank keeps of a set."""

    features: Tensor
    radii: Tensor


class ComparedImages:
    """Features of a set of images, each rank's part on that rank.

    Args:
        part: Features of this rank's images, [n, d]; of any width where it has none.
        ranks: Those that have a part; making one is a collective call, and so is each use.
        device: Where it is computed.

    Attributes:
        part: The features, in float32 on the host.
        count: Images of all ranks.
        width: Features of an image.
        unit: What one of the whole numbers that features become stands for; a power of two.
        longest: Length of the longest vector of features.
    """

    def __init__(self, part: Tensor, *, ranks: HostGroup, device: torch.device) -> None:
        width = -ranks.reduce_min(-part.shape[1] if len(part) else 0)
        self.part = part.float().cpu() if len(part) else torch.zeros(0, width)
        self.count = int(ranks.reduce_sum(torch.tensor([len(part)])))
        self.width = width
        self.ranks = ranks
        self.device = device
        own = self.part.abs().amax().reshape(1) if len(part) else torch.zeros(1)
        largest = -float(ranks.reduce_least(-own))
        self.unit = 2.0 ** (math.frexp(largest)[1] - _BITS)
        squares = _joined(_Words.of(self.part, unit=self.unit).squares(), self.unit)
        longest = squares.amax().reshape(1) if len(part) else torch.zeros(1, dtype=torch.float64)
        self.longest = math.sqrt(-float(ranks.reduce_least(-longest)))

    def blocks(self) -> Iterator[Tensor]:
        """Yield each rank's features in turn, on all ranks."""
        for source in range(self.ranks.world_size):
            sent = self.ranks.broadcast(save({"part": self.part.contiguous()}), source=source)
            yield load(sent)["part"].to(self.device)

    @cached_property
    def squared_radii(self) -> Tensor:
        """The squared distance to the third neighbour of each image of this rank, [n]."""
        own, unit = self.part.to(self.device), self.unit
        # An image is the nearest to itself.
        least = torch.full((len(own), NEIGHBOUR + 1), torch.inf, dtype=torch.float64)
        least = least.to(self.device)
        for block in self.blocks():
            for columns in torch.split(block, _AT_ONCE):
                for first in range(0, len(own), _AT_ONCE):
                    rows = slice(first, first + _AT_ONCE)
                    found = _squared_distances(own[rows], columns, unit)
                    both = torch.cat((least[rows], found), dim=1)
                    least[rows] = both.topk(NEIGHBOUR + 1, largest=False).values
        return least.amax(dim=1)

    @cached_property
    def mean_kernel(self) -> Fraction:
        """The kernel's mean over pairs of two images of the set."""
        total, quantum = _kernel_sum(self, self)
        own = _Words.of(self.part.to(self.device), unit=self.unit)
        themselves = _kernel(_joined(own.squares(), self.unit), self.width)
        whole = (themselves / quantum).round().long().sum().reshape(1).cpu()
        pairs = self.count * (self.count - 1)
        return (total - int(self.ranks.reduce_sum(whole))) * Fraction(quantum) / pairs


def _squared_distances(rows: Tensor, columns: Tensor, unit: float) -> Tensor:
    one, two = _Words.of(rows, unit=unit), _Words.of(columns, unit=unit)
    words = [
        first[:, None] + second - 2 * product
        for first, second, product in zip(
            one.squares(), two.squares(), one.products(two), strict=True
        )
    ]
    return _joined((words[0], words[1], words[2]), unit)


def _kernel(products: Tensor, width: int) -> Tensor:
    """The kernel of Bińkowski et al. 2018: (x · y / d + 1)³."""
    linear = products / width + 1
    return linear * linear * linear


def _kernel_sum(first: ComparedImages, second: ComparedImages) -> tuple[int, float]:
    """Sum the kernel over all pairs, as a whole number of quanta, which no order changes."""
    unit = max(first.unit, second.unit)
    # No value is beyond that of the longest vectors in one direction, and rounding.
    most = _kernel(torch.tensor(1.01 * first.longest * second.longest).double(), first.width)
    spare = math.frexp(float(most))[1] + math.frexp(first.count * second.count)[1]
    quantum, total = 2.0 ** (spare - _SUM_BITS), 0
    own = first.part.to(first.device)
    for block in second.blocks():
        for columns in torch.split(block, _AT_ONCE):
            others = _Words.of(columns, unit=unit)
            for rows in torch.split(own, _AT_ONCE):
                products = _joined(_Words.of(rows, unit=unit).products(others), unit)
                total += int((_kernel(products, first.width) / quantum).round().long().sum())
    whole = torch.tensor([total])
    return int(first.ranks.reduce_sum(whole)), quantum


def kernel_distance(samples: ComparedImages, real: ComparedImages) -> float:
    """Return the squared maximum mean discrepancy, without bias; of Inception's features it is KID.

    It is over all pairs, where others take the mean over random subsets, which is the same with
    more noise. It may be a little below 0.

    Args:
        samples: At least two images.
        real: At least two.
    """
    total, quantum = _kernel_sum(samples, real)
    across = total * Fraction(quantum) / (samples.count * real.count)
    return float(samples.mean_kernel + real.mean_kernel - 2 * across)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How far two sets cover each other.

    Attributes:
        precision: Share of samples within the ball of a real image.
        recall: Share of real images within the ball of a sample.
    """

    precision: float
    recall: float


def coverage(samples: ComparedImages, real: ComparedImages) -> Coverage | None:
    """Return improved precision and recall; an image's ball reaches to its third neighbour.

    Returns:
        None where a set has fewer than four images.
    """
    if min(samples.count, real.count) <= NEIGHBOUR:
        return None
    unit, ranks = max(samples.unit, real.unit), samples.ranks
    own, own_radii = samples.part.to(samples.device), samples.squared_radii
    within = torch.zeros(len(own), dtype=torch.bool, device=samples.device)
    covered = 0
    for block in _with_radii(real):
        reached = torch.zeros(len(block.features), dtype=torch.int64)
        for start in range(0, len(block.features), _AT_ONCE):
            columns = slice(start, start + _AT_ONCE)
            for first in range(0, len(own), _AT_ONCE):
                rows = slice(first, first + _AT_ONCE)
                squared = _squared_distances(own[rows], block.features[columns], unit)
                within[rows] |= (squared <= block.radii[columns]).any(1)
                reached[columns] |= (squared <= own_radii[rows, None]).any(0).long().cpu()
        covered += int((ranks.reduce_sum(reached) > 0).sum())
    precise = int(ranks.reduce_sum(within.sum().reshape(1).cpu()))
    return Coverage(precision=precise / samples.count, recall=covered / real.count)


def _with_radii(images: ComparedImages) -> Iterator[_Block]:
    radii = images.squared_radii.cpu()
    for source, features in enumerate(images.blocks()):
        sent = images.ranks.broadcast(save({"radii": radii}), source=source)
        yield _Block(features, load(sent)["radii"].to(images.device))
