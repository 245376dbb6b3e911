"""Settings of data sets of latents, and what is known of an autoencoder, without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines.decode.make import DecoderName
from pipelines.errors import IngestSettingError
from pipelines.ingest.plan import WriteConfig
from pipelines.latent_format import LatentFormat
from pipelines.shards import ShardsConfig

if TYPE_CHECKING:
    from torch import Tensor

    Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
    """Maps images [b, c, h, w] in [-1, 1] to means and deviations of latents, in float32."""

_MAX_SHARD_BYTES = 1 << 31
_RGB = 3


@dataclass(frozen=True, kw_only=True)
class LatentsConfig(WriteConfig):
    """How latents are written, wherever they come from.

    Attributes:
        dtype: Type of the stored numbers.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_bytes > _MAX_SHARD_BYTES:
            raise IngestSettingError(
                f"shard_bytes={self.shard_bytes} must lie between 1 and {_MAX_SHARD_BYTES}."
            )


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


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(LatentsConfig):
    """How images are encoded.

    Attributes:
        image_size: Height and width that images are cropped and resized to first, in pixels.
        flips: Encode the mirrored images too.
        decoder: What decodes the images.
        batch: Images encoded at a time.
        devices: "cpu" or "cuda:N", which processes take in turn.
        shards: How the images' shards are fetched and kept.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    image_size: int
    flips: bool = True
    decoder: DecoderName = "dali"
    batch: int = 32
    devices: tuple[str, ...] = ("cpu",)
    shards: ShardsConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise IngestSettingError(f"batch={self.batch} must be at least 1.")
        if not self.devices:
            raise IngestSettingError("devices is empty; name one at least.")

    def device(self, process: int) -> str:
        """Say on which device a process works, by its number."""
        return self.devices[process % len(self.devices)]

    def format(self, encoder: Encoder) -> LatentFormat:
        """Say how the latents of an autoencoder are stored.

        Raises:
            IngestSettingError: It does not take such images.
        """
        if encoder.image_channels != _RGB:
            raise IngestSettingError(
                f"The autoencoder at {encoder.place} takes images of {encoder.image_channels} "
                "channels; latents are made of RGB images. Choose an autoencoder of 3 channels."
            )
        factor = encoder.factor
        if self.image_size < factor or self.image_size % factor:
            near = max(1, round(self.image_size / factor)) * factor
            raise IngestSettingError(
                f"Images of image_size={self.image_size} cannot be encoded by the autoencoder at "
                f"{encoder.place}, which makes one element of {factor} x {factor} pixels. Choose a "
                f"multiple of {factor}, such as {near}."
            )
        return LatentFormat(
            dtype=self.dtype,
            views=2 if self.flips else 1,
            channels=encoder.channels,
            size=self.image_size // factor,
        )
