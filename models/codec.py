"""Codecs: between images and the space the flow works in (paper section 4: latents of a VAE)."""

from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.codec_choices import EncodePrecision, Posterior
from models.products import float32_products


class CodecError(ValueError):
    """An autoencoder, or numbers for its posterior, that a codec cannot work with."""


class Moments(NamedTuple):
    """Normal distributions, one for each element of the autoencoder's own latents."""

    mean: Float[Tensor, "b z zh zw"]
    std: Float[Tensor, "b z zh zw"]


class Codec(Protocol):
    """A map from images to latents and back.

    Attributes:
        factor: Pixels of the image for one element of the latent, along each side.
    """

    factor: int

    def latent_channels(self, image_channels: int) -> int:
        """Channels of the latents of images with ``image_channels`` channels."""
        ...

    def image_channels(self, latent_channels: int) -> int:
        """Channels of the images of latents with ``latent_channels`` channels."""
        ...

    def normals_per_image(self, image_size: int) -> int:
        """Count the standard normal numbers that encoding an image of this size takes."""
        ...

    def encode(
        self, images: Float[Tensor, "b c h w"], normals: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b z zh zw"]:
        """Map images in [-1, 1] to latents; equal numbers give equal latents."""
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

    def image_channels(self, latent_channels: int) -> int:
        """Channels of the images, those of the latents."""
        return latent_channels

    def normals_per_image(self, image_size: int) -> int:
        """No numbers: nothing is random."""
        return 0

    def encode(
        self, images: Float[Tensor, "b c h w"], normals: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b c h w"]:
        """Return the images."""
        return images

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the images."""
        return latents


class AutoencoderKlCodec:
    """Latent space of a frozen variational autoencoder (Rombach et al. 2022, section 3.1).

    The encoder gives a normal distribution for each element, of which a sample or the mean z
    becomes the latent (z - shift) * scale.

    Args:
        autoencoder: A ``diffusers.AutoencoderKL`` or a module alike in ``encode``, ``decode`` and
            ``config``. It is put into evaluation mode and its gradients are switched off.
        scale: Factor of the latents, which brings them near unit variance; None takes the
            autoencoder's own ``scaling_factor`` (0.18215 for Stable Diffusion's).
        shift: What is subtracted before; None takes the autoencoder's ``shift_factor``, or 0.
        posterior: "sample" the distribution with numbers handed in, or take its "mean".
        encode_precision: "bf16" casts the half that encodes, for speed; its distributions come out
            in float32, and decoding works in float32 always.

    Attributes:
        factor: Pixels for one element of the latent, along each side.
        scale: The factor in use.
        shift: The shift in use.

    Raises:
        CodecError: The autoencoder normalises each channel of its latents by numbers of its own.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        scale: float | None = None,
        shift: float | None = None,
        posterior: Posterior = "sample",
        encode_precision: EncodePrecision = "fp32",
    ) -> None:
        config: Any = autoencoder.config
        if getattr(config, "latents_mean", None) is not None:
            raise CodecError(
                "the autoencoder has latents_mean and latents_std, a normalisation of each channel "
                "that this codec does not know; use an autoencoder with one scaling_factor."
            )
        self._autoencoder: Any = autoencoder.eval().requires_grad_(False)
        self._config = config
        self._posterior = posterior
        self._encode_dtype = torch.float32
        self._memory_format = torch.contiguous_format
        if encode_precision == "bf16":
            self._encode_dtype = torch.bfloat16
            # The layout that tensor cores read, which saves a transposition at each convolution. It
            # changes the last bits of sums, so float32 stays as it is.
            self._memory_format = torch.channels_last
            encoding: list[Any] = [self._autoencoder.encoder, self._autoencoder.quant_conv]
            for part in encoding:
                if part is not None:
                    part.to(dtype=self._encode_dtype, memory_format=self._memory_format)
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(config.scaling_factor if scale is None else scale)
        own_shift = getattr(config, "shift_factor", None) or 0.0
        self.shift = float(own_shift if shift is None else shift)

    def latent_channels(self, image_channels: int) -> int:
        """Channels of the latents.

        Raises:
            CodecError: The autoencoder does not take images with ``image_channels`` channels.
        """
        if image_channels != self._config.in_channels:
            raise CodecError(
                f"the autoencoder takes images of {self._config.in_channels} channels, not "
                f"{image_channels}."
            )
        return int(self._config.latent_channels)

    def image_channels(self, latent_channels: int) -> int:
        """Channels of the images.

        Raises:
            CodecError: The autoencoder does not have latents with ``latent_channels`` channels.
        """
        if latent_channels != self._config.latent_channels:
            raise CodecError(
                f"the autoencoder has latents of {self._config.latent_channels} channels, not "
                f"{latent_channels}."
            )
        return int(self._config.out_channels)

    def normals_per_image(self, image_size: int) -> int:
        """Count the elements of a latent; none for the posterior's mean."""
        if self._posterior == "mean":
            return 0
        return int(self._config.latent_channels) * (image_size // self.factor) ** 2

    def encode(
        self, images: Float[Tensor, "b c h w"], normals: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b z zh zw"]:
        """Map images in [-1, 1] to latents.

        Args:
            images: Square images whose size is a multiple of ``factor``.
            normals: ``normals_per_image`` standard normal numbers for each.

        Raises:
            CodecError: ``normals`` holds another count of numbers.
        """
        return self.latents(self.moments(images), normals)

    @torch.no_grad()
    def moments(self, images: Float[Tensor, "b c h w"]) -> Moments:
        """Encode images in [-1, 1] to distributions of the autoencoder's own latents, in float32.

        No product of float32 is taken in TF32, whatever the process has allowed.

        Args:
            images: Square images whose size is a multiple of ``factor``.
        """
        images = images.to(self._encode_dtype, memory_format=self._memory_format)
        # However a training multiplies: the same image has the same latent, online and stored.
        with float32_products(images.device, tf32=False):
            posterior = self._autoencoder.encode(images).latent_dist
        # diffusers' own deviation would be an exponential in the encoder's precision.
        return Moments(posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float()))

    def latents(
        self, moments: Moments, normals: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b z zh zw"]:
        """Choose latents from their distributions, shift and scale them.

        Args:
            moments: The distributions.
            normals: ``normals_per_image`` standard normal numbers for each image.

        Raises:
            CodecError: ``normals`` holds another count of numbers.
        """
        latents = moments.mean
        size = latents.shape[-1]
        needed = self.normals_per_image(size * self.factor)
        if normals.shape[1] != needed:
            raise CodecError(
                f"encoding an image of {size * self.factor} pixels takes {needed} normal numbers, "
                f"got {normals.shape[1]}."
            )
        if self._posterior == "sample":
            unit = rearrange(normals, "b (z h w) -> b z h w", h=size, w=size)
            latents = latents + moments.std * unit
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b z zh zw"]) -> Float[Tensor, "b c h w"]:
        """Map latents to images, in [-1, 1] or slightly beyond."""
        images: Tensor = self._autoencoder.decode(latents / self.scale + self.shift).sample
        return images
