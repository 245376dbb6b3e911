"""What is kept of the features of a set of images, and how near the images of two sets are."""

from __future__ import annotations

import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer import rng
from trainer.evaluation.layout import Layout
from trainer.evaluation.scores import ScoreSums
from trainer.evaluation.sums import FeatureSums
from trainer.host_group import HostGroup

COMPARED_IMAGES = 1000
"""Samples, and held-out images, whose nearest training image is looked for."""
NEIGHBOURS = 10_000
"""Training images among which it is looked for."""

_AT_ONCE = 256


def spread_evenly(total: int, most: int) -> Tensor:
    """Return at most `most` places of `total`, rising, one of each of as many equal parts.

    Where in its part is drawn, though always alike: at even distances, samples whose classes take
    turns would be of a few classes alone.
    """
    count = min(total, most)
    edges = torch.arange(count + 1) * total // max(1, count)
    drawn = rng.uniforms(0, "places", first=0, count=count).double()
    return edges[:-1] + (drawn * edges.diff()).long()


class FeatureSet:
    """Takes what an extractor gives for a set of images, of which each rank sees a part.

    Args:
        classes: Number of classes.
        kept: Indices of the images whose features are kept on the rank that saw them.
        summed: Indices of the images that are summed up, rising; None is all.
        layout: Which of the extractor's values are what.

    Attributes:
        sums: Of the features of this rank's images, and of all ranks' after `reduce`.
        spatial: The same of spatial features.
        scores: The same for the Inception Score.
    """

    def __init__(
        self,
        *,
        classes: int,
        kept: Tensor,
        summed: Tensor | None = None,
        layout: Layout | None = None,
    ) -> None:
        self._layout = layout or Layout()
        self.sums = FeatureSums(classes=classes)
        self.spatial, self.scores = FeatureSums(), ScoreSums()
        self._summed = summed
        self._chosen = kept.sort().values
        self._kept: list[tuple[Tensor, Tensor]] = []

    def take(self, values: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take an extractor's values [n, d], labels [n] and indices [n]."""
        features, spatial, logits = self._layout.split(values)
        summed, places = torch.ones(len(indices), dtype=torch.bool), indices
        if self._summed is not None:
            summed, places = _found(indices, self._summed)
        on_device = summed.to(values.device)
        self.sums.add(features[on_device], labels[summed])
        if self._layout.spatial:
            self.spatial.add(spatial[on_device])
        if self._layout.logits:
            self.scores.add(logits[on_device], places[summed])
        kept, _ = _found(indices, self._chosen)
        if kept.any():
            self._kept.append((indices[kept], features[kept.to(values.device)].cpu()))

    def reduce(self, ranks: HostGroup) -> None:
        """Add up what all ranks have taken; a collective call, after which all have it."""
        self.sums.reduce(ranks)
        if self._layout.spatial:
            self.spatial.reduce(ranks)
        if self._layout.logits:
            self.scores.reduce(ranks)

    def kept(self, of: Tensor | None = None) -> Tensor:
        """Return the features [k, d] that this rank keeps of some images; None is all."""
        found = self._kept
        if of is not None:
            chosen = [torch.isin(indices, of) for indices, _ in found]
            found = [
                (indices[mask], features[mask])
                for (indices, features), mask in zip(found, chosen, strict=True)
                if mask.any()
            ]
        return torch.cat([features for _, features in found] or [torch.zeros(0, 0)])

    def gather(self, ranks: HostGroup, of: Tensor) -> Tensor:
        """Return the features that all ranks keep of some images, by index; a collective call."""
        indices = torch.cat([indices for indices, _ in self._kept] or [torch.zeros(0).long()])
        indices = indices[torch.isin(indices, of)]
        own = {"indices": indices, "features": self.kept(of).contiguous()}
        parts = ranks.gather(save(own))
        whole = [part for part in map(load, parts) if len(part["indices"])]
        joined = torch.zeros(0, 0)
        if whole:
            order = torch.cat([part["indices"] for part in whole]).argsort()
            joined = torch.cat([part["features"] for part in whole])[order]
        return load(ranks.broadcast(save({"features": joined}), source=0))["features"]


def _found(indices: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Tell which indices there are among rising ones, and at which places; in time of their log."""
    places = torch.searchsorted(among, indices)
    there = torch.zeros(len(indices), dtype=torch.bool)
    if len(among):
        there = among[places.clamp(max=len(among) - 1)] == indices
    return there, places


def nearest_distances(features: Tensor, neighbours: Tensor, *, ranks: HostGroup) -> Tensor:
    """Return the distance from each image to the nearest of others; a collective call.

    Args:
        features: Features of the images, alike on all ranks, [n, d].
        neighbours: This rank's part of the others, [m, d]; of any width where it has none.
        ranks: Those that have a part.

    Returns:
        Distances [n] in float64. Each is computed by itself, so no other changes a bit of it.
    """
    least = torch.full((len(features),), torch.inf, dtype=torch.float64)
    wide = features.double()
    for first in range(0, len(neighbours), _AT_ONCE):
        part = neighbours[first : first + _AT_ONCE].double()
        for start in range(0, len(wide), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            mode = "donot_use_mm_for_euclid_dist"
            found = torch.cdist(wide[rows], part, compute_mode=mode).amin(1)
            least[rows] = torch.minimum(least[rows], found)
    return ranks.reduce_least(least)
