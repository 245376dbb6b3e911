"""Content objects: safetensors files of slices, in blocks with a hash each.

So any part of one can be read and verified alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.layout import tensor_key
from trainer.checkpoint.manifest import BYTES_PER_ELEMENT, ObjectEntry
from trainer.checkpoint.slices import Span
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


_LENGTH_BYTES = 8
# Of the first value: copies to places off a cache line take a fourth longer.
_ALIGNMENT = 64


def safetensors_header(
    shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the length of the JSON text in 8 bytes, and the text.

    Equal arguments make equal bytes; safetensors' own writer shuffles the metadata.

    Args:
        shapes: Shape of each float32 tensor by its name; they lie one after the other.
        metadata: What else the file tells; None leaves it out.
    """
    sizes = (BYTES_PER_ELEMENT * math.prod(shape) for shape in shapes.values())
    bounds = pairwise(accumulate(sizes, initial=0))
    contents: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for (name, shape), place in zip(shapes.items(), bounds, strict=True):
        contents[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": place}
    text = json.dumps(contents, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def first_elements(spans: Mapping[str, Span]) -> dict[str, int]:
    """Return where each slice begins among the values of one kind, in elements."""
    stops = accumulate(span.numel for span in spans.values())
    return {
        name: stop - span.numel for (name, span), stop in zip(spans.items(), stops, strict=True)
    }


def header(spans: Mapping[str, Span], kinds: Sequence[str]) -> bytes:
    """Return the first bytes of the file, after which the slices lie, kind by kind.

    Args:
        spans: The slice of each parameter, in the order of the file.
        kinds: The kinds of values of each, in the order of the file.
    """
    return safetensors_header(
        {
            tensor_key(kind, name, span.start): (span.numel,)
            for kind in kinds
            for name, span in spans.items()
        }
    )
