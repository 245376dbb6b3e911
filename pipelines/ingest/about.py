"""What a dataset says of itself: ingest.json, which an ingest writes beside the index."""

from dataclasses import dataclass, replace
from typing import Any

from pipelines.console import visible
from pipelines.documents import DocumentError, belongs, parse_json, unseal, validate_as
from pipelines.errors import DataError
from pipelines.ingest.source_files import PassedOver
from pipelines.source import Source, SourceConfig

ABOUT_NAME = "ingest.json"


class InvalidAboutError(DataError):
    """ingest.json is not what an ingest writes."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a dataset was made of.

    Attributes:
        plan: Digest of what was to be written.
        classes: Name of each class; a label is a place in this list.
        images_per_class: Images in the dataset, in the order of `classes`; None if that was not
            noted.
        skipped: Name and reason of each image that was left out.
        passed_over: What lay beside the images and was not taken, and how often.
    """

    plan: str
    classes: tuple[str, ...]
    images_per_class: tuple[int, ...] | None = None
    skipped: tuple[tuple[str, str], ...]
    passed_over: PassedOver = ()


def read_about(prefix: str, *, config: SourceConfig | None = None) -> About | None:
    """Read what a dataset says of itself.

    Args:
        prefix: Local folder or URL of one split.
        config: Attempts and time limits.

    Returns:
        None for a dataset that something else wrote, such as streaming's own MDSWriter.

    Raises:
        InvalidAboutError: There is an ingest.json of another kind, or of another dataset.
        MissingDatasetError: There is one, and no index beside it.
        StoreUnreachableError: The store refuses, or does not answer.
    """
    source = Source(prefix, config=config)
    try:
        content = source.read(ABOUT_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        values = parse_json(content)
        about = _parse(values)
        if not belongs(values, source.read_index):
            raise DocumentError("it is of another dataset than the index beside it")
        return about
    except DocumentError as error:
        raise InvalidAboutError(
            f"{source.prefix}/{ABOUT_NAME} is not what pipelines.ingest writes ({error}). Restore "
            "the file, or remove it to do without the names of the classes; if you changed it "
            "yourself, remove its field sha256."
        ) from error


def _parse(values: Any) -> About:
    # Datasets of before have no checksum.
    about = validate_as(About, unseal(values, required=False))
    counts = about.images_per_class
    if counts is not None and len(counts) != len(about.classes):
        raise DocumentError("images_per_class is not a number for each class")
    return replace(
        about,
        classes=tuple(map(visible, about.classes)),
        skipped=tuple((visible(name), visible(reason)) for name, reason in about.skipped),
        passed_over=tuple((visible(kind), number) for kind, number in about.passed_over),
    )
