"""Datasets of latents that are taken in from arrays of another program.

The arrays lie in one folder for each class, or all in one folder, which is one class. Where there
is a dataset.json beside them, as EDM2's tools write it, classes are taken from there: the folders
that those tools make only keep the files apart. Nobody vouches for the files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.documents import read_json
from pipelines.errors import BadLatentError, DataError, EmptyDatasetError, UnreadableSourceError
from pipelines.index import LABEL_COLUMN
from pipelines.ingest.latent_config import Encoder, LatentsConfig
from pipelines.ingest.latent_origin import RECIPE, LatentPart, Origin
from pipelines.ingest.listing import Listing, SourceImage, class_names, number_classes
from pipelines.ingest.plan import Plan, check_seed, cut, plan_digest
from pipelines.ingest.source_files import Entry, Wanted, count, in_words, walk
from pipelines.ingest.write import Filled, Part, WriteSample
from pipelines.latent_format import MOMENTS_COLUMN, LatentFormat
from pipelines.npy import BadArrayError, parse_npy
from pipelines.order import permutation

_BATCH = 32  # latents whose statistics are summed at a time
MAX_BYTES = 1 << 28
"""Larger files are not read: moments of two views of 32 x 256 x 256 numbers in float64 fit."""
_ARRAYS = Wanted(suffixes=(".npy",), max_bytes=MAX_BYTES, archives=False)
_LABELS = "dataset.json"
_MAX_LABEL_BYTES = 1 << 30
_MAX_CLASSES = 1 << 20

Holds = Literal["mean-std", "latents"]


class MisfitArrayError(DataError):
    """An array has another shape than it should have."""

    @classmethod
    def of_two(
        cls, name: str, shape: tuple[int, ...], example: str, wanted: tuple[int, ...]
    ) -> "MisfitArrayError":
        """Say that an array differs from another one of its data set."""
        return cls(
            f"{name} has the shape {list(shape)}, and {example} has {list(wanted)}; the arrays of "
            "one data set have one shape. Remove those of the other, or give each shape a data set "
            "of its own."
        )


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """What the arrays of a data set hold.

    Attributes:
        holds: Means, then standard deviations; or latents alone, whose deviation is 0.
        views: 2 where the mirrored image follows the image along the first axis, else 1.
        channels: Channels of a latent.
        scale: What latents were multiplied by, after the shift; 1 where they were not.
        shift: What was subtracted from them before; 0 where nothing was.
    """

    holds: Holds
    views: Literal[1, 2]
    channels: int
    scale: float = 1.0
    shift: float = 0.0

    def check(self, shape: tuple[int, ...], *, name: str) -> None:
        """Refuse a shape that does not fit.

        Args:
            shape: Shape of an array.
            name: What to call the array.

        Raises:
            MisfitArrayError: It is none of those that the layout allows.
        """
        accepted = [(*leading, *shape[-2:]) for leading in self._leading]
        if shape in accepted and shape[-1] == shape[-2]:
            return
        wanted = " or ".join(
            f"[{', '.join(map(str, leading))}, size, size]" for leading in self._leading
        )
        raise MisfitArrayError(
            f"{name} has the shape {list(shape)}; --arrays {self.holds} with --views {self.views} "
            f"and an autoencoder of {self.channels} channels needs {wanted}. Choose --arrays and "
            "--views as the files were written, or the --autoencoder that made them."
        )

    def moments(self, array: NDArray[Any]) -> NDArray[Any]:
        """Arrange an array that fits as [views, mean and deviation, channels, size, size].

        Values are the autoencoder's own, before shift and scale.

        Raises:
            BadArrayError: It holds numbers that no encoder gives.
        """
        size = array.shape[-1]
        if not np.isfinite(array).all():
            raise BadArrayError("it holds numbers that are not finite")
        kinds = 2 if self.holds == "mean-std" else 1
        found = array.reshape(self.views, kinds, self.channels, size, size).astype(np.float64)
        result = np.zeros((self.views, 2, self.channels, size, size))
        result[:, 0] = found[:, 0] / self.scale + self.shift
        if kinds == 2:
            if (found[:, 1] < 0).any():
                raise BadArrayError("it holds standard deviations below 0")
            result[:, 1] = found[:, 1] / abs(self.scale)
        return result

    @property
    def _leading(self) -> tuple[tuple[int, ...], ...]:
        """Accepted shapes, without height and width."""
        views = (2,) if self.views == 2 else ()
        if self.holds == "latents":
            return ((*views, self.channels),)
        return ((*views, 2 * self.channels), (*views, 2, self.channels))


def read_array(file: SourceImage) -> NDArray[Any]:
    """Read one array.

    Raises:
        BadArrayError: It is gone, damaged, or no array.
        UnreadableSourceError: It is there and cannot be read.
    """
    if file.size > MAX_BYTES:
        raise BadArrayError(f"it is {file.size} bytes long, more than {MAX_BYTES}")
    try:
        data = file.read()
    except FileNotFoundError:
        raise BadArrayError("it is gone") from None
    except OSError as error:  # of the disk, not of the array: the next start may read it
        raise UnreadableSourceError(
            f"{file.name} cannot be read ({error}). Let this user read it, or remove it, and run "
            "the same command again; finished shards are kept."
        ) from error
    return parse_npy(data)


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
        names, classes = _look_up_classes(arrays, source, classes)
    else:
        names = class_names(
            arrays, source=source, what="array", instead="give a folder of nothing but arrays"
        )
    listing = number_classes(dict(zip(arrays, names, strict=True)), classes=classes, source=source)
    return replace(listing, passed_over=passed_over)


def _look_up_classes(
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
        raise _labels_error(file, f"{type(error).__name__}: {error}") from None
    labels: dict[str, int] = {}
    for name, label in pairs:
        if not isinstance(name, str) or type(label) is not int or not 0 <= label < _MAX_CLASSES:
            raise _labels_error(file, f"{str(name)[:80]!r} has the label {str(label)[:40]!r}")
        if labels.setdefault(name, label) != label:
            raise _labels_error(file, f"{name[:80]!r} has the labels {labels[name]} and {label}")
    return labels


def _labels_error(file: Path, reason: str) -> UnreadableSourceError:
    return UnreadableSourceError(
        f'{file} does not hold {{"labels": [[name, label], ...]}} with labels from 0 ({reason}). '
        "Restore the file, or remove it to take each folder for a class."
    )


@dataclass(frozen=True, kw_only=True)
class ArraysConfig(LatentsConfig):
    """How arrays are taken in.

    Attributes:
        layout: What they hold.
        seed: Seed of the order of storage, which mixes the classes.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    layout: ArrayLayout
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


def plan_arrays(
    listing: Listing, prefix: str, *, folder: Path, encoder: Encoder, config: ArraysConfig
) -> Plan:
    """Plan to take in arrays, and refuse a place that cannot take the latents.

    Args:
        listing: The arrays of one split.
        prefix: Prefix of the latents.
        folder: Where the arrays are.
        encoder: The autoencoder.
        config: How to take them in.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        MisfitArrayError: The arrays have other shapes than they should, or several.
        EmptyDatasetError: None of them can be used.
        DataError: The source cannot be read, or the prefix not be looked into.
    """
    order = permutation(len(listing.images), config.seed)
    arrays = tuple(listing.images[place] for place in order)
    example, shape = _common_shape(listing, folder, config.layout)
    form = LatentFormat(
        dtype=config.dtype,
        views=config.layout.views,
        channels=config.layout.channels,
        size=shape[-1],
    )
    parts = cut(arrays, shard_bytes=config.shard_bytes, size=lambda _: form.sample_bytes)
    decisive = {
        "recipe": RECIPE,
        "layout": asdict(config.layout),
        "autoencoder": encoder.sha256,
        "shape": shape,
        "format": form.encoding,
        "classes": listing.classes,
    }
    told = in_words(listing.passed_over)
    passed_over = (f"passed over: {told}",) if told else ()
    origin = Origin(
        source=str(folder),
        source_sha256=None,
        count=len(arrays),
        encoder=encoder,
        precision=None,
        format=form,
    )
    return Plan(
        prefix=prefix,
        parts=parts,
        open_filler=partial(
            ArrayFiller, layout=config.layout, example=(example, shape), form=form, encoder=encoder
        ),
        config=config,
        digest=plan_digest(decisive, parts),
        classes=listing.classes,
        passed_over=listing.passed_over,
        opening=(f"{len(listing.images):,} arrays to take in", *passed_over),
        fault="arrays cannot be used",
        documents=origin.documents,
    )


def _common_shape(
    listing: Listing, folder: Path, layout: ArrayLayout
) -> tuple[str, tuple[int, ...]]:
    """Find an array, and its shape, which is that of the others.

    One array of each size in bytes is looked at, so that a mixture of shapes is found before hours
    are spent on it; the others are checked as they are read.
    """
    common: tuple[str, tuple[int, ...]] | None = None
    seen: set[int] = set()
    for file in listing.images:
        if file.size in seen:
            continue
        try:
            shape = read_array(file).shape
        except BadArrayError:
            continue  # counted and named when its turn comes
        seen.add(file.size)
        layout.check(shape, name=file.name)
        common = common or (file.name, shape)
        if shape != common[1]:
            raise MisfitArrayError.of_two(file.name, shape, *common)
    if common is None:
        raise EmptyDatasetError(
            f"None of the {len(listing.images)} arrays in {folder} can be used; "
            "check that they were written by numpy.save as floating-point numbers."
        )
    return common


class ArrayFiller:
    """Fills shards with the moments that arrays hold.

    Args:
        _process: Number of the process that it works for; all are alike.
        layout: What the arrays hold.
        example: Name of an array, and its shape, which all have.
        form: How latents are stored.
        encoder: What made them.
    """

    def __init__(
        self,
        _process: int,
        *,
        layout: ArrayLayout,
        example: tuple[str, tuple[int, ...]],
        form: LatentFormat,
        encoder: Encoder,
    ) -> None:
        # Sums over several threads end in other bits than those of one.
        torch.set_num_threads(1)
        self._layout, self._example, self._form, self._encoder = layout, example, form, encoder
        self.columns: Mapping[str, str] = {MOMENTS_COLUMN: form.encoding, LABEL_COLUMN: "int"}

    def fill(self, part: Part[SourceImage], write: WriteSample) -> Filled:
        """Write the moments of one part, but for arrays that cannot be used."""
        latents = LatentPart(write, form=self._form, encoder=self._encoder)
        for first in range(0, len(part.samples), _BATCH):
            views: list[tuple[int, int, NDArray[Any]]] = []
            for place, file in enumerate(part.samples[first : first + _BATCH], part.first + first):
                try:
                    stored = self._make_stored(file)
                except BadArrayError as error:
                    latents.skip(place, file.name, str(error))
                    continue
                latents.add(stored, file.label)
                views += [(place, view, moments) for view, moments in enumerate(stored)]
            if views:
                latents.sum(views)
        return latents.finish()

    def _make_stored(self, file: SourceImage) -> NDArray[Any]:
        """Make one array into what is stored of it."""
        array = read_array(file)
        example, shape = self._example
        if array.shape != shape:
            raise MisfitArrayError.of_two(file.name, array.shape, example, shape)
        with np.errstate(over="ignore"):  # looked for below
            stored = self._layout.moments(array).astype(self._form.dtype)
        if not np.isfinite(stored).all():
            raise BadLatentError(
                f"The array {file.name} is finite, but not in {self._form.dtype}. Use --dtype "
                "float32, or remove the file if its numbers are wrong."
            )
        return stored
