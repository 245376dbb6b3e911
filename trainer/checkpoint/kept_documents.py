"""Documents in a store, read within bounds, and put aside where they cannot be believed."""

from __future__ import annotations

import logging
from itertools import count
from typing import Any, TypeVar

from pipelines.json_document import DocumentError, parse_json, typed
from pipelines.sealed_document import unsealed
from trainer.checkpoint.errors import MissingObject
from trainer.checkpoint.store import Store

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_REPORT_BYTES = 1 << 20


def read_sealed(store: Store, key: str, *, most_bytes: int = MAX_REPORT_BYTES) -> dict[str, Any]:
    """Read a JSON object that carries its own checksum.

    Args:
        store: Where it is.
        key: Its key.
        most_bytes: How long it may be; of a longer one no more is fetched.

    Raises:
        MissingObject: There is none.
        DocumentError: It is damaged, or carries no checksum.
        StoreError: The store fails.
    """
    content = store.get_range(key, 0, most_bytes + 1)
    if len(content) > most_bytes:
        raise DocumentError(f"it has more than {most_bytes} bytes")
    return unsealed(parse_json(content, most_bytes=most_bytes))


def believed(store: Store, key: str, kind: type[T]) -> T | None:
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
        return typed(kind, read_sealed(store, key))
    except MissingObject:
        return None
    except DocumentError as error:
        set_aside(store, key, reason=str(error))
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
