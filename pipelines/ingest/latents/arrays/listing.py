"""Which arrays there are, and of which class each is.

They lie in one folder for each class, or all in one folder, which is one class. Where there is a
dataset.json beside them, as EDM2's tools write it, classes are taken from there: the folders that
those tools make only keep the files apart.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.documents import read_json
from pipelines.errors import EmptyDatasetError, UnreadableSourceError
from pipelines.ingest.class_folders import class_names
from pipelines.ingest.entry import Entry, Wanted, count, in_words
from pipelines.ingest.folder import walk
from pipelines.ingest.latents.arrays.npy import MAX_BYTES
from pipelines.ingest.listing import Listing, numbered

_ARRAYS = Wanted(suffixes=(".npy",), max_bytes=MAX_BYTES, archives=False)
_LABELS = "dataset.json"
_MAX_LABEL_BYTES = 1 << 30
_MAX_CLASSES = 1 << 20


def list_arrays(source: Path, *, classes: tuple[str, ...] | None = None) -> Listing:
    """Find the arrays under a folder.

    Args:
        source: A folder with one folder for each class, or with nothing but arrays, or with a
            dataset.json.
        classes: Names of the classes in the order of their labels; None numbers those found, in
            alphabetical order, or calls those of dataset.json by their numbers.

    Raises:
        UnreadableSourceError: The folder is missing, has another layout, or has a class that
            ``classes`` does not list.
        EmptyDatasetError: There are no arrays.
    """
    try:
        entries = list(walk(source, wanted=_ARRAYS))
        labelled = (source / _LABELS).is_file()
    except OSError as error:
        raise UnreadableSourceError(
            f"{source} cannot be read ({error}). Give a folder with one sub-folder of .npy files "
            "for each class."
        ) from error
    arrays = [entry for entry in entries if not entry.passed_over]
    passed_over = count(entry.passed_over for entry in entries if entry.passed_over)
    if not arrays:
        raise EmptyDatasetError(
            f"{source} holds no arrays{f', only {in_words(passed_over)}' if passed_over else ''}: "
            "there must be files that end in .npy, in one sub-folder for each class, or in the "
            "folder itself."
        )
    if labelled:
        names, classes = _as_labelled(arrays, source, classes)
    else:
        names = class_names(
            arrays, source=source, what="array", instead="give a folder of nothing but arrays"
        )
    listing = numbered(dict(zip(arrays, names, strict=True)), classes=classes, source=source)
    return replace(listing, passed_over=passed_over)


def _as_labelled(
    arrays: Sequence[Entry], source: Path, classes: tuple[str, ...] | None
) -> tuple[list[str], tuple[str, ...]]:
    """Take the class of each array from dataset.json; give all classes too."""
    labels = _read_labels(source / _LABELS)
    files = ["/".join(array.parts) for array in arrays]
    missing = sorted(set(files) - labels.keys())
    if missing:
        raise UnreadableSourceError(
            f"{source / _LABELS} does not say of which class {missing[0]!r} is. Add it, or remove "
            f"{_LABELS} to take each folder for a class."
        )
    most = max(labels[file] for file in files)
    known = classes or tuple(str(label) for label in range(most + 1))
    if most >= len(known):
        raise UnreadableSourceError(
            f"{source / _LABELS} has the label {most}, and the class list names "
            f"{len(known)} classes. Name all of them, in the order of their labels."
        )
    return [known[labels[file]] for file in files], known


def _read_labels(file: Path) -> dict[str, int]:
    """Read {"labels": [[name, label], ...]}."""
    try:
        content: Any = read_json(file, max_bytes=_MAX_LABEL_BYTES)
        pairs = [(name, label) for name, label in content["labels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _strange(file, f"{type(error).__name__}: {error}") from None
    labels: dict[str, int] = {}
    for name, label in pairs:
        if not isinstance(name, str) or type(label) is not int or not 0 <= label < _MAX_CLASSES:
            raise _strange(file, f"{str(name)[:80]!r} has the label {str(label)[:40]!r}")
        if labels.setdefault(name, label) != label:
            raise _strange(file, f"{name[:80]!r} has the labels {labels[name]} and {label}")
    return labels


def _strange(file: Path, reason: str) -> UnreadableSourceError:
    return UnreadableSourceError(
        f'{file} does not hold {{"labels": [[name, label], ...]}} with labels from 0 ({reason}). '
        "Restore the file, or remove it to take each folder for a class."
    )
