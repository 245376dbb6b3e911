"""Weights of extractors that others have trained: files of tensors, in which nothing can run code.

They lie on this machine or in an object store. Nobody vouches for them: a file is read bounded,
taken for tensors and nothing else, and told by its SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from pipelines.documents import DocumentError, read_bounded
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

_MAX_BYTES = 2**30


class MissingWeights(ValueError):
    """The weights are neither there nor downloadable, or are no weights of this network."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file that everybody can download.

    Attributes:
        url: Where.
        sha256: What it is known by.
    """

    url: str
    sha256: str

    def download(self) -> Path:
        """Fetch it into torch's cache, once, and only if it is the published one."""
        file = Path(torch.hub.get_dir()) / "checkpoints" / self.name
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(file), hash_prefix=self.sha256)
        return file

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """Where an extractor's weights are.

    Attributes:
        network: Name of the extractor.
        place: A file of this machine, `s3://bucket/…/NAME`, or None to download it.
        published: What is downloaded; None where nothing is.
        max_bytes: How long the file may be.
    """

    network: str
    place: str | None
    published: Published | None = None
    max_bytes: int = _MAX_BYTES

    def read(self, store: StoreConfig) -> bytes:
        """Read the file.

        Raises:
            MissingWeights: It is missing or too large, or cannot be downloaded.
        """
        try:
            if self.place is not None and "://" in self.place:
                return self._of_store(self.place, store)
            if self.place is None and self.published is None:
                raise DocumentError("no file is named, and nothing is downloaded")
            file = Path(self.place).expanduser() if self.place else self._downloaded()
            data = read_bounded(file, max_bytes=self.max_bytes)
        except Exception as error:  # a download can end in any way
            raise self.unusable(reason_of(error)) from error
        published = self.published
        if self.place is None and published and sha256(data) != published.sha256:
            raise self.unusable(f"{file} is not the published file; delete it")
        return data

    def tensors(self, data: bytes) -> dict[str, Tensor]:
        """Take a file for named tensors: safetensors, or what `torch.save` writes.

        Raises:
            MissingWeights: It holds anything else.
        """
        try:
            if not data.startswith(b"PK") and data[8:9] == b"{":
                return load(data)
            _check_unpacked(data)
            content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a file from elsewhere can end its reader in any way
            raise self.unusable(reason_of(error)) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
        ):
            raise self.unusable("it holds something else than named tensors")
        return dict(content)

    def unusable(self, reason: str) -> MissingWeights:
        """Say why the weights cannot be used, and what to do."""
        setting = f"eval.features.{self.network}_weights"
        name = self.published.name if self.published else "a file of its tensors"
        return MissingWeights(
            f"{self.network.capitalize()} weights cannot be loaded ({reason}); put {name} on disk "
            f"or into an object store and set {setting} to it (now {self.place}; later "
            f"{self.network}_weights=… of python -m trainer.evaluate), or use "
            "eval.features.name=random_conv"
        )

    def _downloaded(self) -> Path:
        assert self.published is not None
        return self.published.download()

    def _of_store(self, place: str, config: StoreConfig) -> bytes:
        folder, _, key = place.rpartition("/")
        store = open_store(folder, config)
        size = store.list("").get(key)
        if size is None:
            raise DocumentError("there is no such object")
        if size > self.max_bytes:
            raise DocumentError(f"it has {size} bytes, more than {self.max_bytes}")
        return store.get_range(key, 0, size)


def sha256(data: bytes) -> str:
    """Return what a file is known by."""
    return hashlib.sha256(data).hexdigest()


def reason_of(error: Exception) -> str:
    """Return the first line of an error."""
    return str(error).split("\n")[0] or type(error).__name__


def _check_unpacked(data: bytes) -> None:
    """Refuse parts that were packed, of which a few bytes can become all that memory holds.

    Raises:
        DocumentError: There is one, or parts overlap. Nothing that torch writes is so.
    """
    if not data.startswith(b"PK"):  # of before torch wrote archives
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or sum(part.file_size for part in parts) > len(data):
        raise DocumentError("its tensors are packed, as torch packs none")
