"""The command `python -m pipelines.ingest.latents`: encodes images once, or takes in latents."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipelines.addresses import find_path_fault
from pipelines.command import REFUSED, Outcome, command_parser, run
from pipelines.console import show_warnings
from pipelines.errors import IngestSettingError
from pipelines.ingest.latent_config import EncodeConfig
from pipelines.ingest.options import (
    add_classes,
    add_hold_out,
    add_target,
    add_writing_options,
    carry_out_all,
    local_path,
)
from pipelines.shards import ShardsConfig
from trainer.cli.command import is_refusal
from trainer.config import paths
from trainer.storage.errors import CheckpointError

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
        # Not for those who ask for help, or whose words are refused: it needs torch.
        from trainer.cli.latent_plans import plan_all_arrays, plan_encodings

        make_plans = plan_all_arrays if options.arrays else plan_encodings
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
