"""Which of the values that an extractor gives for an image are what."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SplitValues(NamedTuple):
    """An extractor's values of n images, by what they are for."""

    features: Tensor
    """What distances are measured with, [n, d]."""
    spatial: Tensor
    """What the spatial Fréchet distance is measured with, [n, s]; s is 0 without."""
    logits: Tensor
    """What the Inception Score is made of, [n, c]; c is 0 without."""


class Layout(NamedTuple):
    """How many of the values are for what: features first, then spatial ones, then logits.

    One call of an extractor gives them all, as one tensor, so that what handles images and their
    order need not know of the kinds.
    """

    spatial: int = 0
    """Values with places in the image."""
    logits: int = 0
    """Values that tell classes apart; softmax makes probabilities of them."""

    def split(self, values: Tensor) -> SplitValues:
        """Take values [n, d + spatial + logits] apart."""
        features = values.shape[1] - self.spatial - self.logits
        return SplitValues(
            features=values[:, :features],
            spatial=values[:, features : features + self.spatial],
            logits=values[:, features + self.spatial :],
        )
