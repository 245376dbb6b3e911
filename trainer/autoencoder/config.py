"""The settings of a run's codec, and the files of the autoencoder that they name.

Nothing here loads a tensor, so whoever only looks at settings and files waits for no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from models.codec_choices import EncodePrecision, Posterior
from pipelines.domains import Checked
from trainer.autoencoder.files import AutoencoderError, AutoencoderFiles, find_autoencoder
from trainer.storage.store import StoreConfig


@dataclass(frozen=True, kw_only=True)
class CodecConfig(Checked):
    """Between the pictures that people see and the space that the flow works in.

    Attributes:
        kind: "identity" works on pixels, "autoencoder_kl" in the latent space of a
            `diffusers.AutoencoderKL`.
        source: Where the autoencoder is: a folder, "s3://bucket/prefix", or a name on the Hugging
            Face hub; the store's settings say how S3 is reached.
        factor: Pixels for one element of its latents, along each side.
        channels: Channels of its latents.
        scale: Factor that brings latents near unit variance; None takes the autoencoder's own.
        shift: What is subtracted before; None takes the autoencoder's own.
        posterior: "sample" what the encoder gives for an image, anew each time the image is seen,
            or take its "mean".
        encode_precision: "bf16" encodes faster and less exactly; decoding is in float32 always.
    """

    kind: Literal["identity", "autoencoder_kl"] = "identity"
    source: str | None = field(default=None, metadata={"place": "hub"})
    factor: Annotated[int, Field(ge=1)] = 8
    channels: Annotated[int, Field(ge=1)] = 4
    scale: Annotated[float, Field(gt=0)] | None = None
    shift: float | None = None
    posterior: Posterior = "sample"
    encode_precision: EncodePrecision = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kind == "identity") != (self.source is None):
            raise AutoencoderError(
                f"codec.kind={self.kind} does not go with codec.source={self.source}: "
                + (
                    "only kind=autoencoder_kl has a source; set codec=sd_vae to work in latents"
                    if self.kind == "identity"
                    else "set it to the autoencoder's folder, s3:// prefix or name on the hub"
                )
            )
        if self.factor & (self.factor - 1):
            raise AutoencoderError(f"codec.factor={self.factor} must be a power of 2")


def codec_digest(
    config: CodecConfig, *, cache: Path, store: StoreConfig, image_channels: int | None = None
) -> str | None:
    """Find and check the autoencoder without loading it; the arguments are those of `load_codec`.

    Returns:
        Its digest; None in pixel space.

    Raises:
        AutoencoderError: The autoencoder is missing, damaged, or not as the settings say.
        StoreError: The object store fails or refuses.
    """
    files = find_codec(config, cache=cache, store=store, image_channels=image_channels)
    return None if files is None else files.sha256


def find_codec(
    config: CodecConfig, *, cache: Path, store: StoreConfig, image_channels: int | None
) -> AutoencoderFiles | None:
    """Find and check the autoencoder like `codec_digest`, and return its files."""
    if config.source is None:
        return None
    files = find_autoencoder(config.source, cache=cache, store=store)
    found = {
        "codec.factor": (config.factor, files.settings.factor),
        "codec.channels": (config.channels, files.settings.latent_channels),
    }
    for key, (wanted, actual) in found.items():
        if wanted != actual:
            raise AutoencoderError(
                f"{key}={wanted} does not fit the autoencoder of codec.source={config.source}, "
                f"which needs {key}={actual}"
            )
    if image_channels not in (None, files.settings.in_channels):
        raise AutoencoderError(
            f"the images of this run have {image_channels} channels, and the autoencoder of "
            f"codec.source={config.source} takes {files.settings.in_channels}; choose another "
            f"codec.source, or set data.channels={files.settings.in_channels} if it encodes the "
            "images as they come"
        )
    return files
