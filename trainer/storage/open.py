"""The store that a URI names."""

from __future__ import annotations

import os
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


def set_environment(config: StoreConfig) -> None:
    """Have streaming, MLflow and boto3 reach the same store, by the variables that they read.

    They hold addresses and names only; credentials stay where AWS's own chain finds them.

    Args:
        config: How to reach it; what is None there stays as it is in the environment.
    """
    settings = {
        "S3_ENDPOINT_URL": config.endpoint_url,
        "MLFLOW_S3_ENDPOINT_URL": os.environ.get("MLFLOW_S3_ENDPOINT_URL", config.endpoint_url),
        "AWS_DEFAULT_REGION": config.region,
        "AWS_PROFILE": config.profile,
    }
    os.environ.update({name: value for name, value in settings.items() if value is not None})
