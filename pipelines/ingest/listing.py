"""What an image folder holds: every image as a range of bytes of some file, with its class.

Images lie in one folder for each class, as in ImageNet's own layout, or in one uncompressed tar
archive for each class, or in one archive of either of these. An image in an archive is a range of
the archive's bytes, so nothing has to be unpacked. A folder of images without classes is one class.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipelines.errors import DataError, EmptyDatasetError
from pipelines.order import permutation

SUFFIXES = (".jpeg", ".jpg", ".png")


class UnreadableSourceError(DataError):
    """The images to be ingested are missing, or lie in a way that is not understood."""


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
        name: What to call it in messages: class folder and file name.
    """

    path: str
    offset: int
    size: int
    label: int
    name: str

    def read(self) -> bytes:
        """Read the encoded image."""
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of one split.

    Attributes:
        images: All images, in an order of the source that is always the same.
        classes: Name of each class; a label is a place in this list.
    """

    images: Sequence[SourceImage]
    classes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """How much there is, in words."""
        word = "class" if len(self.classes) == 1 else "classes"
        return f"{len(self.images):,} images of {len(self.classes):,} {word}"


@dataclass(frozen=True, kw_only=True)
class _Range:
    """One image before the classes are numbered."""

    path: Path
    offset: int
    size: int
    class_name: str
    name: str


def list_images(
    source: Path, *, classes: tuple[str, ...] | None = None, one_class: bool = False
) -> Listing:
    """Find the images under a folder, or in a tar archive.

    Args:
        source: A folder with one folder or tar archive for each class, or a tar archive of such; or
            a folder with nothing but images, which are then of one class.
        classes: Names of the classes in the order of their labels; None numbers those found, in
            alphabetical order.
        one_class: Take all images for one class, whatever folders they lie in.

    Raises:
        UnreadableSourceError: The source is missing, has another layout, or has a class that
            ``classes`` does not list.
        EmptyDatasetError: There are no images.
    """
    try:
        found = sorted(
            _in_place(source, one_class=one_class), key=lambda image: (image.class_name, image.name)
        )
    except OSError as error:
        raise UnreadableSourceError(
            f"{source} cannot be read ({error}). Give a folder with one sub-folder of images for "
            "each class, or a tar archive of one."
        ) from error
    except tarfile.TarError as error:
        raise UnreadableSourceError(
            f"{source} holds an archive that cannot be read ({error}). Only uncompressed .tar "
            "archives are read in place; unpack it, and give the folder."
        ) from error
    if not found:
        raise EmptyDatasetError(
            f"{source} holds no images: there must be files that end in {', '.join(SUFFIXES)}, in "
            "one sub-folder (or .tar archive) for each class, or in the folder itself."
        )
    if one_class:
        found = [replace(image, class_name=source.stem) for image in found]
    names = classes or tuple(sorted({image.class_name for image in found}))
    labels = {name: label for label, name in enumerate(names)}
    unknown = sorted({image.class_name for image in found} - labels.keys())
    if unknown:
        raise UnreadableSourceError(
            f"{source} holds the class {unknown[0]!r}, which is not among the {len(names)} classes "
            "given. Add it to the class list, or remove its folder."
        )
    return Listing(
        images=tuple(
            ListedImage(
                path=str(image.path),
                offset=image.offset,
                size=image.size,
                label=labels[image.class_name],
                name=image.name,
            )
            for image in found
        ),
        classes=names,
    )


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
    return (
        Listing(images=tuple(kept), classes=listing.classes),
        Listing(images=tuple(held), classes=listing.classes),
    )


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes in the order of their labels, one a line.

    Raises:
        UnreadableSourceError: The file cannot be read as text, or names no class.
    """
    try:
        names = tuple(filter(None, path.read_text(encoding="utf-8").split("\n")))
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableSourceError(
            f"The class list {path} cannot be read ({error}). Give a text file with the name of "
            "one class a line, in the order of the labels."
        ) from error
    if not names:
        raise UnreadableSourceError(
            f"The class list {path} names no class. Write one a line, or leave it away to number "
            "the classes by name."
        )
    return names


def _in_place(source: Path, *, one_class: bool) -> Iterator[_Range]:
    if source.is_file():
        yield from _in_archive(source, start=0, class_name=None)
        return
    entries = sorted(source.iterdir())
    loose = [entry for entry in entries if _is_image(entry)]
    for entry in entries:
        if entry.suffix == ".tar":
            yield from _in_archive(entry, start=0, class_name=entry.stem)
        elif entry.is_dir():
            for path in entry.rglob("*"):
                if _is_image(path):
                    name = f"{entry.name}/{path.relative_to(entry).as_posix()}"
                    yield _file(path, class_name=entry.name, name=name)
        else:
            continue
        if loose and not one_class:
            raise UnreadableSourceError(
                f"{source} holds the image {loose[0].name!r} beside the class {entry.name!r}, so "
                "its class is unclear. Put it into a class folder, or take all images for one "
                "class by --one-class."
            )
    for path in loose:
        yield _file(path, class_name=source.resolve().name, name=path.name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _file(path: Path, *, class_name: str, name: str) -> _Range:
    return _Range(path=path, offset=0, size=path.stat().st_size, class_name=class_name, name=name)


def _in_archive(path: Path, *, start: int, class_name: str | None) -> Iterator[_Range]:
    """Find the images in an archive that begins somewhere in a file.

    Args:
        path: The file.
        start: Where the archive begins: not at 0 for an archive inside another one.
        class_name: Class of the images; None takes it from each member's folder.
    """
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isreg():
                    continue
                # Offsets count from the start of the file, also in an archive inside another one.
                if name.suffix == ".tar":
                    yield from _in_archive(path, start=member.offset_data, class_name=name.stem)
                elif name.suffix.lower() in SUFFIXES:
                    owner = class_name or name.parent.name
                    if not owner:
                        raise UnreadableSourceError(
                            f"{path} holds the image {member.name!r} outside of any class folder."
                        )
                    yield _Range(
                        path=path,
                        offset=member.offset_data,
                        size=member.size,
                        class_name=owner,
                        name=f"{owner}/{name.name}",
                    )
