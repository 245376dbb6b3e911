"""The store that a URI names."""

from __future__ import annotations

from pathlib import Path

from trainer.storage.checkpoint_uri import check_scheme
from trainer.storage.errors import InvalidStoreUri
from trainer.storage.store import Store, StoreConfig


def open_store(uri: str, config: StoreConfig) -> Store:
    """Open the store at `uri`; nothing is written or contacted yet.

    Args:
        uri: "s3://bucket/prefix", "file:///folder", or the path of a local folder.
        config: How to reach an object store.

    Raises:
        InvalidStoreUri: The scheme is unknown, the bucket is missing, or the URI carries
            credentials.
        StoreError: The settings name an AWS profile that does not exist.
    """
    check_scheme(uri)
    scheme, separator, rest = uri.partition("://")
    if separator and scheme not in ("s3", "file"):
        raise InvalidStoreUri(
            f"Checkpoints cannot be kept at {scheme}://…: give 's3://bucket/prefix' or the path "
            "of a local folder."
        )
    if scheme == "s3" and separator:
        from trainer.storage.s3 import S3Store

        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix=prefix.strip("/"), config=config)
    from trainer.storage.local import LocalStore

    path = rest if separator else uri
    if not path or (separator and not path.startswith("/")):
        raise InvalidStoreUri(
            f"{uri!r} names no folder: give 's3://bucket/prefix', 'file:///folder' or a path."
        )
    return LocalStore(Path(path))
