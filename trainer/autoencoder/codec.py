"""The codec of a run: the autoencoder that its settings name, loaded and checked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.codec import AutoencoderKlCodec, Codec, IdentityCodec, Moments
from models.codec_choices import EncodePrecision, Posterior
from trainer.autoencoder.config import CodecConfig, find_codec
from trainer.autoencoder.files import WEIGHTS_NAME, AutoencoderError, AutoencoderFiles
from trainer.finite import all_finite
from trainer.storage.store import StoreConfig


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
    files = find_codec(config, cache=cache, store=store, image_channels=image_channels)
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
