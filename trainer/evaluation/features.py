"""What an extractor of features is, the one that needs nothing, and how images come to it.

Numbers from different extractors cannot be compared: only "inception" gives what the literature
calls FID. Two need no download and serve small images and machines without a network:
"random_conv" at once, "learned_conv" after a minute or two on the data set's training images, and
it knows much better what natural pictures show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.evaluation.layout import Layout
from trainer.evaluation.learned_features import one_thread
from trainer.evaluation.precision import products_in


class FeatureExtractor(Protocol):
    """Maps images in [-1, 1], shape [n, c, h, w], to values, shape [n, d].

    Attributes:
        digest: SHA-256 of its weights; empty where the code decides them.
        layout: Which of the values are what.
    """

    digest: str
    layout: Layout

    def __call__(self, images: Tensor) -> Tensor:
        """Extract features."""
        ...


class RandomConvFeatures:
    """A fixed random convolutional network: 64 features, the same on every machine.

    Three layers of orthogonal filters with leaky rectifiers, one stride-2 step, and the mean and
    the deviation over positions of the last layer. Random features of this kind separate image
    distributions although nothing was learned (compare Naeem et al. 2020, section 4).

    Args:
        channels: Channels of the images.
    """

    digest = ""
    layout = Layout()

    def __init__(self, channels: int) -> None:
        generator = torch.Generator().manual_seed(20260219)
        widths = (channels, 16, 32, 32)
        self._filters = []
        for inputs, outputs in pairwise(widths):
            weight = torch.empty(outputs, inputs, 3, 3)
            with one_thread():
                nn.init.orthogonal_(weight, gain=2.0**0.5, generator=generator)
            self._filters.append(weight)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract 64 features per image."""
        x = images.float()
        with one_thread():
            for layer, weight in enumerate(self._filters):
                x = F.leaky_relu(
                    F.conv2d(x, weight.to(x.device), padding=1, stride=2 if layer == 1 else 1), 0.2
                )
        return torch.cat((x.mean(dim=(2, 3)), x.std(dim=(2, 3))), dim=1)


_UNIT = 32
"""Images of one call of an extractor, always."""


class IndexedExtraction:
    """Runs an extractor so that the features of an image depend on the image and its index alone.

    Libraries round a batch's last bits by its size. So every call has 32 images: image i is in
    place i mod 32, whatever batches the images come in and whichever rank has its neighbours,
    whose places then hold grey. On a GPU products are those of float32, whatever the process has
    allowed.

    Args:
        extractor: Maps images to features.
        device: Where it works.
        take: Takes features [n, d], labels [n] and indices [n], in whatever order they come.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        device: torch.device,
        take: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        self._extractor = extractor
        self._device = device
        self._take = take
        self._unit = -1
        self._images: dict[int, Tensor] = {}
        self._labels: dict[int, int] = {}

    def add(self, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take images [n, c, h, w] in [-1, 1], seen as 8-bit pictures, their classes and indices.

        Indices rise, and each comes once on one of the ranks.
        """
        seen = ((images * 127.5 + 127.5).round().clamp(0, 255) - 127.5) / 127.5
        for image, label, index in zip(seen, labels.tolist(), indices.tolist(), strict=True):
            unit, place = divmod(index, _UNIT)
            if unit != self._unit:
                self.flush()
                self._unit = unit
            self._images[place], self._labels[place] = image, label

    def flush(self) -> None:
        """Extract what is still waiting for its neighbours; the last call."""
        if not self._images:
            return
        places = torch.tensor(list(self._images))
        images = torch.stack(list(self._images.values()))
        call = torch.zeros(_UNIT, *images.shape[1:]).index_copy_(0, places, images.float())
        # Features are compared to 5e-10, in processes that train in TF32 and in those that do not.
        with products_in("fp32", self._device):
            features = self._extractor(call.to(self._device))[places.to(self._device)]
        # Whatever an extractor makes of values that are not finite, it is no measurement.
        diverged = ~images.flatten(1).isfinite().all(1)
        features[diverged.to(self._device)] = math.nan
        labels = torch.tensor(list(self._labels.values()))
        self._take(features, labels, self._unit * _UNIT + places)
        self._images, self._labels = {}, {}
