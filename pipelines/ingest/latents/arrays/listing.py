"""Which arrays there are, and of which class each is.

They lie in one folder for each class, or all in one folder, which is one class. Where there is a
dataset.json beside them, as EDM2's tools write it, classes are taken from there: the folders that
those tools make only keep the files apart.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import EmptyDatasetError
from pipelines.ingest.listing import ListedImage, Listing, UnreadableSourceError

_SUFFIX = ".npy"
_LABELS = "dataset.json"
_MOST_LABEL_BYTES = 1 << 30
_MOST_CLASSES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Arrays, each with its class, and all classes."""

    class_of: Mapping[Path, str]
    classes: tuple[str, ...]


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
        labelled = (source / _LABELS).is_file()
        found = _as_labelled(source, classes) if labelled else _as_folders(source)
        sizes = {file: file.stat().st_size for file in sorted(found.class_of)}
    except OSError as error:
        raise UnreadableSourceError(
            f"{source} cannot be read ({error}). Give a folder with one sub-folder of {_SUFFIX} "
            "files for each class."
        ) from error
    if not sizes:
        raise EmptyDatasetError(
            f"{source} holds no arrays: there must be files that end in {_SUFFIX}, in one "
            "sub-folder for each class, or in the folder itself."
        )
    names = classes or found.classes
    labels = {name: label for label, name in enumerate(names)}
    unknown = sorted(set(found.class_of.values()) - labels.keys())
    if unknown:
        raise UnreadableSourceError(
            f"{source} holds the class {unknown[0]!r}, which is not among the {len(names)} classes "
            "given. Add it to the class list, or remove its folder."
        )
    return Listing(
        images=tuple(
            ListedImage(
                path=str(file),
                offset=0,
                size=size,
                label=labels[found.class_of[file]],
                name=file.relative_to(source).as_posix(),
            )
            for file, size in sizes.items()
        ),
        classes=names,
    )


def _as_folders(source: Path) -> _Found:
    """Take each folder for a class."""
    entries = sorted(source.iterdir())
    loose = [entry for entry in entries if _is_array(entry)]
    class_of = {file: source.resolve().name for file in loose}
    for folder in filter(Path.is_dir, entries):
        files = [file for file in folder.rglob("*") if _is_array(file)]
        if loose and files:
            raise UnreadableSourceError(
                f"{source} holds the array {loose[0].name!r} beside the class {folder.name!r}, so "
                "its class is unclear. Put it into a class folder, or take all for one class by "
                "giving a folder that holds nothing but arrays."
            )
        class_of.update(dict.fromkeys(files, folder.name))
    return _Found(class_of=class_of, classes=tuple(sorted(set(class_of.values()))))


def _as_labelled(source: Path, classes: tuple[str, ...] | None) -> _Found:
    """Take the class of each array from dataset.json."""
    labels = _read_labels(source / _LABELS)
    files = [file for file in source.rglob("*") if _is_array(file)]
    names = {file: file.relative_to(source).as_posix() for file in files}
    missing = sorted(set(names.values()) - labels.keys())
    if missing:
        raise UnreadableSourceError(
            f"{source / _LABELS} does not say of which class {missing[0]!r} is. Add it, or remove "
            f"{_LABELS} to take each folder for a class."
        )
    used = {labels[name] for name in names.values()}
    known = classes or tuple(str(label) for label in range(max(used, default=-1) + 1))
    if max(used, default=0) >= len(known) > 0:
        raise UnreadableSourceError(
            f"{source / _LABELS} has the label {max(used)}, and the class list names "
            f"{len(known)} classes. Name all of them, in the order of their labels."
        )
    return _Found(
        class_of={file: known[labels[name]] for file, name in names.items()}, classes=known
    )


def _read_labels(file: Path) -> dict[str, int]:
    """Read {"labels": [[name, label], ...]}."""
    if file.stat().st_size > _MOST_LABEL_BYTES:
        raise _strange(file, f"it is longer than {_MOST_LABEL_BYTES} bytes")
    try:
        content: Any = json.loads(file.read_bytes())
        labels = {name: label for name, label in content["labels"]}  # noqa: C416  # checks pairs
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _strange(file, f"{type(error).__name__}: {error}") from None
    for name, label in labels.items():
        if not isinstance(name, str) or type(label) is not int or not 0 <= label < _MOST_CLASSES:
            raise _strange(file, f"{str(name)[:80]!r} has the label {str(label)[:40]!r}")
    return labels


def _strange(file: Path, reason: str) -> UnreadableSourceError:
    return UnreadableSourceError(
        f'{file} does not hold {{"labels": [[name, label], ...]}} with labels from 0 ({reason}). '
        "Restore the file, or remove it to take each folder for a class."
    )


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == _SUFFIX and path.is_file()
