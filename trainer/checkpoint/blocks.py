"""Objects as rows of blocks with a hash each, so that any part can be read and verified alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.manifest import ObjectEntry
from trainer.storage.errors import MissingObject
from trainer.storage.store import Store

# Large enough for a request, small enough that a rank which needs a slice reads little beside it;
# a whole number of float32 values.
BLOCK_BYTES = 8 * 1024**2
ADVICE = "Use an older checkpoint, and check the store."


def blocks_of(data: memoryview) -> Iterator[memoryview]:
    """Cut bytes into blocks, the last of which may be shorter."""
    return (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def block_hash(block: bytes | memoryview) -> str:
    """Return the SHA-256 of a block in hexadecimal."""
    return hashlib.sha256(block).hexdigest()


def read_block(store: Store, entry: ObjectEntry, number: int, *, block_bytes: int) -> bytes:
    """Read one block of an object and verify it.

    Args:
        store: The store of the manifest's keys.
        entry: The object as its manifest describes it.
        number: Which block, from 0.
        block_bytes: Size of the manifest's blocks.

    Raises:
        DamagedCheckpoint: The object is missing or shorter, or the block's hash is another.
        StoreError: The store failed.
    """
    start = number * block_bytes
    size = min(block_bytes, entry.size_bytes - start)
    try:
        block = store.get_range(entry.key, start, size)
    except MissingObject as error:
        raise DamagedCheckpoint(f"{store.uri(entry.key)} is missing. {ADVICE}") from error
    if len(block) != size or block_hash(block) != entry.block_sha256[number]:
        raise DamagedCheckpoint(
            f"{store.uri(entry.key)} changed after it was saved: bytes {start} to {start + size} "
            f"do not have the SHA-256 that its manifest names. {ADVICE}"
        )
    return block
