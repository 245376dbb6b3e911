"""The codec that a checkpoint was trained with, found again to decode its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.codec import Codec
from trainer.autoencoder import CodecConfig, load_codec
from trainer.checkpoint.store import StoreConfig
from trainer.evaluate.samples import ImageShape
from trainer.schema import ConfigError, DataConfig, from_dict
from trainer.space import flow_shape


class CheckpointCodec(NamedTuple):
    """What it takes to make images of a checkpoint's samples."""

    codec: Codec
    """Decodes."""
    shape: ImageShape
    """Shape of what the flow works on."""


def recorded_shape(science: Mapping[str, Any]) -> ImageShape:
    """Return the shape of what a checkpoint's flow works on."""
    return flow_shape(from_dict(DataConfig, science["data"]), recorded_codec(science))


def recorded_codec(science: Mapping[str, Any]) -> CodecConfig:
    """Return the codec that a checkpoint names; older ones, which name none, are of pixels."""
    return from_dict(CodecConfig, science.get("codec", {}))


def codec_of(
    science: Mapping[str, Any],
    *,
    source: str | None,
    cache: Path,
    store: StoreConfig,
    device: torch.device,
) -> CheckpointCodec:
    """Load the codec of a checkpoint and make sure that it is the one of its training.

    Args:
        science: The science in the checkpoint's manifest.
        source: Where the autoencoder is now; None looks where the run had it.
        cache: Folder on this machine for what has to be fetched.
        store: How to reach an object store.
        device: Where it is to work.

    Raises:
        AutoencoderError: The autoencoder is missing, damaged, or not as the checkpoint says.
        ConfigError: It is another one than that of the training, or none was used.
        StoreError: The object store fails or refuses.
    """
    config = recorded_codec(science)
    if source is not None:
        if config.kind == "identity":
            raise ConfigError(
                f"codec_source={source}: this checkpoint works on pixels; leave codec_source out"
            )
        config = dataclasses.replace(config, source=source)
    codec, sha256 = load_codec(config, cache=cache, store=store, device=device)
    trained_with = science.get("autoencoder", {}).get("sha256")
    if sha256 != trained_with:
        raise ConfigError(
            f"the autoencoder at {config.source} is not the one of the training (SHA-256 "
            f"{str(sha256)[:12]}… instead of {str(trained_with)[:12]}…); give "
            "codec_source=PLACE of the right one"
        )
    return CheckpointCodec(codec=codec, shape=recorded_shape(science))
