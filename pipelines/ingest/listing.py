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
from pathlib import Path
from typing import Literal, Protocol

from pipelines.console import visible
from pipelines.errors import EmptyDatasetError, UnreadableSourceError
from pipelines.ingest.class_folders import (
    class_names,
    common_folder,
    refuse_other_layouts,
    without,
)
from pipelines.ingest.entry import Entry, PassedOver, Wanted, count, in_words
from pipelines.ingest.folder import walk
from pipelines.ingest.label_table import in_order, labels_beside, labels_of
from pipelines.order import permutation

MAX_IMAGE_BYTES = 1 << 28  # as many as the largest image that is decoded takes without compression
IMAGES = Wanted(
    # Formats that training decodes, by the names that they have.
    suffixes=(".jpeg", ".jpg", ".jpe", ".jfif", ".png"),
    max_bytes=MAX_IMAGE_BYTES,
)

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
        images, others = ([without(around, entry) for entry in part] for part in (images, others))
        names, kinds = _classes_of(images, others, source=source, classes_from=classes_from)
    except OSError as error:
        raise UnreadableSourceError(
            f"{source} cannot be read ({error}). Give a folder with one sub-folder of images for "
            "each class, or a tar archive of one."
        ) from error
    listing = numbered(
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


def numbered(
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
    found = (in_order if by_value else sorted)(set(class_of.values()))
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


def hold_out(listing: Listing, *, share: float, seed: int) -> tuple[Listing, Listing]:
    """Split a listing in two, with the same share of each class in the second.

    The share is rounded to whole images in each class, so either may be empty.
    """
    kept: list[SourceImage] = []
    held: list[SourceImage] = []
    by_label: dict[int, list[SourceImage]] = {}
    for image in listing.images:
        by_label.setdefault(image.label, []).append(image)
    for label, members in sorted(by_label.items()):
        order = permutation(len(members), seed, label)
        chosen = set(order[: round(share * len(members))].tolist())
        for place, image in enumerate(members):
            (held if place in chosen else kept).append(image)
    return replace(listing, images=tuple(kept)), replace(listing, images=tuple(held))
