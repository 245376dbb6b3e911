"""The command `python -m pipelines.ingest.latents`: encodes images once, or takes in latents."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from pipelines.addresses import find_path_fault
from pipelines.command import REFUSED, Outcome, command_parser, run
from pipelines.console import show_warnings
from pipelines.errors import IngestSettingError, MissingDatasetError
from pipelines.ingest.arrays import ArrayLayout, ArraysConfig, list_arrays, plan_arrays
from pipelines.ingest.encode import EncodeConfig, plan_encoding
from pipelines.ingest.latent_origin import Encoder
from pipelines.ingest.listing import read_class_names
from pipelines.ingest.options import (
    Splits,
    add_classes,
    add_hold_out,
    add_target,
    add_writing_options,
    carry_out_all,
    local_path,
    writing_settings,
)
from pipelines.ingest.plan import Plan
from pipelines.ingest.target import has_dataset
from pipelines.shards import ShardsConfig
from trainer.autoencoder.codec import open_encoder
from trainer.autoencoder.files import find_autoencoder
from trainer.cli.command import is_refusal
from trainer.config import paths
from trainer.storage.errors import CheckpointError
from trainer.storage.store import StoreConfig

_SPLITS = ("train", "test")
_DESCRIPTION = """\
Encode the images of a dataset with an autoencoder, so that training reads latents.

  python -m pipelines.ingest.latents s3://bucket/imagenet s3://bucket/imagenet-latents \\
      --autoencoder zelaki/eq-vae --image-size 256 --precision bf16

For each image, and for its mirror image, the means and standard deviations that the encoder gives
are stored, from which training draws a latent anew each time. Latents that another program has
computed are taken in from a folder with one sub-folder for each class and one .npy file for each
image:

  python -m pipelines.ingest.latents latents s3://bucket/imagenet-latents \\
      --autoencoder stabilityai/sd-vae-ft-ema --arrays mean-std --hold-out 0.01

Run the same command again after an interruption: finished shards are kept. The run that reads the
latents is started with

  data.space=latent data.prefix=PREFIX data.image_size=SIZE/FACTOR data.channels=CHANNELS codec=...

An S3 endpoint other than AWS is named by the environment variable S3_ENDPOINT_URL."""
_OF_ARRAYS = """\
Of an autoencoder of C channels a file holds one array of floating-point numbers: [2 C, size, size]
or [2, C, size, size] are means, then standard deviations (mean-std); [C, size, size] is one latent
of each image (latents), stored with deviation 0. With --views 2 one axis more comes first: the
image, then its mirror image. A dataset.json beside the files, as EDM2's tools write it, says which
class each is of; else folders do. Since nobody can tell which images arrays were made of, a run
needs data.images_prefix, images of the same classes that its samples are compared with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 2 refused."""
    with show_warnings():
        return run(_parse, _ingest, arguments, is_refusal=is_refusal)


def _ingest(options: argparse.Namespace) -> Outcome:
    try:
        _check(options)
        cache = paths.cache_folder(None)
        if options.cache is not None:
            cache = options.cache.expanduser().resolve()
        make_plans = _plan_arrays if options.arrays else _plan_encodings
        return carry_out_all(make_plans(options, cache))
    except (ValueError, CheckpointError) as error:
        if not is_refusal(error):
            raise
        # The trainer names the setting that it has for the autoencoder.
        told = str(error).replace("codec.source=", "--autoencoder ")
        told = told.replace("codec.source", "--autoencoder")
        return Outcome("", exit_code=REFUSED, error=told)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("pipelines.ingest.latents", description=_DESCRIPTION)
    default = EncodeConfig(image_size=1, shards=ShardsConfig())
    _add_common(parser, default)
    of_images = _add_images(parser, default)
    of_arrays = _add_arrays(parser)
    parser.set_defaults(of_images=of_images, of_arrays=of_arrays)
    return parser.parse_args(words)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        IngestSettingError: Options of images and of arrays are mixed, or --image-size is missing.
    """
    strange = options.of_arrays if options.arrays is None else options.of_images
    for action in strange:
        if getattr(options, action.dest) != action.default:
            option = action.option_strings[0]
            told = (
                f"{option} is for latents computed already, which --arrays takes in. Give "
                "--arrays mean-std or --arrays latents too"
                if options.arrays is None
                else f"{option} is for images, and --arrays {options.arrays} takes in latents "
                "computed already. Leave one of them away"
            )
            raise IngestSettingError(f"{told}; --help lists the options of both.")
    if options.arrays is not None and (fault := find_path_fault(options.source)):
        raise IngestSettingError(fault)
    if options.arrays is None and options.image_size is None:
        raise IngestSettingError(
            "--image-size is missing: height and width that images are cropped and resized to "
            "before they are encoded, such as 256. For latents computed already, give --arrays."
        )


def _add_common(parser: argparse.ArgumentParser, default: EncodeConfig) -> None:
    parser.add_argument(
        "source", help="prefix of the images, above their splits; or, with --arrays, a local folder"
    )
    add_target(parser)
    parser.add_argument(
        "--autoencoder",
        required=True,
        help="AutoencoderKL of diffusers: a folder, an s3:// prefix or a name on the hub",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default=default.dtype,
        help="what is stored (%(default)s)",
    )
    add_writing_options(
        parser,
        workers=None,
        workers_help="processes; those that encode are dealt to the devices in turn, with one "
        "thread each on the cpu; default: one for each device, and 2 for arrays",
    )
    parser.add_argument(
        "--cache",
        type=local_path,
        help="for fetched shards and autoencoders; default: cache in $LAPFLOW_HOME or ~/lapflow",
    )


def _add_images(
    parser: argparse.ArgumentParser, default: EncodeConfig
) -> tuple[argparse.Action, ...]:
    group = parser.add_argument_group("images, to be encoded")
    return (
        group.add_argument("--image-size", type=int, help="pixels, along each side; required"),
        group.add_argument(
            "--anonymous",
            action="store_true",
            help="read the images of a public bucket without credentials",
        ),
        group.add_argument(
            "--splits",
            help="such as train,test; default: those of train and test that the source has",
        ),
        group.add_argument(
            "--precision",
            choices=("fp32", "bf16"),
            default="fp32",
            help="what the encoder computes in (%(default)s)",
        ),
        group.add_argument("--no-flips", action="store_true", help="leave mirror images out"),
        group.add_argument(
            "--devices", help="such as cuda:0,cuda:1; default: every GPU, or the cpu without one"
        ),
        group.add_argument(
            "--batch",
            type=int,
            default=default.batch,
            help="images encoded at a time (%(default)s)",
        ),
        group.add_argument(
            "--decoder", choices=("dali", "pillow"), default=default.decoder, help="(%(default)s)"
        ),
    )


def _add_arrays(parser: argparse.ArgumentParser) -> tuple[argparse.Action, ...]:
    group = parser.add_argument_group("arrays, latents computed already", description=_OF_ARRAYS)
    group.add_argument("--arrays", choices=("mean-std", "latents"), help="what they hold")
    return (
        group.add_argument(
            "--views", type=int, choices=(1, 2), default=1, help="of each image (%(default)s)"
        ),
        group.add_argument(
            "--scaled",
            action="store_true",
            help="they are shifted and scaled by the autoencoder's own numbers, which is undone",
        ),
        *add_classes(group.add_argument),
        *add_hold_out(group.add_argument),
    )


def _plan_encodings(options: argparse.Namespace, cache: Path) -> list[Plan]:
    """Plan to encode the images of each split."""
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


def _plan_arrays(options: argparse.Namespace, cache: Path) -> list[Plan]:
    """Plan to take in the arrays of each split."""
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
