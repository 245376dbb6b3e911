"""The command `python -m pipelines.ingest.latents`: encodes images once, or takes in latents."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from pipelines.console import say, say_error
from pipelines.errors import IngestSettingError, MissingDatasetError
from pipelines.ingest.class_list import read_class_names
from pipelines.ingest.latents.arrays.layout import ArrayLayout
from pipelines.ingest.latents.arrays.listing import list_arrays
from pipelines.ingest.latents.arrays.plan import ArrayPlan, ArraysConfig, ArraySource, split_apart
from pipelines.ingest.latents.encode import EncodeConfig, LatentPlan
from pipelines.ingest.latents.encoder import Encoder
from pipelines.ingest.latents.options import parse_options
from pipelines.ingest.write import has_dataset
from pipelines.shards import ShardsConfig
from trainer.autoencoder.codec import open_encoder
from trainer.autoencoder.files import find_autoencoder
from trainer.config import paths
from trainer.errors import is_user_error
from trainer.storage.errors import CheckpointError
from trainer.storage.store import StoreConfig

_REFUSED = 2
_SPLITS = ("train", "test")


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command line without the program's name; None takes the process's own.
        prog: What was typed for the command; None is `python -m` and its module.

    Returns:
        Exit status: 0 done, 2 refused.
    """
    try:
        options = parse_options(arguments, prog=prog)
        cache = paths.cache_folder(None)
        if options.cache is not None:
            cache = options.cache.expanduser().resolve()
        plans = _array_plans(options, cache) if options.arrays else _image_plans(options, cache)
        # All places have been looked at before the first takes hours.
        for place, plan in plans.items():
            plan.carry_out(partial(_tell, place))
    except (ValueError, CheckpointError) as error:
        if not is_user_error(error) and not isinstance(error, CheckpointError):
            raise
        # The trainer names the setting that it has for the autoencoder.
        said = str(error).replace("codec.source=", "--autoencoder ")
        say_error(said.replace("codec.source", "--autoencoder"))
        return _REFUSED
    return 0


def _image_plans(options: argparse.Namespace, cache: Path) -> dict[str, LatentPlan]:
    """Plan to encode images, for the place of each split."""
    config = EncodeConfig(
        image_size=options.image_size,
        dtype=options.dtype,
        flips=not options.no_flips,
        decoder=options.decoder,
        batch=options.batch,
        devices=_devices(options.devices, workers=options.workers),
        shard_bytes=options.shard_mib << 20,
        max_skipped_share=options.max_skipped_share,
        work_dir=options.work_dir,
        shards=ShardsConfig(cache_dir=str(cache), anonymous=options.anonymous),
    )
    source, prefix = options.source.rstrip("/"), options.prefix.rstrip("/")
    splits = _splits(options.splits, source=source)
    encoder = _encoder(options, cache=cache)
    return {
        f"{prefix}/{split}": LatentPlan(
            f"{source}/{split}", f"{prefix}/{split}", encoder=encoder, config=config
        )
        for split in splits
    }


def _array_plans(options: argparse.Namespace, cache: Path) -> dict[str, ArrayPlan]:
    """Plan to take in arrays, for the place of each split."""
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
        hold_out=options.hold_out,
        seed=options.seed,
        workers=ArraysConfig.workers if options.workers is None else options.workers,
        shard_bytes=options.shard_mib << 20,
        max_skipped_share=options.max_skipped_share,
        work_dir=options.work_dir,
    )
    folder = Path(options.source).expanduser().resolve()
    classes = read_class_names(options.classes) if options.classes else None
    listing = list_arrays(folder, classes=classes)
    prefix = options.prefix.rstrip("/")
    return {
        f"{prefix}/{split}": ArrayPlan(
            ArraySource(folder=str(folder), listing=part, encoder=encoder),
            f"{prefix}/{split}",
            config=config,
        )
        for split, part in split_apart(listing, split=options.split, config=config).items()
    }


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


def _devices(wanted: str | None, *, workers: int | None) -> tuple[str, ...]:
    """Say which device each process works on."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = tuple(f"cuda:{number}" for number in range(gpus))
    devices = here or ("cpu",)
    if wanted is not None:
        devices = tuple(filter(None, wanted.split(",")))
        strange = [device for device in devices if device not in ("cpu", *here)]
        if strange or not devices:
            raise IngestSettingError(
                f"--devices {wanted} cannot be used: this machine has {', '.join((*here, 'cpu'))}. "
                "Choose among them."
            )
    count = len(devices) if workers is None else workers
    if count < 1:
        raise IngestSettingError(f"--workers {count} must be at least 1.")
    return tuple(devices[number % len(devices)] for number in range(count))


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


def _tell(place: str, text: str) -> None:
    say(f"{place}: {text}")
