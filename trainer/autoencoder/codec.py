"""The codec of a run: its settings, and the autoencoder they name, loaded and checked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from models.codec import (
    AutoencoderKlCodec,
    Codec,
    EncodePrecision,
    IdentityCodec,
    Moments,
    Posterior,
)
from pipelines.domains import Checked
from trainer.autoencoder.files import (
    WEIGHTS_NAME,
    AutoencoderError,
    AutoencoderFiles,
    find_autoencoder,
)
from trainer.finite import all_finite
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
        image_channels: Channels of the images that people see; None takes those it has.

    Raises:
        AutoencoderError: The autoencoder is missing, damaged, or not as the settings say.
        StoreError: The object store fails or refuses.
    """
    files = _files(config, cache=cache, store=store, image_channels=image_channels)
    if files is None:
        return LoadedCodec(codec=IdentityCodec(), sha256=None)
    codec = open_codec(
        files,
        device=device,
        scale=config.scale,
        shift=config.shift,
        posterior=config.posterior,
        encode_precision=config.encode_precision,
    )
    return LoadedCodec(codec=codec, sha256=files.sha256)


def open_codec(
    files: AutoencoderFiles,
    *,
    device: torch.device,
    scale: float | None = None,
    shift: float | None = None,
    posterior: Posterior = "sample",
    encode_precision: EncodePrecision = "fp32",
) -> AutoencoderKlCodec:
    """Load an autoencoder that was found; the settings are those of `CodecConfig`.

    Raises:
        AutoencoderError: Its weights are damaged.
        CodecError: It is of a kind that no codec knows.
    """
    return AutoencoderKlCodec(
        _module(files).to(device),
        scale=scale,
        shift=shift,
        posterior=posterior,
        encode_precision=encode_precision,
    )


def open_encoder(
    files: AutoencoderFiles, device: str, *, precision: EncodePrecision
) -> Callable[[Tensor], Moments]:
    """Load an autoencoder only to encode with, on "cpu" or "cuda:N".

    Raises:
        AutoencoderError: Its weights are damaged.
        CodecError: It is of a kind that no codec knows.
    """
    return open_codec(files, device=torch.device(device), encode_precision=precision).moments


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
    files = _files(config, cache=cache, store=store, image_channels=image_channels)
    return None if files is None else files.sha256


def _files(
    config: CodecConfig, *, cache: Path, store: StoreConfig, image_channels: int | None
) -> AutoencoderFiles | None:
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


def _module(files: AutoencoderFiles) -> nn.Module:
    from diffusers import AutoencoderKL

    try:
        with _quiet(), files.exactly() as folder:
            _check_parameters(AutoencoderKL, files)
            module, report = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except AutoencoderError:
        raise
    except Exception as error:  # whatever a library says of files from outside
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
    _check_finite(loaded, files)
    return loaded


def _ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


@torch.no_grad()
def _check_finite(module: Any, files: AutoencoderFiles) -> None:
    """Refuse weights that are no numbers, or so large that what they compute is none."""
    culprit = next(
        (f"{name} holds" for name, held in module.state_dict().items() if not all_finite(held)),
        None,
    )
    if culprit is None:
        side = 4 * files.settings.factor
        images = _ramp(1, files.settings.in_channels, side, side)
        moments = module.eval().encode(images).latent_dist
        latents = 2 * _ramp(*moments.mean.shape)
        computed = {
            "encoding gives": torch.cat([moments.mean, moments.std]),
            "decoding gives": module.decode(latents).sample,
        }
        culprit = next((what for what, it in computed.items() if not all_finite(it)), None)
    if culprit is not None:
        raise AutoencoderError(
            f"the weights in {files.folder} are damaged: {culprit} values that are no finite "
            "numbers; copy the folder again"
        )


def _check_parameters(kind: Any, files: AutoencoderFiles) -> None:
    """Refuse what would take far more memory than there are weights for."""
    with torch.device("meta"):
        described = kind(**files.config.arguments())
    count = sum(parameter.numel() for parameter in described.parameters())
    size = (files.folder / WEIGHTS_NAME).stat().st_size
    if count > size:
        raise AutoencoderError(
            f"the config.json in {files.folder} describes {count} parameters, and the weights "
            f"beside it have {size} bytes; copy the folder again"
        )


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
