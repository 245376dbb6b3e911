"""Codecs: between images and the space the flow works in."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Codec(Protocol):
    """A map from images to latents and back.

    Attributes:
        factor: Pixels of the image for one element of the latent, along each side.
    """

    factor: int

    def latent_channels(self, image_channels: int) -> int:
        """Channels of the latents of images with ``image_channels`` channels."""
        ...

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z zh zw"]:
        """Map images in [-1, 1] to latents."""
        ...

    def decode(self, latents: Float[Tensor, "b z zh zw"]) -> Float[Tensor, "b c h w"]:
        """Map latents to images in [-1, 1]."""
        ...


class IdentityCodec:
    """Pixel space: the latent is the image."""

    factor = 1

    def latent_channels(self, image_channels: int) -> int:
        """Channels of the latents, those of the images."""
        return image_channels

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the images."""
        return images

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the images."""
        return latents
