"""Turn a folder of images into a dataset: one sub-folder or tar archive for each class, or none.

    python -m pipelines.ingest image-folder pictures s3://bucket/datasets/pictures --hold-out 0.1

Run the same command again after an interruption: finished shards are kept.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from pipelines.console import visible
from pipelines.errors import UnreadableSourceError
from pipelines.ingest.class_list import read_class_names
from pipelines.ingest.entry import in_words
from pipelines.ingest.listing import ClassesFrom, list_images
from pipelines.ingest.splits import Splits, add_writing_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "source", type=Path, help="folder of class folders, of class .tar archives, or of images"
    )
    add_writing_arguments(parser)
    parser.add_argument("--split", default="train", help="split to write (%(default)s)")
    parser.add_argument("--classes", type=Path, help="class names in label order, one a line")
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


def run(options: argparse.Namespace, note: Callable[[str], None]) -> int:
    """Carry out a parsed command line.

    Raises:
        UnreadableSourceError: With ``--strict``, something would be passed over.
        DataError: As for `list_images` and `Splits.write`.
    """
    if options.strict:
        options.max_skipped_share = 0.0
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
    note(f"{listing.summary} in {visible(str(options.source))}")
    if listing.passed_over:
        passed = in_words(listing.passed_over)
        if options.strict:
            raise UnreadableSourceError(
                f"{visible(str(options.source))} holds what is not taken: {passed}. Remove or "
                "convert it, or leave --strict away to pass over it; nothing was written."
            )
        note(f"passed over: {passed}")
    splits.write(listing, note=note)
    return 0


def _classes_from(options: argparse.Namespace) -> ClassesFrom:
    if options.one_class:
        return "nothing"
    if options.webdataset:
        return "cls files"
    if options.as_classes:
        return "folders anyway"
    return options.labels or "folders"
