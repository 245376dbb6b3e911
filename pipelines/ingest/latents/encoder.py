"""What the encoding of a dataset knows of an autoencoder: what it does, not what it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps images [b, c, h, w] in [-1, 1] to means and standard deviations of latents, in float32."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An autoencoder to encode with.

    Attributes:
        place: Where it is.
        sha256: Digest of its architecture, scaling and weights.
        factor: Pixels for one element of a latent, along each side.
        channels: Channels of its latents.
        image_channels: Channels of the images it takes.
        scale: Factor that brings its latents near unit variance.
        shift: What is subtracted before.
        precision: What it computes in.
        load: Loads it onto "cpu" or "cuda:N"; it is pickled.
    """

    place: str
    sha256: str
    factor: int
    channels: int
    image_channels: int
    scale: float
    shift: float
    precision: Literal["fp32", "bf16"]
    load: Callable[[str], Encode]
