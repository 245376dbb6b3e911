"""A store in an S3 bucket, on AWS or any service that speaks S3."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore import exceptions as aws
from botocore.config import Config
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from trainer.storage.errors import InvalidStoreUri, MissingObject, StoreError
from trainer.storage.s3_errors import (
    CAUSES,
    CAUSES_OF_ABORT,
    deletes_one_by_one,
    explain_errors,
    http_status,
    is_broken_off,
    is_conflict,
    raise_refused,
)
from trainer.storage.store import StoreConfig, check_endpoint, check_key, check_prefix, in_threads

MIB = 1024**2
# Few large parts cost a service less than many small ones. For objects beyond 156 GiB boto3 makes
# them larger.
TRANSFER = TransferConfig(
    multipart_threshold=16 * MIB, multipart_chunksize=16 * MIB, max_concurrency=6
)
# Parts in memory at a time: ten unless told, for which boto3's own class has no argument.
TRANSFER.max_in_memory_upload_chunks = 6
AFTER_CONFLICTS = Retrying(
    retry=retry_if_exception(is_conflict),
    stop=stop_after_attempt(8),
    wait=wait_exponential(0.1),
    reraise=True,
)
MAX_DELETES = 1000  # in one request, by S3's rules


class S3Store:
    """Objects under a prefix of a bucket.

    Large objects travel in parts, several at a time; parts of an upload that died are no object.

    Args:
        bucket: The bucket, which must exist.
        prefix: What all keys begin with, without slashes at its ends; empty for none.
        config: Endpoint, timeouts, retries.

    Raises:
        InvalidStoreUri: The bucket's name is not one.
        InvalidKey: The prefix has unsafe parts.
        StoreError: `config.profile` does not exist.
    """

    def __init__(self, bucket: str, *, prefix: str, config: StoreConfig) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", bucket):
            raise InvalidStoreUri(
                "After s3:// comes the name of a bucket: 3 to 63 letters, digits and . - and no "
                "credentials, as in 's3://bucket/prefix'."
            )
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._endpoint = config.endpoint_url or os.environ.get("S3_ENDPOINT_URL")
        if self._endpoint is not None:
            check_endpoint(self._endpoint)
        style = config.addressing_style
        if style == "auto" and self._endpoint is not None:
            style = "path"  # a name per bucket is rarely set up outside AWS
        self._whole_answers = Retrying(
            retry=retry_if_exception(is_broken_off),
            stop=stop_after_attempt(config.retries),
            reraise=True,
        )
        with self._explain_errors("open", ""):
            session = boto3.Session(profile_name=config.profile, region_name=config.region)
            self._client: Any = session.client(
                "s3",
                endpoint_url=self._endpoint,
                config=Config(
                    s3={"addressing_style": style},
                    retries={"mode": "standard", "total_max_attempts": config.retries},
                    connect_timeout=config.connect_timeout_s,
                    read_timeout=config.read_timeout_s,
                    signature_version=UNSIGNED if config.anonymous else None,
                ),
            )

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Upload an object, in parts if it is large."""
        name = self._name(key)
        with self._explain_errors("write", key):
            self._client.upload_fileobj(_File(data), self._bucket, name, Config=TRANSFER)

    def put_pieces(self, key: str, pieces: Iterator[bytes]) -> None:
        """Upload an object in parts, as the pieces come."""
        name = self._name(key)
        with self._explain_errors("write", key):
            self._client.upload_fileobj(_Pieces(pieces), self._bucket, name, Config=TRANSFER)

    def create(self, key: str, data: bytes) -> bool:
        """Upload a small object on condition that there is none."""
        name = self._name(key)

        def put() -> bool:
            try:
                self._client.put_object(Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*")
            except aws.ClientError as error:
                if http_status(error) != 412:  # exists
                    raise
                return False
            return True

        with self._explain_errors("write", key):
            return AFTER_CONFLICTS(put)

    def get(self, key: str) -> bytes:
        """Download an object, in parts if it is large."""
        name = self._name(key)
        data = io.BytesIO()
        with self._explain_errors("read", key), self._found(key):
            self._client.download_fileobj(self._bucket, name, data, Config=TRANSFER)
        return data.getvalue()

    def get_range(self, key: str, start: int, size: int) -> bytes:
        """Download a part of an object, again if the answer breaks off."""
        name = self._name(key)
        where = f"bytes={start}-{start + size - 1}"

        def read() -> bytes:
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=name, Range=where)
            except aws.ClientError as error:
                if http_status(error) != 416:  # the object ends before
                    raise
                return b""
            if answer["ContentLength"] > size:
                raise StoreError(
                    f"{self.uri(key)}: the service sends {answer['ContentLength']} bytes "
                    f"where {size} were asked for; use one that knows ranges."
                )
            return bytes(answer["Body"].read())

        with self._explain_errors("read", key), self._found(key):
            # boto3 tries a request again, but not the reading of its answer.
            return self._whole_answers(read)

    def fingerprint(self, key: str) -> str:
        """Return the object's ETag, a digest of its content or of its parts."""
        name = self._name(key)
        with self._explain_errors("read", key), self._found(key):
            return str(self._client.head_object(Bucket=self._bucket, Key=name)["ETag"])

    def move(self, key: str, to: str) -> None:
        """Copy an object inside the service, in parts if it is large, and delete it."""
        source = {"Bucket": self._bucket, "Key": self._name(key)}
        with self._explain_errors("move", key), self._found(key):
            self._client.copy(source, self._bucket, self._name(to), Config=TRANSFER)
            self._client.delete_object(**source)

    def delete(self, key: str) -> None:
        """Delete an object."""
        with self._explain_errors("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def delete_all(self, keys: Collection[str]) -> None:
        """Delete objects a thousand a request, or several at a time where a service cannot."""
        listed = list(keys)
        for some in (
            listed[start : start + MAX_DELETES] for start in range(0, len(listed), MAX_DELETES)
        ):
            names = [{"Key": self._name(key)} for key in some]
            with self._explain_errors("delete", os.path.commonpath(some)):
                try:
                    answer = self._client.delete_objects(
                        Bucket=self._bucket, Delete={"Objects": names, "Quiet": True}
                    )
                except aws.ClientError as error:
                    if not deletes_one_by_one(error):
                        raise
                    in_threads(self.delete, ((key,) for key in some))
                else:
                    raise_refused(answer)

    def uri(self, key: str) -> str:
        """Return the s3:// URI of a key."""
        return f"s3://{self._bucket}/{self._name(key)}"

    def list(self, prefix: str) -> dict[str, int]:
        """List the keys, a thousand a request."""
        check_prefix(prefix)
        sizes: dict[str, int] = {}
        with self._explain_errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    sizes[item["Key"].removeprefix(self._prefix)] = item["Size"]
        return dict(sorted(sizes.items()))

    def abort_unfinished(self, prefix: str, is_dead: Callable[[str], bool]) -> int:
        """Abort uploads in parts, which no listing of objects shows and which cost money."""
        check_prefix(prefix)

        def abort(name: str, upload_id: str) -> None:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)

        with self._explain_errors("remove unfinished uploads of", prefix, CAUSES_OF_ABORT):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            dead = [
                (upload["Key"], upload["UploadId"])
                for page in pages
                for upload in page.get("Uploads", ())
                if is_dead(upload["Key"].removeprefix(self._prefix))
            ]
            in_threads(abort, dead)
        return len(dead)

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    @contextmanager
    def _found(self, key: str) -> Iterator[None]:
        """Turns the answer 404 into our own error."""
        try:
            yield
        except aws.ClientError as error:
            # A download begins with a HEAD, whose answer gives no reason; a listing's does.
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._name(key), MaxKeys=1)
            if http_status(error) != 404:
                raise
            raise MissingObject(f"There is no object at {self.uri(key)}.") from error

    def _explain_errors(
        self, verb: str, key: str, causes: Mapping[str, str] = CAUSES
    ) -> AbstractContextManager[None]:
        at = "" if self._endpoint is None else f" at {self._endpoint}"
        what = f"{verb} s3://{self._bucket}/{self._prefix}{key}{at}"
        return explain_errors(what, causes, endpoint=self._endpoint)


class _File(io.RawIOBase):
    """Bytes as a file to read from, without a copy of the whole."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        stop = len(self._data) if size is None or size < 0 else self._at + size
        part = bytes(self._data[self._at : stop])
        self._at += len(part)
        return part


class _Pieces(io.RawIOBase):
    """Pieces as a file to read from, once and in order."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        wanted = float("inf") if size is None or size < 0 else size
        taken = bytearray()
        while len(taken) < wanted:
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = memoryview(piece)
                continue
            part = self._rest[: int(min(len(self._rest), wanted - len(taken)))]
            self._rest = self._rest[len(part) :]
            taken += part
        return bytes(taken)
