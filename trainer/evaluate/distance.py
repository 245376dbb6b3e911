"""The Fréchet distance from samples to held-out real images, and the distance between real ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import rng
from trainer.evaluate.features import FeatureExtractor
from trainer.evaluate.frechet import (
    LEAST_IMAGES_IN_HALVES,
    FeatureMoments,
    FeatureStatistics,
    frechet_distance,
)


class DistanceToReal:
    """Measures sets of samples against the same real images with the same features.

    Args:
        extractor: Maps images to features.
        real: Batches of held-out real images [b, c, h, w] in [-1, 1].
        device: Where features are extracted.
        batch: Samples whose features are extracted at a time.

    Attributes:
        extractor_digest: SHA-256 of the extractor's weights; empty where the code decides them.
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
        self.extractor_digest = extractor.digest
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
    if len(features) < LEAST_IMAGES_IN_HALVES:
        return None
    generator = torch.Generator().manual_seed(rng.derived_seed(0, "real halves"))
    order = torch.randperm(len(features), generator=generator).numpy()
    half = len(features) // 2
    return frechet_distance(
        FeatureStatistics.of(features[order[:half]]), FeatureStatistics.of(features[order[half:]])
    )
