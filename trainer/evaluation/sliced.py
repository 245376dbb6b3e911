"""The sliced Wasserstein distance: what moving one set of features to another costs, seen in lines.

A Fréchet distance fits Gaussians, whose covariances have more numbers than a few thousand images
can decide, so few samples look worse than they are. On a line the cheapest way to move images is
known from sorting, and needs no fit (compare Berthet et al. 2026, who measure so with a tenth of
the samples).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from trainer import rng
from trainer.evaluation.learned_features import one_thread
from trainer.evaluation.pairs import ComparedImages

DIRECTIONS = 1024

_WORD, _FRACTION = 2.0**16, 2.0**20


def sliced_wasserstein(samples: ComparedImages, real: ComparedImages) -> float:
    """Return the squared 2-Wasserstein distance on a line, as the mean over directions, times d.

    Times d, a shift of all features costs its squared length, as it does in a Fréchet distance.
    Each rank looks in some of the directions, at the features of all ranks. They are projected
    exactly, so the figure is the same on any number of ranks.

    Args:
        samples: Features of samples; at least one.
        real: Features that they are compared with, alike.
    """
    ranks = samples.ranks
    own = torch.arange(ranks.rank, DIRECTIONS, ranks.world_size)
    directions = _directions(samples.width)[own].to(samples.device)
    one, two = _projected(samples, directions), _projected(real, directions)
    found = torch.zeros(DIRECTIONS, dtype=torch.float64)
    with one_thread():
        for place, first, second in zip(own.tolist(), one, two, strict=True):
            found[place] = _on_a_line(first, second)
    return math.fsum(ranks.reduce_sum(found).tolist()) / DIRECTIONS * samples.width


@lru_cache(maxsize=4)
def _directions(width: int) -> Tensor:
    """Return fixed directions of length one, [n, width], in whole numbers of 2^-20."""
    drawn = rng.normals(0, "slices", first=0, count=DIRECTIONS, size=width).double()
    lengths = drawn.square().sum(dim=1, keepdim=True).sqrt()
    return (drawn / lengths * _FRACTION).round()


def _projected(images: ComparedImages, directions: Tensor) -> Tensor:
    """Return where all images lie in each direction, [directions, images], sorted.

    Parts of 18 and 16 bits by directions of 20 are exact in float64 for up to 2^15 features.
    """
    parts = []
    for block in images.blocks():
        whole = (block.double() / images.unit).round()
        high = (whole / _WORD).round()
        low = whole - high * _WORD
        parts.append(((directions @ high.T) * _WORD + directions @ low.T).cpu())
    placed = torch.cat(parts, dim=1) * (images.unit / _FRACTION)
    return placed.sort(dim=1).values


def _on_a_line(first: Tensor, second: Tensor) -> float:
    """Return the squared Wasserstein distance of sorted numbers: the squared gap of quantiles."""
    n, m = len(first), len(second)
    if n == m:
        return float((first - second).square().mean())
    # A quantile that both step at comes twice, with a width of 0.
    edges = torch.cat((torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n)).sort().values
    widths = edges.diff(prepend=torch.zeros(1, dtype=edges.dtype))
    gaps = first[(edges - 1) // m] - second[(edges - 1) // n]
    return float((gaps.square() * widths).sum() / (n * m))
