"""JSON objects that carry the SHA-256 of their own content, so that a changed byte is noticed.

It is no signature: who can write there can write another sum as well.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.json_document import DocumentError, parse_json

CHECKSUM = "sha256"
INDEX_SHA256 = "index_sha256"
"""Of the index that a document lies beside, where there is one."""


def canonical(values: Any) -> bytes:
    """Return the one JSON text of a value.

    Raises:
        TypeError: Something in it is no JSON value.
        ValueError: It has a number that is not finite.
    """
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object as plain JSON values, with its sum as a further field, the last one.

    Raises:
        TypeError: Something in it is no JSON value.
        ValueError: It has a number that is not finite.
    """
    # As it will be read: with lists for tuples, and texts for the names of fields.
    plain = parse_json(json.dumps(body, allow_nan=False).encode())
    return {**plain, CHECKSUM: _digest(plain)}


def unsealed(values: Any, *, required: bool = True) -> dict[str, Any]:
    """Return an object without its sum, which was checked.

    Args:
        values: What was parsed.
        required: Whether there must be one. Where it is not, an object without is believed, as
            versions of before wrote none.

    Raises:
        DocumentError: It is no object, or its sum is missing or wrong.
    """
    if not isinstance(values, dict):
        raise DocumentError("it is not a JSON object")
    body = dict(values)
    told = body.pop(CHECKSUM, None)
    if told is None and not required:
        return body
    if told is None:
        raise DocumentError(
            "it has no checksum, so nobody can tell whether it was changed; versions of before "
            "wrote none"
        )
    if told != _digest(body):
        raise DocumentError("its checksum is wrong, so it was changed after it was written")
    return body


def belongs(values: Any, index: Callable[[], bytes]) -> bool:
    """Tell whether what was read beside an index is of that very index.

    Args:
        values: What was read; without a sum, or of a version that told no index, it is believed.
        index: Reads the index, if that is asked for.
    """
    told = values.get(INDEX_SHA256) if CHECKSUM in values else None
    return told is None or told == hashlib.sha256(index()).hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(body)).hexdigest()
