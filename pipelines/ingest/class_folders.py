"""Classes by the folders that images lie in, unless those look like something else."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path, PurePosixPath

from pipelines.console import visible
from pipelines.errors import UnreadableSourceError
from pipelines.ingest.entry import Entry
from pipelines.ingest.label_table import sample_key

_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))
_TABLES = (".csv", ".tsv", ".jsonl")
_TABLE_NAMES = frozenset(("labels", "label", "metadata", "annotations", "train", "train_labels"))
_SHARD_LABELS = (".cls", ".json", ".txt")
_ANYWAY = "If they are classes all the same, say so by --as-classes."


def common_folder(images: Sequence[Entry]) -> tuple[str, ...]:
    """Find the folder around all class folders, as in an archive that was made of one folder.

    It holds several folders, and no image of its own; a folder that does is a class.
    """
    folders = {image.parts[:-1] for image in images}
    first, last = min(folders), max(folders)  # what these have in common, all between them have
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))  # noqa: B905
    return () if first[:shared] in folders else first[:shared]


def without(folder: tuple[str, ...], entry: Entry) -> Entry:
    """Leave a folder away that all images share."""
    shared = entry.parts[: len(folder)] == folder
    return replace(entry, parts=entry.parts[len(folder) :]) if shared else entry


def class_names(
    images: Sequence[Entry],
    *,
    source: Path,
    what: str = "image",
    instead: str = "take all images for one class by --one-class",
) -> list[str]:
    """Give the class of each image: its outermost folder, or the source where there are none.

    Args:
        images: The images, or other files.
        source: What holds them.
        what: What to call one of them.
        instead: What can be done about those whose class is unclear.

    Raises:
        UnreadableSourceError: Some images lie in folders, and some do not.
    """
    loose = sorted(image.parts[0] for image in images if len(image.parts) == 1)
    inside = sorted(image.parts[0] for image in images if len(image.parts) > 1)
    if loose and inside:
        raise UnreadableSourceError(
            f"{source} holds the {what} {visible(loose[0])!r} beside the class "
            f"{visible(inside[0])!r}, so its class is unclear. Put it into a class "
            f"folder, or {instead}."
        )
    if loose and source.is_file():
        raise UnreadableSourceError(
            f"{source} holds the image {visible(loose[0])!r} outside of any class folder. "
            "Take all its images for one class by --one-class, or put each into a folder of its "
            "class."
        )
    alone = source.resolve().name
    return [image.parts[0] if len(image.parts) > 1 else alone for image in images]


def refuse_other_layouts(
    names: Sequence[str], images: Sequence[Entry], others: Sequence[Entry], *, source: Path
) -> None:
    """Refuse folders that are hardly classes.

    Args:
        names: Class of each image, by its folder.
        images: The images.
        others: What is passed over.
        source: What holds them.

    Raises:
        UnreadableSourceError: They look like splits, or like webdataset's shards, or there is a
            table that looks like the images' labels.
    """
    splits = sorted({name for name in names if name.lower() in _SPLITS})
    if len(splits) > 1:
        raise UnreadableSourceError(
            f"{source} holds the folders {' and '.join(splits)}, which look like splits and not "
            f"like classes. Give each by itself: {source}/{splits[0]} with --split train, and the "
            f"one to compare samples with by --split test. {_ANYWAY}"
        )
    keys = {sample_key(image) for image in images if image.path.suffix.lower() == ".tar"}
    beside = [
        other
        for other in others
        if other.passed_over in _SHARD_LABELS and keys and sample_key(other) in keys
    ]
    if beside:
        raise UnreadableSourceError(
            f"{source} holds {visible('/'.join(beside[0].parts))!r} beside an image of that name "
            "in an archive, which looks like a shard of webdataset and not like a class. Take the "
            "classes from such .cls files by --webdataset, or from a table by --labels FILE. "
            f"{_ANYWAY}"
        )
    tables = [other for other in others if _is_table(other, single=len(set(names)) == 1)]
    if tables:
        raise UnreadableSourceError(
            f"{source} holds {visible('/'.join(tables[0].parts))!r}, which looks like a table of "
            f"the images' labels, so their folders may be no classes. Take the labels from it by "
            f"--labels {visible(str(tables[0].path))}, or all images for one class by --one-class. "
            f"{_ANYWAY}"
        )


def _is_table(entry: Entry, *, single: bool) -> bool:
    """Tell whether a file may hold the images' labels.

    Beside folders of several classes only its name can tell, for they do as they are.
    """
    stem = PurePosixPath(entry.parts[-1]).stem.lower()
    outside = len(entry.parts) == 1
    return entry.passed_over in _TABLES and (single or (outside and stem in _TABLE_NAMES))
