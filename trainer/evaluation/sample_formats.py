"""How samples are kept: as PNG files, as one NPZ file, or as shards."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.index import INDEX_NAME
from pipelines.ingest.write import LabelledImage, index_of, pack_shard
from trainer.evaluation.config import FormatName
from trainer.evaluation.taken import npz_pieces
from trainer.storage.store import Store

PARTS = "parts/"
"""What the keys begin with of what is removed once a set is complete."""


class DrawnPart(NamedTuple):
    """Samples of consecutive indices, drawn by one worker."""

    number: int
    """Place among the parts."""
    first: int
    """Index of the first sample."""
    pixels: NDArray[np.uint8]
    """Shape [n, h, w, c]."""
    labels: NDArray[np.int64]
    """Their classes, shape [n]."""


class PackedPart(NamedTuple):
    """A part as files."""

    files: Mapping[str, bytes]
    """Content of each, by key."""
    entry: dict[str, Any]
    """What the index of all parts says of it; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class KeptPart:
    """Record of a part, written once all its files are there.

    Attributes:
        plan: Digest of the plan that it is of.
        number: Place among the parts.
        samples: How many they are.
        nfe: Network evaluations in each segment, summed over them.
        files: Length of each file, by key.
        entry: See `PackedPart`.
    """

    plan: str
    number: int
    samples: int
    nfe: tuple[float, ...]
    files: dict[str, int]
    entry: dict[str, Any] = field(default_factory=dict)


class SampleFormat(Protocol):
    """How samples are kept."""

    def pack(self, part: DrawnPart) -> PackedPart:
        """Make the files of a part; they depend on its samples alone."""
        ...

    def finish(self, store: Store, parts: Sequence[KeptPart], labels: NDArray[np.int64]) -> None:
        """Write what needs all parts, given in their order with the classes of all samples."""
        ...


class PngFormat:
    """One file for each sample, in one folder for each class."""

    def pack(self, part: DrawnPart) -> PackedPart:
        """Encode each sample."""
        files = {
            f"{label:04d}/{index:06d}.png": _png(pixels)
            for index, (pixels, label) in enumerate(
                zip(part.pixels, part.labels, strict=True), part.first
            )
        }
        return PackedPart(files, {})

    def finish(self, store: Store, parts: Sequence[KeptPart], labels: NDArray[np.int64]) -> None:
        """Leave the files as they are."""


class MdsFormat:
    """Shards of PNG files with labels, a dataset as `pipelines` reads it: one for each part."""

    def pack(self, part: DrawnPart) -> PackedPart:
        """Make the part's shard."""
        images = (
            LabelledImage(data=_png(pixels), label=int(label))
            for pixels, label in zip(part.pixels, part.labels, strict=True)
        )
        name = f"shard.{part.number:05d}.mds"
        shard = pack_shard(images, name=name)
        return PackedPart({name: shard.data}, shard.entry)

    def finish(self, store: Store, parts: Sequence[KeptPart], labels: NDArray[np.int64]) -> None:
        """Write the index, which makes a dataset of the shards."""
        store.put(INDEX_NAME, index_of([part.entry for part in parts]))


class NpzFormat:
    """One file as ADM's evaluator reads it: arr_0 uint8 [n, h, w, c], and the classes in arr_1."""

    def pack(self, part: DrawnPart) -> PackedPart:
        """Keep the pixels, until all are there."""
        return PackedPart({_pixels_key(part.number): _npy(part.pixels)}, {})

    def finish(self, store: Store, parts: Sequence[KeptPart], labels: NDArray[np.int64]) -> None:
        """Join the parts, one of which is in memory at a time."""
        store.put_pieces("samples.npz", _npz_pieces(store, parts, labels))


FORMATS: Mapping[FormatName, SampleFormat] = {
    "png": PngFormat(),
    "npz": NpzFormat(),
    "mds": MdsFormat(),
}


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    grey = pixels.shape[-1] == 1
    Image.fromarray(pixels.squeeze(-1) if grey else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _pixels_key(number: int) -> str:
    return f"{PARTS}{number:05d}.npy"


def _npz_pieces(
    store: Store, parts: Sequence[KeptPart], labels: NDArray[np.int64]
) -> Iterator[bytes]:
    """Write the arrays, with one part in memory at a time, to the same bytes for any parts."""
    pixels = (_pixels(store, part) for part in parts)
    first = next(pixels)
    shape = (len(labels), *first.shape[1:])
    return npz_pieces((each.tobytes() for each in chain([first], pixels)), labels, shape=shape)


def _pixels(store: Store, part: KeptPart) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.load(
        io.BytesIO(store.get(_pixels_key(part.number))), allow_pickle=False
    )
    return pixels
