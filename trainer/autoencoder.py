"""The codec of a run: its settings, and the autoencoder they name, loaded and checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from models.codec import AutoencoderKlCodec, Codec, IdentityCodec, Posterior
from trainer.autoencoder_files import AutoencoderError, AutoencoderFiles, find_autoencoder
from trainer.checkpoint.store import StoreConfig


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
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
    """

    kind: Literal["identity", "autoencoder_kl"] = "identity"
    source: str | None = None
    factor: int = 8
    channels: int = 4
    scale: float | None = None
    shift: float | None = None
    posterior: Posterior = "sample"

    def __post_init__(self) -> None:
        if (self.kind == "identity") != (self.source is None):
            raise AutoencoderError(
                f"codec.kind={self.kind} does not go with codec.source={self.source}: "
                + (
                    "only kind=autoencoder_kl has a source; set codec=sd_vae to work in latents"
                    if self.kind == "identity"
                    else "set it to the autoencoder's folder, s3:// prefix or name on the hub"
                )
            )
        if self.factor < 1 or self.factor & (self.factor - 1) or self.channels < 1:
            raise AutoencoderError(
                f"codec.factor={self.factor} must be a power of 2, and codec.channels="
                f"{self.channels} at least 1"
            )
        if self.scale is not None and not self.scale > 0:
            raise AutoencoderError(f"codec.scale={self.scale} must be above 0")


class LoadedCodec(NamedTuple):
    """A codec and what it was made from."""

    codec: Codec
    """Ready to use on its device."""
    sha256: str | None
    """Digest of the autoencoder; None in pixel space."""


def load_codec(
    config: CodecConfig,
    *,
    cache: Path,
    store: StoreConfig,
    device: torch.device,
    image_channels: int | None = None,
) -> LoadedCodec:
    """Build the codec that the configuration names.

    Args:
        config: Which one.
        cache: Folder on this machine for what has to be fetched.
        store: How to reach an object store.
        device: Where it is to work.
        image_channels: Channels of the images it will encode; None if it only decodes.

    Raises:
        AutoencoderError: The autoencoder is missing, damaged, or not as the settings say.
        StoreError: The object store fails or refuses.
    """
    files = _files(config, cache=cache, store=store, image_channels=image_channels)
    if files is None:
        return LoadedCodec(codec=IdentityCodec(), sha256=None)
    codec = AutoencoderKlCodec(
        _module(files).to(device),
        scale=config.scale,
        shift=config.shift,
        posterior=config.posterior,
    )
    return LoadedCodec(codec=codec, sha256=files.sha256)


def codec_digest(
    config: CodecConfig, *, cache: Path, store: StoreConfig, image_channels: int | None = None
) -> str | None:
    """Find and check the autoencoder without loading it.

    Args:
        config: Which one.
        cache: Folder on this machine for what has to be fetched.
        store: How to reach an object store.
        image_channels: Channels of the images it will encode; None if it only decodes.

    Returns:
        Its digest; None in pixel space.

    Raises:
        AutoencoderError: The autoencoder is missing, damaged, or not as the settings say.
        StoreError: The object store fails or refuses.
    """
    files = _files(config, cache=cache, store=store, image_channels=image_channels)
    return None if files is None else files.sha256


def _files(
    config: CodecConfig, *, cache: Path, store: StoreConfig, image_channels: int | None
) -> AutoencoderFiles | None:
    if config.source is None:
        return None
    files = find_autoencoder(config.source, cache=cache, store=store)
    # What config.json leaves out has diffusers' default.
    blocks = files.config.get("block_out_channels", [64])
    found = {
        "codec.factor": (config.factor, 2 ** (len(blocks) - 1)),
        "codec.channels": (config.channels, files.config.get("latent_channels", 4)),
        "data.channels": (image_channels, files.config.get("in_channels", 3)),
    }
    for key, (wanted, actual) in found.items():
        if wanted is not None and wanted != actual:
            raise AutoencoderError(
                f"{key}={wanted} does not fit the autoencoder of codec.source={config.source}, "
                f"which needs {key}={actual}"
            )
    return files


def _module(files: AutoencoderFiles) -> nn.Module:
    from pipelines.torchvision_cpu import ensure_torchvision

    ensure_torchvision()
    from diffusers import AutoencoderKL

    try:
        with _quiet():
            module, report = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
                str(files.folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AutoencoderError(
            f"the weights in {files.folder} are damaged or do not fit its config.json ({reason}); "
            "copy the folder again"
        ) from error
    if wrong := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise AutoencoderError(
            f"the weights in {files.folder} do not fit its config.json: {len(wrong)} parameters "
            f"are missing or unknown, such as {wrong[0]}; copy the folder again"
        )
    loaded: nn.Module = module.float()
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from logging what is raised here as an error."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
