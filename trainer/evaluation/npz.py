"""Reference statistics as papers exchange them: the .npz files of ADM's evaluation.

Their members are `mu` and `sigma` of Inception's pool features, `mu_s` and `sigma_s` of its spatial
ones, and `arr_0` with pictures. Nobody vouches for such a file: nothing in it is unpickled, and no
memory is taken for what a header only promises.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.npy import BadArrayError, parse_npy
from trainer.evaluation.frechet import FeatureStatistics
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

_CHUNK_BYTES = 2**26
_MAX_STATISTICS_BYTES = 2**28  # of 5,792 features in float64
_MAX_PICTURES_BYTES = 2**36
_AT_ONCE = 256
_ROUNDING = 1e-6
"""Of the largest covariance, as float32 holds it."""


class BadReference(ValueError):
    """A file of reference statistics is missing or damaged, or lacks what is asked for."""


@dataclass(frozen=True, kw_only=True)
class StoredReference:
    """A file of reference statistics, which is open.

    Attributes:
        place: What the user calls it.
        digest: SHA-256 of the file.
        archive: Its members.
    """

    place: str
    digest: str
    archive: zipfile.ZipFile

    def statistics(self, *, features: int, spatial: bool = False) -> FeatureStatistics | None:
        """Return mean and covariance of Inception's features, or None where the file has none.

        Args:
            features: How many there must be.
            spatial: Of the spatial ones.

        Raises:
            BadReference: They are damaged, not finite, of other features, or no statistics.
        """
        names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
        if not {f"{name}.npy" for name in names} <= {*self.archive.namelist()}:
            return None
        mean, covariance = (self._numbers(name) for name in names)
        if (mean.shape, covariance.shape) != ((features,), (features, features)):
            raise self._bad(
                f"{names[0]} and {names[1]} have the shapes {list(mean.shape)} and "
                f"{list(covariance.shape)}, and there are {features} features"
            )
        covariance = covariance.astype(np.float64)
        largest = np.abs(covariance).max()
        if np.abs(covariance - covariance.T).max() > _ROUNDING * largest:
            raise self._bad(f"{names[1]} is no covariance, as it is not symmetric")
        if covariance.diagonal().min() < 0:
            raise self._bad(f"{names[1]} is no covariance, as a variance in it is negative")
        return FeatureStatistics(mean=mean.astype(np.float64), covariance=covariance)

    def count(self) -> int:
        """Return how many pictures there are; 0 for statistics alone.

        Raises:
            BadReference: They are damaged.
        """
        if "arr_0.npy" not in self.archive.namelist():
            return 0
        with self._pictures() as (_, shape):
            return shape[0]

    def pictures(self) -> Iterator[Tensor]:
        """Read the pictures in batches [b, c, h, w] in [-1, 1].

        Raises:
            BadReference: There are none, or they are damaged.
        """
        if "arr_0.npy" not in self.archive.namelist():
            raise self._bad("it has no pictures (arr_0), and no statistics of these features")
        with self._pictures() as (file, shape):
            for start in range(0, shape[0], _AT_ONCE):
                count = min(_AT_ONCE, shape[0] - start)
                data = file.read(count * math.prod(shape[1:]))
                if len(data) < count * math.prod(shape[1:]):
                    raise self._bad("arr_0 is cut short")
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                images = pixels.reshape(count, *shape[1:]).permute(0, 3, 1, 2)
                yield (images.float() - 127.5) / 127.5

    @contextmanager
    def _pictures(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        """Open the pictures behind their header, which says their shape [n, h, w, c]."""
        form: Any = np.lib.format
        try:
            with self.archive.open("arr_0.npy") as file:
                if form.read_magic(file) != (1, 0):
                    raise self._bad("arr_0 is of another version of the format .npy")
                shape, in_columns, dtype = form.read_array_header_1_0(file)
                if dtype != np.uint8 or in_columns or len(shape) != 4 or shape[3] not in (1, 3):
                    raise self._bad("arr_0 is not of the shape [n, height, width, 1 or 3] in uint8")
                if not 0 < math.prod(shape) <= _MAX_PICTURES_BYTES:
                    raise self._bad(f"arr_0 has the shape {list(shape)}")
                yield file, shape
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            raise self._bad(str(error)) from error

    def check_channels(self, images: Tensor, channels: int) -> None:
        """Refuse pictures that an extractor of so many channels does not take.

        Raises:
            BadReference: They have another number.
        """
        if images.shape[1] != channels:
            raise self._bad(f"its pictures have {images.shape[1]} channels, the data {channels}")

    def _numbers(self, name: str) -> Any:
        member = f"{name}.npy"
        try:
            if self.archive.getinfo(member).file_size > _MAX_STATISTICS_BYTES:
                raise self._bad(f"{name} is larger than {_MAX_STATISTICS_BYTES} bytes")
            with self.archive.open(member) as file:
                numbers = parse_npy(file.read(_MAX_STATISTICS_BYTES + 1))
        except (BadArrayError, zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise self._bad(f"{name}: {error}") from error
        if not np.isfinite(numbers).all():
            raise self._bad(f"{name} holds values that are not finite")
        return numbers

    def _bad(self, reason: str) -> BadReference:
        return _bad(self.place, reason)


@contextmanager
def open_reference(place: str, config: StoreConfig) -> Iterator[StoredReference]:
    """Open a file of reference statistics.

    Args:
        place: A file of this machine, or `s3://bucket/…/NAME.npz`, which is copied first.
        config: How to reach the store.

    Raises:
        BadReference: There is no such file, or it is no archive.
        StoreError: The store fails.
    """
    with tempfile.TemporaryDirectory(prefix="lapflow-reference-") as folder:
        file = Path(place).expanduser()
        if "://" in place:
            file = Path(folder) / "reference.npz"
            store, key = _in_store(place, config)
            with file.open("wb") as copy:
                for start in range(0, store.list("")[key], _CHUNK_BYTES):
                    copy.write(store.get_range(key, start, _CHUNK_BYTES))
        try:
            if not file.is_file():
                raise _bad(place, "there is no such file")
            with file.open("rb") as whole:
                digest = hashlib.file_digest(whole, "sha256").hexdigest()
            archive = zipfile.ZipFile(file)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            if isinstance(error, BadReference):
                raise
            raise _bad(place, str(error)) from error
        with archive:
            yield StoredReference(place=place, digest=digest, archive=archive)


def check_reference(place: str, config: StoreConfig) -> None:
    """Find out before a run whether a file of reference statistics is there.

    Raises:
        BadReference: It is not, or it is no archive.
        StoreError: The store fails.
    """
    if "://" in place:
        _in_store(place, config)
    else:
        with open_reference(place, config):
            pass


def _in_store(place: str, config: StoreConfig) -> tuple[Store, str]:
    folder, _, key = place.rpartition("/")
    store = open_store(folder, config)
    if key not in store.list(""):
        raise _bad(place, "there is no such object")
    return store, key


def _bad(place: str, reason: str) -> BadReference:
    return BadReference(
        f"reference={place} cannot be used: {reason}. Give train, test, or a file of reference "
        "statistics (.npz) as ADM's evaluation reads them"
    )
