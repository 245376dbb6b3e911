"""Commands that write and check datasets: ``python -m pipelines.ingest COMMAND --help``."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from pipelines.command import (
    REFUSED,
    CommandParser,
    Outcome,
    add_answer_options,
    command_parser,
    run,
)
from pipelines.console import as_typed, say, show_warnings, visible, write
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
    carry_out_all,
    describe_datasets,
    local_path,
    writing_settings,
)
from pipelines.ingest.source_files import in_words
from pipelines.ingest.verify import VerifyConfig, verify
from pipelines.shards import ShardsConfig

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command line without the program's name; None takes the process's own.

    Returns:
        Exit status: 0 done, 1 verified and found bad, 2 refused.
    """
    parser = _parser()
    with show_warnings():
        return run(
            lambda words: _parse(parser, words),
            lambda options: options.run(options),
            arguments,
            is_refusal=lambda error: isinstance(error, DataError),
        )


def _parse(parser: CommandParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the words; `verify --json FILE` is understood as what --report FILE is now."""
    given = [f"--report={word[7:]}" if word.startswith("--json=") else word for word in words]
    options, rest = parser.parse_known_args(given)
    if options.command == "verify" and len(rest) == 1 and "--json" in given[:-1]:
        # verify takes one word: of two, that behind --json was the file.
        given[given.index("--json")] = "--report"
        options, rest = parser.parse_known_args(given)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given != list(words):
        note = "note: --json FILE is --report FILE now; the old way goes with the next release"
        write(note, sys.stderr)
    return options


def _parser() -> CommandParser:
    parser = command_parser(
        "pipelines.ingest",
        description="Write and check datasets.",
        epilog="python -m pipelines.ingest.latents --help: encode the images of a dataset once.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description, declare, make in (
        ("image-folder", _IMAGE_FOLDER, _add_image_folder, _ingest_image_folder),
        ("huggingface", _HUGGINGFACE, _add_huggingface, _ingest_huggingface),
        ("digits", _DIGITS, _add_digits, _ingest_digits),
        ("verify", _VERIFY, _add_verify, _verify),
    ):
        command = commands.add_parser(
            name,
            description=as_typed(description),
            help=description.split("\n", 1)[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        declare(command)
        add_answer_options(command, default=argparse.SUPPRESS)
        command.set_defaults(run=make)
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


def _write(listing: Listing, splits: Splits, config: IngestConfig) -> Outcome:
    parts = splits.divide(listing).items()
    return carry_out_all([plan_images(part, place, config=config) for place, part in parts])


def _add_image_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=local_path,
        help="folder of class folders, of class .tar archives, or of images",
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
        "--labels",
        type=local_path,
        help="table of file_name and label: a .csv, .tsv or .jsonl file",
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


def _ingest_image_folder(options: argparse.Namespace) -> Outcome:
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
    return _write(listing, splits, config)


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


def _ingest_huggingface(options: argparse.Namespace) -> Outcome:
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
    return _write(listing, splits, config)


def _add_digits(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the split into train and test")


def _ingest_digits(options: argparse.Namespace) -> Outcome:
    digits.ensure_digits(options.prefix, seed=options.seed)
    root = options.prefix.rstrip("/")
    splits = [f"{root}/{split}" for split in ("train", "test")]
    return Outcome(f"{visible(root)}: complete", partial(describe_datasets, splits))


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
    parser.add_argument(
        "--report", type=local_path, metavar="FILE", help="file for the whole report"
    )


def _verify(options: argparse.Namespace) -> Outcome:
    config = VerifyConfig(
        workers=options.workers,
        forbid_duplicates=options.forbid_duplicates,
        decoder=options.decoder,
        shards=ShardsConfig(anonymous=options.anonymous),
    )
    if options.report:
        _refuse_unwritable(options.report)
    report = verify(options.prefix, config=config, report=say)
    outcome = Outcome(report.text(), report.to_dict(), 1 if report.faults else 0)
    if options.report:
        document = json.dumps(report.to_dict(), indent=1)
        try:
            options.report.write_text(document)
        except OSError as error:  # such as a disk that has filled up since
            error_text = (
                f"--report {options.report} cannot be written any more ({error.strerror}). What "
                "was to be there stands above."
            )
            text = f"{outcome.text}\n{document}"
            return replace(outcome, text=text, exit_code=REFUSED, error=error_text)
    return outcome


def _refuse_unwritable(path: Path) -> None:
    """Find out before hours of reading whether the report can be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise IngestSettingError(
            f"--report {path} cannot be written ({error.strerror}). Choose another file."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
