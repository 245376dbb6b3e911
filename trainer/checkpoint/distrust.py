"""Taking apart JSON that somebody may have changed: nothing in it is believed."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any


class Rejected(ValueError):
    """Why a text is refused."""


def canonical(body: Mapping[str, Any]) -> bytes:
    """Return the one JSON text of a value."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def json_object(data: bytes) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        body = json.loads(data)
        canonical(body)
    except (RecursionError, ValueError) as error:
        raise Rejected(f"it is not plain JSON ({error})") from error
    return mapping(body, "it")


def only_fields(body: Mapping[str, Any], *expected: str) -> None:
    """Demand that these fields are there, and no other."""
    if set(body) != set(expected):
        odd = ", ".join(sorted(set(expected) ^ set(body)))
        raise Rejected(f"it lacks or has unknown fields: {odd}")


def mapping(value: object, what: str) -> dict[str, Any]:
    """Demand a JSON object."""
    if not isinstance(value, dict):
        raise Rejected(f"{what} is not a JSON object")
    return value


def sequence(value: object, what: str, *, length: int | None = None) -> list[Any]:
    """Demand a list, of so many things."""
    if not isinstance(value, list):
        raise Rejected(f"{what} is not a list")
    if length is not None and len(value) != length:
        raise Rejected(f"{what} is not a list of {length}")
    return value


def text(value: object, what: str) -> str:
    """Demand a text that can be shown."""
    # Names come to stand in messages, where they shall not move a terminal's cursor.
    if not isinstance(value, str) or not value.isprintable():
        raise Rejected(f"{what} is not text")
    return value


def whole(value: object, what: str, *, low: int, high: int) -> int:
    """Demand a whole number."""
    if type(value) is not int or not low <= value <= high:
        raise Rejected(f"{what} is {reprlib.repr(value)}, not a whole number from {low} to {high}")
    return value
