"""Feature extractors for the Fréchet distance, chosen by name.

Numbers from different extractors cannot be compared: only "inception" gives what the literature
calls FID. The other two need no download and serve small images and machines without a network:
"random_conv" at once, "learned_conv" after a minute or two on the data set's training images, and
it knows much better what natural pictures show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.evaluate.inception import InceptionFeatures
from trainer.evaluate.learned_features import (
    KeptFeatures,
    LabelledImages,
    learned_features,
    one_thread,
)

FeatureName = Literal["random_conv", "learned_conv", "inception"]


class FeatureExtractor(Protocol):
    """Maps images in [-1, 1], shape [n, c, h, w], to features, shape [n, d].

    Attributes:
        digest: SHA-256 of its weights; empty where the code decides them.
    """

    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """Extract features."""
        ...


class UnknownFeatures(ValueError):
    """There is no extractor of that name."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which features measure distance.

    Attributes:
        name: "random_conv", "learned_conv" or "inception".
        inception_weights: Local file of the FID Inception weights
            (pt_inception-2015-12-05-6726825d.pth); None downloads them when online.
    """

    name: FeatureName = "random_conv"
    inception_weights: str | None = field(default=None, metadata={"place": "path"})


class RandomConvFeatures:
    """A fixed random convolutional network: 64 features, the same on every machine.

    Three layers of orthogonal filters with leaky rectifiers, one stride-2 step, and the mean and
    the deviation over positions of the last layer. Random features of this kind separate image
    distributions although nothing was learned (compare Naeem et al. 2020, section 4).

    Args:
        channels: Channels of the images.
    """

    digest = ""

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


def feature_extractor(
    config: FeatureConfig,
    *,
    channels: int,
    train: Callable[[], LabelledImages],
    held_out: Callable[[], LabelledImages],
    kept: KeptFeatures | None = None,
) -> FeatureExtractor:
    """Build the extractor that the configuration names.

    Args:
        config: Which one.
        channels: Channels of the images.
        train: Gives the training images and labels that "learned_conv" learns from.
        held_out: Gives held-out images and labels, which it is examined on.
        kept: Keeps the weights of "learned_conv"; None trains it anew.

    Raises:
        MissingWeights: If Inception's weights cannot be had.
        UnknownFeatures: If there is no such extractor.
    """
    if config.name == "inception":
        return InceptionFeatures(config.inception_weights)
    if config.name == "learned_conv":
        return learned_features(train=train, held_out=held_out, kept=kept)
    if config.name == "random_conv":
        return RandomConvFeatures(channels)
    raise UnknownFeatures(
        f"there is no feature extractor {config.name!r}; choose one of "
        f"{', '.join(get_args(FeatureName))}"
    )


def check_features(config: FeatureConfig) -> None:
    """Find out before a run whether its extractor can be built after it.

    Raises:
        MissingWeights: If Inception's weights cannot be had.
    """
    if config.name == "inception":
        InceptionFeatures(config.inception_weights)
