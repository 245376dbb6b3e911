"""What `python -m pipelines.ingest.latents` does with its words: plans of latents to write."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from pipelines.errors import IngestSettingError, MissingDatasetError
from pipelines.ingest.arrays import ArrayLayout, ArraysConfig, list_arrays, plan_arrays
from pipelines.ingest.encode import plan_encoding
from pipelines.ingest.latent_config import EncodeConfig, Encoder
from pipelines.ingest.listing import read_class_names
from pipelines.ingest.options import Splits, writing_settings
from pipelines.ingest.plan import Plan
from pipelines.ingest.target import has_dataset
from pipelines.shards import ShardsConfig
from trainer.autoencoder.codec import open_encoder
from trainer.autoencoder.files import find_autoencoder
from trainer.storage.store import StoreConfig

_SPLITS = ("train", "test")


def plan_encodings(options: argparse.Namespace, cache: Path) -> list[Plan]:
    """Plan to encode the images of each split.

    Args:
        options: The words of the command line, as `trainer.cli.latents` reads them.
        cache: Folder for fetched shards and autoencoders.

    Raises:
        DataError: There are no such images, or the place is taken.
        AutoencoderError: The autoencoder cannot be had.
    """
    devices = _devices(options.devices)
    config = EncodeConfig(
        image_size=options.image_size,
        dtype=options.dtype,
        flips=not options.no_flips,
        decoder=options.decoder,
        batch=options.batch,
        devices=devices,
        workers=len(devices) if options.workers is None else options.workers,
        shards=ShardsConfig(cache_dir=str(cache), anonymous=options.anonymous),
        **writing_settings(options),
    )
    source, prefix = options.source.rstrip("/"), options.prefix.rstrip("/")
    splits = _splits(options.splits, source=source)
    encoder = _encoder(options, cache=cache)
    return [
        plan_encoding(f"{source}/{split}", f"{prefix}/{split}", encoder=encoder, config=config)
        for split in splits
    ]


def plan_all_arrays(options: argparse.Namespace, cache: Path) -> list[Plan]:
    """Plan to take in the arrays of each split; see `plan_encodings`."""
    if not options.split or "/" in options.split:
        raise IngestSettingError(f"--split {options.split} is no name. Give one, such as train.")
    splits = Splits.from_options(options, split=options.split, what="arrays")
    encoder = _encoder(options, cache=cache)
    config = ArraysConfig(
        layout=ArrayLayout(
            holds=options.arrays,
            views=options.views,
            channels=encoder.channels,
            scale=encoder.scale if options.scaled else 1.0,
            shift=encoder.shift if options.scaled else 0.0,
        ),
        dtype=options.dtype,
        seed=options.seed,
        workers=2 if options.workers is None else options.workers,
        **writing_settings(options),
    )
    folder = Path(options.source).expanduser().resolve()
    classes = read_class_names(options.classes) if options.classes else None
    listing = list_arrays(folder, classes=classes)
    return [
        plan_arrays(part, place, folder=folder, encoder=encoder, config=config)
        for place, part in splits.divide(listing).items()
    ]


def _splits(wanted: str | None, *, source: str) -> tuple[str, ...]:
    """Choose the splits: those wanted, or those of train and test that are there."""
    if wanted is not None:
        names = tuple(filter(None, wanted.split(",")))
        if not names or len(set(names)) < len(names) or any("/" in name for name in names):
            raise IngestSettingError(
                f"--splits {wanted} is no list of different names. Give some, such as train,test."
            )
        return names
    found = tuple(split for split in _SPLITS if has_dataset(f"{source}/{split}"))
    if not found:
        raise MissingDatasetError(
            f"There is no dataset at {source}/train or {source}/test. Give the prefix above the "
            "splits of a dataset of images, and --splits if they have other names."
        )
    return found


def _devices(wanted: str | None) -> tuple[str, ...]:
    """Say which devices are to be worked on."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = tuple(f"cuda:{number}" for number in range(gpus))
    if wanted is None:
        return here or ("cpu",)
    devices = tuple(filter(None, wanted.split(",")))
    if not devices or any(device not in ("cpu", *here) for device in devices):
        raise IngestSettingError(
            f"--devices {wanted} cannot be used: this machine has {', '.join((*here, 'cpu'))}. "
            "Choose among them."
        )
    return devices


def _encoder(options: argparse.Namespace, *, cache: Path) -> Encoder:
    files = find_autoencoder(options.autoencoder, cache=cache, store=StoreConfig())
    return Encoder(
        place=options.autoencoder,
        sha256=files.sha256,
        factor=files.settings.factor,
        channels=files.settings.latent_channels,
        image_channels=files.settings.in_channels,
        scale=files.settings.scaling_factor,
        shift=files.settings.shift_factor or 0.0,
        precision=options.precision,
        load=partial(open_encoder, files, precision=options.precision),
    )
