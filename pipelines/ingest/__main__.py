"""Commands that write and check datasets: ``python -m pipelines.ingest COMMAND --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pipelines.console import command_parser, say, say_error, visible
from pipelines.decode.make import DecoderName
from pipelines.errors import DataError, IngestSettingError, UnreadableSourceError
from pipelines.ingest import digits, huggingface
from pipelines.ingest.images import IngestConfig, Resize, plan_images
from pipelines.ingest.listing import ClassesFrom, Listing, list_images, read_class_names
from pipelines.ingest.options import (
    Splits,
    add_classes,
    add_hold_out,
    add_target,
    add_writing_options,
    writing_settings,
)
from pipelines.ingest.plan import carry_out
from pipelines.ingest.source_files import in_words
from pipelines.ingest.verify import VerifyConfig, verify
from pipelines.shards import ShardsConfig

_REFUSED = 2

_IMAGE_FOLDER = """\
Turn a folder of images into a dataset: one sub-folder or tar archive for each class, or none.

    python -m pipelines.ingest image-folder pictures s3://bucket/datasets/pictures --hold-out 0.1

Run the same command again after an interruption: finished shards are kept.
"""
_HUGGINGFACE = """\
Turn a Hugging Face dataset of images into a dataset: one on the Hub, or a copy in a folder.

    NAME=uoft-cs/cifar10
    python -m pipelines.ingest huggingface $NAME data/cifar10 --image-column img --hold-out 0.1

Encoded images are taken over byte by byte. Run the same command again after an interruption:
finished shards are kept.
"""
_DIGITS = """\
The handwritten digits that come with scikit-learn, as a dataset: 1797 grey images of 8 x 8.

    python -m pipelines.ingest digits data/digits

writes <prefix>/train and <prefix>/test. It needs no network.
"""
_VERIFY = """\
Read a whole dataset once, and say what is in it and what is wrong with it.

    python -m pipelines.ingest verify s3://bucket/datasets/mine/train --workers 8

Every shard is fetched anew and checked against its hash, every image is decoded, and the classes
are counted and compared with ingest.json, where there is one. A damaged or missing shard is listed
and does not end the reading. It takes about 50 bytes of memory for each image.

Exit status: 0 all is fine, 1 something is wrong, 2 the dataset cannot be verified.
"""


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command line without the program's name; None takes the process's own.
        prog: What was typed for the command; None is `python -m` and its module.

    Returns:
        Exit status: 0 done, 1 verified and found bad, 2 refused.
    """
    options = _parser(prog).parse_args(arguments)
    try:
        status: int = options.run(options) or 0
    except DataError as error:
        say_error(error)
        return _REFUSED
    return status


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = command_parser(
        "pipelines.ingest",
        prog=prog,
        description="Write and check datasets.",
        epilog="python -m pipelines.ingest.latents --help: encode the images of a dataset once.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description, declare, run in (
        ("image-folder", _IMAGE_FOLDER, _add_image_folder, _ingest_image_folder),
        ("huggingface", _HUGGINGFACE, _add_huggingface, _ingest_huggingface),
        ("digits", _DIGITS, _add_digits, _ingest_digits),
        ("verify", _VERIFY, _add_verify, _verify),
    ):
        command = commands.add_parser(
            name,
            description=description,
            help=description.split("\n", 1)[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        declare(command)
        command.set_defaults(run=run)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Declare what every command that writes images takes after its source."""
    add_target(parser)
    add_hold_out(parser.add_argument)
    parser.add_argument("--image-size", type=int, help="resize and crop; default: keep the bytes")
    parser.add_argument("--encoding", choices=("jpeg", "png"), default="jpeg")
    add_writing_options(parser)


def _config(options: argparse.Namespace) -> IngestConfig:
    resize = None
    if options.image_size is not None:
        resize = Resize(image_size=options.image_size, encoding=options.encoding)
    return IngestConfig(
        resize=resize,
        seed=options.seed,
        workers=options.workers,
        **writing_settings(options),
    )


def _write(listing: Listing, splits: Splits, config: IngestConfig) -> None:
    parts = splits.divide(listing).items()
    carry_out([plan_images(part, place, config=config) for place, part in parts], report=say)


def _add_image_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="folder of class folders, of class .tar archives, or of images"
    )
    _add_images(parser)
    add_classes(parser.add_argument)
    told_by = parser.add_mutually_exclusive_group()
    told_by.add_argument(
        "--one-class",
        action="store_true",
        help="take all images for one class, whatever the folder",
    )
    told_by.add_argument(
        "--labels", type=Path, help="table of file_name and label: a .csv, .tsv or .jsonl file"
    )
    told_by.add_argument(
        "--webdataset", action="store_true", help="take labels from .cls files beside the images"
    )
    told_by.add_argument(
        "--as-classes",
        action="store_true",
        help="take folders for classes, also if they look like splits or shards",
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="take links for what they name, wherever it is"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse to pass over any file or leave out any image"
    )


def _ingest_image_folder(options: argparse.Namespace) -> None:
    if options.strict:
        options.max_skipped_fraction = 0.0
    config = _config(options)
    splits = Splits.from_options(
        options,
        split=options.split,
        way_out=(
            ", or take all images for one class by --one-class (make data-demo: "
            "INGEST=--one-class), if their folders mean nothing"
        ),
    )
    classes = read_class_names(options.classes) if options.classes else None
    listing = list_images(
        options.source,
        classes=classes,
        classes_from=_classes_from(options),
        follow_links=options.follow_links,
    )
    say(f"{listing.summary} in {visible(str(options.source))}")
    if listing.passed_over:
        passed = in_words(listing.passed_over)
        if options.strict:
            raise UnreadableSourceError(
                f"{visible(str(options.source))} holds what is not taken: {passed}. Remove or "
                "convert it, or leave --strict away to pass over it; nothing was written."
            )
        say(f"passed over: {passed}")
    _write(listing, splits, config)


def _classes_from(options: argparse.Namespace) -> ClassesFrom:
    if options.one_class:
        return "nothing"
    if options.webdataset:
        return "cls files"
    if options.as_classes:
        return "folders anyway"
    return options.labels or "folders"


def _add_huggingface(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="dataset on the Hub, or a local folder or .parquet file of it")
    _add_images(parser)
    parser.add_argument("--split", default="train", help="split to read (%(default)s)")
    parser.add_argument(
        "--write-split", help="split to write, for example test; default: of the same name"
    )
    parser.add_argument("--image-column", default="image", help="(%(default)s)")
    parser.add_argument("--label-column", default="label", help="(%(default)s)")
    parser.add_argument("--config-name", help="configuration, for a dataset that has several")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def _ingest_huggingface(options: argparse.Namespace) -> None:
    config = _config(options)
    splits = Splits.from_options(options, split=options.write_split or options.split)
    listing = huggingface.list_split(
        huggingface.load(options.name, config_name=options.config_name, revision=options.revision),
        options.split,
        image_column=options.image_column,
        label_column=options.label_column,
        folders=huggingface.folders_of(options.name),
    )
    say(f"{listing.summary} in the split {options.split} of {options.name}")
    _write(listing, splits, config)


def _add_digits(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the split into train and test")


def _ingest_digits(options: argparse.Namespace) -> None:
    digits.ensure_digits(options.prefix, seed=options.seed)
    say(f"{options.prefix}: complete")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="local folder or s3:// URL of one split")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument(
        "--forbid-duplicates", action="store_true", help="samples with the same bytes are a fault"
    )
    parser.add_argument(
        "--decoder",
        choices=get_args(DecoderName),
        default="dali",
        help="what decodes the images, as loader.decoder does in training (%(default)s)",
    )
    parser.add_argument(
        "--anonymous", action="store_true", help="read a public bucket without credentials"
    )
    parser.add_argument("--json", type=Path, help="file for the whole report")


def _verify(options: argparse.Namespace) -> int:
    config = VerifyConfig(
        workers=options.workers,
        forbid_duplicates=options.forbid_duplicates,
        decoder=options.decoder,
        shards=ShardsConfig(anonymous=options.anonymous),
    )
    if options.json:
        _refuse_unwritable(options.json)
    report = verify(options.prefix, config=config, report=say)
    say(report.text())
    if options.json:
        try:
            options.json.write_text(report.as_json())
        except OSError as error:  # such as a disk that has filled up since
            say(report.as_json())
            raise IngestSettingError(
                f"--json {options.json} cannot be written any more ({error.strerror}). What was to "
                "be there stands above."
            ) from error
    return 1 if report.faults else 0


def _refuse_unwritable(path: Path) -> None:
    """Find out before hours of reading whether the report can be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise IngestSettingError(
            f"--json {path} cannot be written ({error.strerror}). Choose another file."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
