"""What is kept of samples: pictures in one NPZ file, of which memory holds a piece at a time."""

from __future__ import annotations

import io
import logging
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluation.grid import pixels_of
from trainer.evaluation.samples import SampleBlock
from trainer.storage.errors import StoreError

logger = logging.getLogger(__name__)

MAX_PICTURES_BYTES = 2**30
_PIECE_BYTES = 2**22


class TakenSamples:
    """Keeps samples as pictures, as far as there is room: in a file, which goes with the process.

    Args:
        picture_bytes: Size of a picture.
        whole: Keep them as they are too, all of them, in memory.
        shown: Indices of those that a grid shows, kept as they are.
        max_bytes: Size of all pictures beyond which further ones are not kept.

    Attributes:
        whole: The images [b, c, h, w] and labels [b] of each block, if they were to be kept.
    """

    def __init__(
        self,
        *,
        picture_bytes: int,
        whole: bool = False,
        shown: Sequence[int] = (),
        max_bytes: int = MAX_PICTURES_BYTES,
    ) -> None:
        self.whole: list[tuple[Tensor, Tensor]] = []
        self._keep_whole = whole
        self._shown: dict[int, Tensor | None] = dict.fromkeys(shown)
        self._picture_bytes = picture_bytes
        self._room = max_bytes // picture_bytes
        self._file: IO[bytes] | None = None
        self._is_full = False
        self._shape: tuple[int, ...] = (0, 0, 0)
        self._labels: list[NDArray[np.int64]] = []

    def wants(self, indices: range) -> bool:
        """Tell whether any image of a block is kept, alike on all ranks."""
        return (
            self._keep_whole
            or indices.start < self._room
            or any(index in self._shown for index in indices)
        )

    def add(self, block: SampleBlock) -> None:
        """Take a block; they come in order."""
        if self._keep_whole:
            self.whole.append((block.images, block.labels))
        for index, image in enumerate(block.images, block.first):
            if index in self._shown:
                self._shown[index] = image
        room = max(0, self._room - block.first)
        pixels = pixels_of(block.images[:room])
        self._shape = pixels.shape[1:]
        if len(pixels) and not self._is_full:
            self._write(pixels, block.labels[:room].numpy())

    def _write(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="lapflow-", buffering=0)  # noqa: SIM115
            if self._file.write(pixels.data) < pixels.nbytes:
                raise OSError("its disk is full")
        except OSError as error:
            self._is_full = True
            logger.warning(
                "samples.npz has the first %d samples alone, as %s takes no more: %s. TMPDIR names "
                "another folder",
                sum(map(len, self._labels)),
                tempfile.gettempdir(),
                error.strerror or error,
            )
            return
        self._labels.append(labels.copy())

    def grid(self) -> Tensor:
        """Return the images that a grid shows, [n, c, h, w], once its blocks are taken."""
        return torch.stack([image for image in self._shown.values() if image is not None])

    def npz(self) -> Iterator[bytes]:
        """Pack the pictures as FID tools expect them, see `npz_pieces`, compressed."""
        labels = np.concatenate([*self._labels, np.zeros(0, np.int64)])
        shape = len(labels), *self._shape
        return npz_pieces(self._pieces(len(labels)), labels, shape=shape, compressed=True)

    def _pieces(self, count: int) -> Iterator[bytes]:
        left = count * self._picture_bytes
        if self._file is None:
            return
        try:
            self._file.seek(0)
            while left:
                if not (piece := self._file.read(min(left, _PIECE_BYTES))):
                    raise OSError(f"{left:,} bytes of them are gone")
                left -= len(piece)
                yield piece
        except OSError as error:
            folder = tempfile.gettempdir()
            raise StoreError(f"The samples kept in {folder} cannot be read: {error}") from error


def npz_pieces(
    pixels: Iterable[bytes],
    labels: NDArray[np.int64],
    *,
    shape: tuple[int, ...],
    compressed: bool = False,
) -> Iterator[bytes]:
    """Write pictures as ADM's evaluator reads them: uint8 [n, h, w, c] in arr_0, labels in arr_1.

    The bytes are the same whenever they are written.

    Args:
        pixels: Those of all pictures, in pieces of any length.
        labels: Their classes, shape [n].
        shape: That of the pictures, [n, h, w, c].
        compressed: Take the time to make the file smaller.
    """
    pipe = _Pipe()
    how = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    member = partial(zipfile.ZipInfo, date_time=(1980, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(pipe, "w", compression=how) as archive:
        for name, header, pieces in (
            ("arr_0.npy", {"descr": "|u1", "fortran_order": False, "shape": shape}, pixels),
            ("arr_1.npy", None, [_npy(labels)]),
        ):
            entry = member(name)
            entry.compress_type = how
            with archive.open(entry, "w", force_zip64=header is not None) as file:
                if header is not None:
                    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
                for piece in pieces:
                    file.write(piece)
                    yield pipe.take()
    yield pipe.take()


def _npy(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


class _Pipe:
    """Takes what a ZIP file is written to, in order, until it is taken out."""

    def __init__(self) -> None:
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        self._held += data
        return len(data)

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def take(self) -> bytes:
        taken = bytes(self._held)
        self._held.clear()
        return taken
