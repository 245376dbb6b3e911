"""What is kept and not believed: documents in a store, and files on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipelines.documents import DocumentError, parse_json, read_json, seal, unseal, validate_as
from trainer.storage.errors import MissingObject
from trainer.storage.local import LocalStore
from trainer.storage.store import Store

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_REPORT_BYTES = 1 << 20


def read_sealed(store: Store, key: str, *, max_bytes: int = MAX_REPORT_BYTES) -> dict[str, Any]:
    """Read a JSON object that carries its own checksum.

    Args:
        store: Where it is.
        key: Its key.
        max_bytes: How long it may be; of a longer one no more is fetched.

    Raises:
        MissingObject: There is none.
        DocumentError: It is damaged, or carries no checksum.
        StoreError: The store fails.
    """
    content = store.get_range(key, 0, max_bytes + 1)
    if len(content) > max_bytes:
        raise DocumentError(f"it has more than {max_bytes} bytes")
    return unseal(parse_json(content, max_bytes=max_bytes))


def read_or_set_aside(store: Store, key: str, kind: type[T]) -> T | None:
    """Read a document that can be made again.

    Args:
        store: Where it is.
        key: Its key.
        kind: Dataclass of what it holds.

    Returns:
        None if there is none. One that is damaged is told in a line, put aside, and counts as none.

    Raises:
        StoreError: The store fails.
    """
    try:
        return validate_as(kind, read_sealed(store, key))
    except MissingObject:
        return None
    except DocumentError as error:
        set_aside(store, key, reason=str(error))
        return None


def read_or_pass_over(store: Store, key: str, kind: type[T]) -> T | None:
    """Read a document as `read_or_set_aside` does, and leave a damaged one where it is.

    Raises:
        StoreError: The store fails.
    """
    try:
        return validate_as(kind, read_sealed(store, key))
    except MissingObject:
        return None
    except DocumentError as error:
        logger.warning("passing over %s, which cannot be believed: %s", store.uri(key), error)
        return None


def set_aside(store: Store, key: str, *, reason: str) -> None:
    """Move what cannot be believed out of the way, where somebody can look at it, and tell so.

    Args:
        store: Where it is.
        key: Its key.
        reason: What is wrong with it.

    Raises:
        StoreError: The store fails.
    """
    taken = store.list(key)
    names = (f"{key}.damaged" if number == 0 else f"{key}.damaged-{number}" for number in count())
    free = next(name for name in names if name not in taken)
    try:
        store.move(key, free)
    except MissingObject:
        return  # another process did
    logger.warning(
        "%s cannot be believed: %s; it is kept as %s and made again",
        store.uri(key),
        reason,
        free.rpartition("/")[2],
    )


_MAX_RECORD_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What was kept, written when all of it is there.

    Attributes:
        made_of: What decides the files.
        sha256_of: SHA-256 of each file.
        bytes_of: Length of each file.
    """

    made_of: str
    sha256_of: dict[str, str]
    bytes_of: dict[str, int]


class _Damage(NamedTuple):
    """What cannot be believed, and why."""

    key: str
    reason: str


class KeptFiles:
    """Groups of files, each in a folder of its own with a record beside it.

    Args:
        folder: Holds all groups.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = LocalStore(folder)

    def whole(self, *, made_of: str) -> Path | None:
        """Return the folder of a group if it is as it was kept, to the last byte.

        Args:
            made_of: What decides the files.
        """
        name = group_name(made_of)
        return None if self._damage(name, made_of) else self._folder / name

    def put_aside(self, *, made_of: str) -> None:
        """Move what is damaged of a group out of the way, and tell so.

        Raises:
            StoreError: The folder cannot be written.
        """
        name = group_name(made_of)
        if (damage := self._damage(name, made_of)) and (self._folder / f"{name}.json").exists():
            set_aside(self._store, damage.key, reason=damage.reason)

    def keep(self, files: Mapping[str, bytes], *, made_of: str) -> Path:
        """Write a group, and return its folder; a reader sees all of it or nothing.

        Raises:
            StoreError: The folder cannot be written.
        """
        name = group_name(made_of)
        for file, data in files.items():
            self._store.put(f"{name}/{file}", data)
        sums = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
        sizes = {file: len(data) for file, data in files.items()}
        record = seal(asdict(_Record(made_of=made_of, sha256_of=sums, bytes_of=sizes)))
        self._store.put(f"{name}.json", json.dumps(record, indent=1).encode())
        return self._folder / name

    def _damage(self, name: str, made_of: str) -> _Damage | None:
        record = f"{name}.json"
        try:
            written = read_json(self._folder / record, max_bytes=_MAX_RECORD_BYTES)
            told = validate_as(_Record, unseal(written))
        except (OSError, DocumentError) as error:
            return _Damage(record, str(error))
        if told.made_of != made_of:
            return _Damage(record, "it was made of something else")
        for file, wanted in told.sha256_of.items():
            key = f"{name}/{file}"
            try:
                # A sparse file takes no space, and hours to read.
                if (self._folder / key).stat().st_size != told.bytes_of.get(file):
                    return _Damage(key, "it has another length than when it was written")
                with (self._folder / key).open("rb") as content:
                    found = hashlib.file_digest(content, "sha256").hexdigest()
            except OSError as error:
                return _Damage(key, str(error))
            if found != wanted:
                return _Damage(key, "it has changed since it was written")
        return None


def group_name(made_of: str) -> str:
    """Return the name of a group: another origin has another folder, so none grows old."""
    return hashlib.sha256(made_of.encode()).hexdigest()[:32]
