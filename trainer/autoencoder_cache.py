"""Autoencoders that were fetched from a store, kept here with the sums of their files."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trainer.autoencoder_settings import AutoencoderError
from trainer.checkpoint.errors import StoreError
from trainer.checkpoint.kept_files import KeptFiles, group_name
from trainer.checkpoint.store import Store


def fetched(store: Store, keys: Mapping[str, str], *, cache: Path, uri: str) -> Path:
    """Return a folder with an autoencoder's files; the ranks of a machine fetch them once.

    Args:
        store: Where they come from.
        keys: Key of each file in that store, by its name here.
        cache: Folder of all autoencoders that were fetched.
        uri: What the user named, for messages.

    Raises:
        AutoencoderError: They cannot be kept, or change while they are fetched.
        MissingObject: One is not there.
        StoreError: The store fails or refuses.
    """
    kept, made_of = KeptFiles(cache), _version(store, keys, uri=uri)
    if found := kept.whole(made_of=made_of):
        return found
    with _locked(cache / f"{group_name(made_of)}.lock", uri=uri):
        if found := kept.whole(made_of=made_of):
            return found
        with _explained(cache, uri=uri):
            kept.put_aside(made_of=made_of)
        data = {name: store.get(key) for name, key in keys.items()}
        if _version(store, keys, uri=uri) != made_of:
            raise AutoencoderError(
                f"the autoencoder of codec.source={uri} was replaced while it was fetched; start "
                "again once its files stay as they are"
            )
        with _explained(cache, uri=uri):
            return kept.keep(data, made_of=made_of)


def _version(store: Store, keys: Mapping[str, str], *, uri: str) -> str:
    return json.dumps([uri, *((key, store.fingerprint(key)) for key in keys.values())])


@contextmanager
def _locked(file: Path, *, uri: str) -> Iterator[None]:
    """Hold a lock that the system lets go of when its holder dies."""
    with _explained(file.parent, uri=uri):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("wb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained(cache: Path, *, uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, StoreError) as error:
        raise AutoencoderError(
            f"the autoencoder of codec.source={uri} cannot be kept at {cache} ({error}); free some "
            "space, or set home to a folder you may write"
        ) from error
