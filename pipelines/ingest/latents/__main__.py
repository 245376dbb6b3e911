"""The command `python -m pipelines.ingest.latents`, which encodes images once and for all."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from pipelines.errors import IngestSettingError, MissingDatasetError
from pipelines.ingest.latents.encode import EncodeConfig, LatentPlan
from pipelines.ingest.latents.encoder import Encoder
from pipelines.ingest.write import has_dataset
from pipelines.shards import ShardsConfig
from trainer import places
from trainer.autoencoder import open_encoder
from trainer.autoencoder_files import find_autoencoder
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.store import StoreConfig
from trainer.mistakes import is_users_mistake

_REFUSED = 2
_SPLITS = ("train", "test")
_DESCRIPTION = """\
Encode the images of a dataset with an autoencoder, so that training reads latents.

  python -m pipelines.ingest.latents s3://bucket/imagenet s3://bucket/imagenet-latents \\
      --autoencoder zelaki/eq-vae --image-size 256 --precision bf16

For each image, and for its mirror image, the means and standard deviations that the encoder gives
are stored, from which training draws a latent anew each time. Run the same command again after an
interruption: finished shards are kept. The run that reads the latents is started with

  data.space=latent data.prefix=PREFIX data.image_size=SIZE/FACTOR data.channels=CHANNELS codec=...

An S3 endpoint other than AWS is named by the environment variable S3_ENDPOINT_URL."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 2 refused.
    """
    options = _parser().parse_args(arguments)
    try:
        _run(options, _say)
    except (ValueError, CheckpointError) as error:
        if not is_users_mistake(error) and not isinstance(error, CheckpointError):
            raise
        # The trainer names the setting that it has for the autoencoder.
        said = str(error).replace("codec.source=", "--autoencoder ")
        sys.stderr.write(f"error: {said.replace('codec.source', '--autoencoder')}\n")
        return _REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    default = EncodeConfig(image_size=1, shards=ShardsConfig())
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ingest.latents",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="prefix of the images, above their splits")
    parser.add_argument("prefix", help="local folder or s3:// URL; the splits are added")
    parser.add_argument(
        "--autoencoder",
        required=True,
        help="AutoencoderKL of diffusers: a folder, an s3:// prefix or a name on the hub",
    )
    parser.add_argument("--image-size", type=int, required=True, help="pixels, along each side")
    parser.add_argument(
        "--splits", help="such as train,test; default: those of train and test that the source has"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="what the encoder computes in (%(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default=default.dtype,
        help="what is stored (%(default)s)",
    )
    parser.add_argument("--no-flips", action="store_true", help="leave mirror images out")
    parser.add_argument(
        "--devices", help="such as cuda:0,cuda:1; default: every GPU, or the cpu without one"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes, dealt to the devices in turn, of one thread each on the cpu; default: one "
        "for each device",
    )
    parser.add_argument(
        "--batch", type=int, default=default.batch, help="images encoded at a time (%(default)s)"
    )
    parser.add_argument(
        "--decoder", choices=("dali", "pillow"), default=default.decoder, help="(%(default)s)"
    )
    parser.add_argument(
        "--shard-mib", type=int, default=default.shard_bytes >> 20, help="(%(default)s)"
    )
    parser.add_argument(
        "--max-skipped-share",
        type=float,
        default=default.max_skipped_share,
        help="share of the images that may be undecodable (%(default)s)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=default.work_dir,
        help="for unfinished shards of a remote dataset (%(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="for fetched shards and autoencoders; default: cache in $LAPFLOW_HOME or ~/lapflow",
    )
    return parser


def _run(options: argparse.Namespace, note: Callable[[str], None]) -> None:
    cache = places.cache_folder(None)
    if options.cache is not None:
        cache = options.cache.expanduser().resolve()
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
        shards=ShardsConfig(cache_dir=str(cache)),
    )
    source, prefix = options.source.rstrip("/"), options.prefix.rstrip("/")
    splits = _splits(options.splits, source=source)
    encoder = _encoder(options, cache=cache)
    # All places are looked at before the first takes hours.
    plans = [
        LatentPlan(f"{source}/{split}", f"{prefix}/{split}", encoder=encoder, config=config)
        for split in splits
    ]
    for split, plan in zip(splits, plans, strict=True):
        plan.carry_out(partial(_tell, note, f"{prefix}/{split}"))


def _tell(note: Callable[[str], None], place: str, text: str) -> None:
    note(f"{place}: {text}")


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
        factor=files.factor,
        channels=files.latent_channels,
        image_channels=files.image_channels,
        scale=files.scale,
        shift=files.shift,
        precision=options.precision,
        load=partial(open_encoder, files, precision=options.precision),
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
