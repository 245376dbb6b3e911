"""What a source holds: every image as a range of bytes of some file, with its class.

Images lie in one folder for each class, as in ImageNet's own layout, or in one uncompressed tar
archive for each class, or in one archive of either of these. An image in an archive is a range of
the archive's bytes, so nothing has to be unpacked. A folder of images without classes is one class.
What else lies there is counted, and told.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.console import visible
from pipelines.documents import DocumentError, read_bounded
from pipelines.errors import EmptyDatasetError, UnreadableSourceError
from pipelines.ingest.label_table import labels_beside, labels_of, sample_key, sort_labels
from pipelines.ingest.source_files import Entry, PassedOver, Wanted, count, in_words, walk
from pipelines.order import permutation

MAX_IMAGE_BYTES = 1 << 28  # as many as the largest image that is decoded takes without compression
IMAGES = Wanted(
    # Formats that training decodes, by the names that they have.
    suffixes=(".jpeg", ".jpg", ".jpe", ".jfif", ".png"),
    max_bytes=MAX_IMAGE_BYTES,
)

_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))
_TABLES = (".csv", ".tsv", ".jsonl")
_TABLE_NAMES = frozenset(("labels", "label", "metadata", "annotations", "train", "train_labels"))
_SHARD_LABELS = (".cls", ".json", ".txt")
_ANYWAY = "If they are classes all the same, say so by --as-classes."
_MAX_LIST_BYTES = 1 << 26  # of a list of classes

ClassesFrom = Literal["folders", "folders anyway", "nothing", "cls files"] | Path
"""What tells the class of an image: its folder; its folder, whatever that looks like; nothing, for
all are of one class; webdataset's .cls files; or the table at this path.
"""


class SourceImage(Protocol):
    """One image that is to be written, before its bytes are read.

    It is pickled for the process that writes it.
    """

    @property
    def name(self) -> str:
        """What to call it in messages, different from all others."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the encoded image."""
        ...

    @property
    def label(self) -> int:
        """Class index."""
        ...

    @property
    def version(self) -> str:
        """What becomes another text when the image is replaced."""
        ...

    def read(self) -> bytes:
        """Read the encoded image.

        Raises:
            OSError: The source cannot be read.
            BadImageError: It holds no image there.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ListedImage:
    """Where one image is.

    Attributes:
        path: File that holds it.
        offset: First byte.
        size: Number of bytes.
        label: Class index.
        name: What to call it in messages: its path in the source.
        modified_ns: When the file that holds it was changed last.
    """

    path: str
    offset: int
    size: int
    label: int
    name: str
    modified_ns: int

    @property
    def version(self) -> str:
        """When the file that holds it was changed last."""
        return str(self.modified_ns)

    def read(self) -> bytes:
        """Read the encoded image.

        Raises:
            OSError: The file cannot be read.
            UnreadableSourceError: It was changed since it was listed.
        """
        with Path(self.path).open("rb") as file:
            if os.fstat(file.fileno()).st_mtime_ns != self.modified_ns:
                raise UnreadableSourceError(
                    f"{visible(self.path)} was changed while it was taken in, so images of two "
                    "states would be mixed. Run the same command again when it is complete."
                )
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of one split.

    Attributes:
        images: All images, in an order of the source that is always the same.
        classes: Name of each class; a label is a place in this list.
        passed_over: What lies in the source and is not taken.
        inside: The folder around all class folders, if there is one.
    """

    images: Sequence[SourceImage]
    classes: tuple[str, ...]
    passed_over: PassedOver = ()
    inside: str = ""

    @property
    def summary(self) -> str:
        """How much there is, in words."""
        word = "class" if len(self.classes) == 1 else "classes"
        inside = f", which are the folders in {self.inside}" if self.inside else ""
        return f"{len(self.images):,} images of {len(self.classes):,} {word}{inside}"


def list_images(
    source: Path,
    *,
    classes: tuple[str, ...] | None = None,
    classes_from: ClassesFrom = "folders",
    follow_links: bool = False,
) -> Listing:
    """Find the images under a folder, or in a tar archive.

    Args:
        source: A folder with one folder or tar archive for each class, or a tar archive of such; or
            a folder with nothing but images, which are then of one class.
        classes: Names of the classes in the order of their labels; None numbers those found, in
            alphabetical order, or by their value if all are whole numbers.
        classes_from: What tells the class of an image.
        follow_links: Take symbolic links for what they name.

    Raises:
        UnreadableSourceError: The source is missing, damaged, has another layout, or has a class
            that ``classes`` does not list.
        EmptyDatasetError: There are no images.
    """
    try:
        entries = list(walk(source, wanted=IMAGES, follow_links=follow_links))
        images = [entry for entry in entries if not entry.passed_over]
        others = [entry for entry in entries if entry.passed_over]
        if not images:
            raise EmptyDatasetError(_no_images(source, others))
        around = common_folder(images) if isinstance(classes_from, str) else ()
        images, others = (
            [strip_folder(around, entry) for entry in part] for part in (images, others)
        )
        names, kinds = _classes_of(images, others, source=source, classes_from=classes_from)
    except OSError as error:
        raise UnreadableSourceError(
            f"{source} cannot be read ({error}). Give a folder with one sub-folder of images for "
            "each class, or a tar archive of one."
        ) from error
    listing = number_classes(
        {image: name for image, name in zip(images, names, strict=True) if name is not None},
        classes=classes,
        source=source,
        by_value=classes_from == "cls files" or isinstance(classes_from, Path),
    )
    by_folder = classes_from in ("folders", "folders anyway")
    return replace(
        listing,
        passed_over=count([*(other.passed_over for other in others), *kinds]),
        inside=visible("/".join(around)) if by_folder else "",
    )


def _classes_of(
    images: Sequence[Entry], others: Sequence[Entry], *, source: Path, classes_from: ClassesFrom
) -> tuple[Sequence[str | None], list[str]]:
    """Name the class of each image, None for one without; and say what is passed over besides."""
    if classes_from == "nothing":
        return [source.stem] * len(images), []
    if classes_from in ("folders", "folders anyway"):
        found = class_names(images, source=source)
        if classes_from == "folders":
            refuse_other_layouts(found, images, others, source=source)
        # A class all of whose images have another format would vanish.
        bare = {other.parts[0] for other in others if len(other.parts) > 1}.difference(found)
        return found, ["imageless folder"] * len(bare)
    strangers = 0
    if isinstance(classes_from, Path):
        names, strangers = labels_of(images, classes_from)
    else:
        names = labels_beside(images, others)
    if not any(names):
        raise UnreadableSourceError(
            f"None of the {len(images):,} images in {source} has a label, such as "
            f"{visible('/'.join(images[0].parts))!r}. Tables name images by their path in the "
            "source, or by their file name where no two have the same; shards of webdataset have "
            "a .cls file beside each image."
        )
    kinds = ["unlabelled image"] * names.count(None) + ["unmatched label"] * strangers
    return names, kinds


def _no_images(source: Path, others: Sequence[Entry]) -> str:
    passed = in_words(count(other.passed_over for other in others))
    return (
        f"{source} holds no images{f', only {passed}' if passed else ''}: there must be files that "
        f"end in {', '.join(IMAGES.suffixes)}, in one sub-folder (or .tar archive) for each class, "
        "or in the folder itself."
    )


def number_classes(
    class_of: Mapping[Entry, str],
    *,
    classes: tuple[str, ...] | None,
    source: Path,
    by_value: bool = False,
) -> Listing:
    """Number the classes of what was found.

    Args:
        class_of: Name of the class of each entry.
        classes: Names of the classes in the order of their labels; None for those found.
        source: What holds the entries.
        by_value: Put whole numbers in the order of their values, and take them for places in
            `classes` if that has other names.

    Raises:
        UnreadableSourceError: A class is not in the list, or two things have the same name.
    """
    found = (sort_labels if by_value else sorted)(set(class_of.values()))
    names = tuple(visible(name) for name in classes or found)
    labels = {name: label for label, name in enumerate(classes or found)}
    if classes and by_value and not labels.keys() & set(found):
        labels = {str(label): label for label in range(len(classes))}
    unknown = sorted(set(found) - labels.keys())
    if unknown:
        raise UnreadableSourceError(
            f"{source} holds the class {visible(unknown[0])!r}, which is not among the "
            f"{len(names)} classes given. Add it to the class list, or remove its images."
        )
    images = sorted(
        (
            ListedImage(
                path=str(entry.path),
                offset=entry.offset,
                size=entry.size,
                label=labels[name],
                name=visible("/".join(entry.parts)),
                modified_ns=entry.modified_ns,
            )
            for entry, name in class_of.items()
        ),
        key=lambda image: (image.label, image.name),
    )
    for repeated, what in ((Counter(names), "classes"), (Counter(i.name for i in images), "files")):
        if repeated and (most := repeated.most_common(1)[0])[1] > 1:
            raise UnreadableSourceError(
                f"{source} holds {most[1]} {what} called {most[0]!r}, for example in a folder and "
                "in an archive of the same name. Rename or remove all but one."
            )
    return Listing(images=tuple(images), classes=names)


def hold_out(listing: Listing, *, fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Split a listing in two, with the same fraction of each class in the second.

    It is rounded to whole images in each class, so either may be empty.
    """
    labels = np.array([image.label for image in listing.images], dtype=np.int64)
    chosen = choose_fraction(labels, fraction=fraction, seed=seed)
    by_label = np.argsort(labels, kind="stable")
    kept, held = (
        tuple(listing.images[place] for place in by_label if chosen[place] == wanted)
        for wanted in (False, True)
    )
    return replace(listing, images=kept), replace(listing, images=held)


def choose_fraction(labels: NDArray[np.int64], *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Mark the same fraction of each class, chosen at random."""
    chosen = np.zeros(len(labels), dtype=bool)
    by_label = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[by_label], return_index=True)
    # Without any label there is one part all the same, an empty one.
    for label, members in zip(found.tolist(), np.split(by_label, starts[1:]), strict=False):
        shuffled = members[permutation(len(members), seed, label)]
        chosen[shuffled[: round(fraction * len(members))]] = True
    return chosen


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes in the order of their labels, one a line.

    Raises:
        UnreadableSourceError: The file cannot be read as text, names no class or one of them twice,
            or has an empty line among them.
    """
    try:
        text = read_bounded(path, max_bytes=_MAX_LIST_BYTES).decode("utf-8-sig")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    except (OSError, DocumentError, UnicodeDecodeError) as error:
        raise UnreadableSourceError(
            f"The class list {path} cannot be read ({error}). Give a text file with the name of "
            "one class a line, in the order of the labels."
        ) from error
    names = tuple(line.removesuffix("\r") for line in lines)
    if names == ("",):
        raise UnreadableSourceError(
            f"The class list {path} names no class. Write one a line, or leave it away to number "
            "the classes by name."
        )
    if "" in names:
        raise UnreadableSourceError(
            f"The class list {path} has nothing in line {names.index('') + 1}, and the lines are "
            "the labels. Name the class, or remove the line."
        )
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise UnreadableSourceError(
            f"The class list {path} names {visible(name)!r} {times} times, so its label is "
            "unclear. Name each class once."
        )
    return names


def common_folder(images: Sequence[Entry]) -> tuple[str, ...]:
    """Find the folder around all class folders, as in an archive that was made of one folder.

    It holds several folders, and no image of its own; a folder that does is a class.
    """
    folders = {image.parts[:-1] for image in images}
    first, last = min(folders), max(folders)  # what these have in common, all between them have
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))  # noqa: B905
    return () if first[:shared] in folders else first[:shared]


def strip_folder(folder: tuple[str, ...], entry: Entry) -> Entry:
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
