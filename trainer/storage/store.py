"""What runs need of the place their objects are kept in."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, TypeVarTuple

from pydantic import Field

from pipelines.addresses import find_endpoint_fault
from pipelines.domains import Checked
from trainer.storage.checkpoint_uri import check_no_credentials, check_scheme
from trainer.storage.errors import InvalidKey, InvalidStoreUri

MAX_KEY_LENGTH = 900  # S3 allows 1024 bytes, and the store's own prefix comes on top

# No segment begins with a dot: that rules out "..", and keeps a store's temporary files apart.
_SEGMENT = re.compile(r"[A-Za-z0-9_=+@-][A-Za-z0-9_=+@.-]*")


class Store(Protocol):
    """Objects of bytes under keys such as "a/b/c"; a reader never sees half an object.

    Every method raises `StoreError` when the store fails, `StoreUnreachable` when it does not
    answer, and `InvalidKey` for an unsafe key. Methods may be called from several threads.
    """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object, whole or not at all; an older one under this key is replaced."""
        ...

    def put_pieces(self, key: str, pieces: Iterator[bytes]) -> None:
        """Write an object as `put` does, piece by piece, so that memory never holds all of it."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none, and tell whether this was done.

        Of many writers one succeeds. Some S3 services (OpenStack Swift) look first and write then,
        so two that come in the same moment may both hear True, and the later object stands.
        """
        ...

    def get(self, key: str) -> bytes:
        """Read an object, or raise `MissingObject`."""
        ...

    def get_range(self, key: str, start: int, size: int) -> bytes:
        """Read `size` bytes from `start` on, fewer where the object ends, or `MissingObject`."""
        ...

    def fingerprint(self, key: str) -> str:
        """Return a text that changes with the object's content, or raise `MissingObject`."""
        ...

    def move(self, key: str, to: str) -> None:
        """Give an object another key, where none stands, whatever it holds; or `MissingObject`."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that does not exist is fine."""
        ...

    def delete_all(self, keys: Collection[str]) -> None:
        """Remove objects, many at a time where the store can; after an error some may be left."""
        ...

    def uri(self, key: str) -> str:
        """Return the full address of a key, for people and other programs."""
        ...

    def list(self, prefix: str) -> dict[str, int]:
        """Return all keys that begin with `prefix`, sorted, and the size of each in bytes."""
        ...

    def abort_unfinished(self, prefix: str, is_dead: Callable[[str], bool]) -> int:
        """Remove what writers left of objects that they did not finish; `list` shows none of it.

        Args:
            prefix: What the keys begin with.
            is_dead: Tells of a key, or another name in the key's folder, whether its writer is.

        Returns:
            How many remains were removed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StoreConfig(Checked):
    """Where things are kept and how to reach it; a local folder needs no more than `uri`.

    Credentials are not settings: they come from the environment, `profile`, or the machine's role.

    Attributes:
        uri: "s3://bucket/prefix" or a local folder; None is a folder in the job's home.
        endpoint_url: An S3 service other than AWS; None takes S3_ENDPOINT_URL, else AWS.
        region: The bucket's region; None takes the environment's.
        profile: Section of the AWS credentials file; None takes the environment's.
        addressing_style: "auto" is "path" for an endpoint of your own and "virtual" on AWS.
        retries: Tries of one request, with growing pauses, before it fails.
        connect_timeout_s: Seconds to wait for a connection.
        read_timeout_s: Seconds to wait for each part of an answer.
        anonymous: Ask without credentials, as public buckets want it; nothing can be written so.
    """

    uri: str | None = field(default=None, metadata={"place": "uri"})
    endpoint_url: str | None = field(default=None, metadata={"place": "url"})
    region: str | None = None
    profile: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    retries: Annotated[int, Field(ge=1)] = 5
    connect_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    read_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    anonymous: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint_url is not None:
            check_endpoint(self.endpoint_url)
        if self.uri is not None:
            check_no_credentials(self.uri)
            check_scheme(self.uri)


def check_key(key: str) -> str:
    """Return the key if it is safe on every store.

    Raises:
        InvalidKey: It is empty, absolute, too long, climbs out with "..", has a part that begins
            with a dot, or uses other characters than letters, digits and `_ = + @ . -`.
    """
    if len(key) > MAX_KEY_LENGTH or not all(map(_SEGMENT.fullmatch, key.split("/"))):
        shown = key if len(key) <= 100 else key[:100] + "…"
        raise InvalidKey(
            f"{shown!r} cannot name an object: use up to {MAX_KEY_LENGTH} letters, digits and "
            "_ = + @ . - in parts separated by single slashes, no part beginning with a dot."
        )
    return key


def check_prefix(prefix: str) -> None:
    """Check that safe keys can begin so: with nothing, a key, or a key and a slash.

    Raises:
        InvalidKey: They cannot.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))


def check_endpoint(url: str) -> str:
    """Return the endpoint if it is a plain web address.

    Raises:
        InvalidStoreUri: It is not, or it may carry credentials, which would reach logs.
    """
    if fault := find_endpoint_fault(url):
        raise InvalidStoreUri(fault)
    return url


Arguments = TypeVarTuple("Arguments")

READERS = 8


def in_threads(step: Callable[[*Arguments], None], arguments: Iterable[tuple[*Arguments]]) -> None:
    """Run a step for all arguments, several at a time, and raise the first error.

    After an error nothing more is begun, and what was begun is waited for.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint") as pool:
        futures = [pool.submit(step, *each) for each in arguments]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
