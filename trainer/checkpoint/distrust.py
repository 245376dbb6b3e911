"""Taking apart JSON that somebody may have changed: nothing in it is believed."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from pipelines.json_document import DocumentError, parse_json


def json_object(data: bytes, *, most_bytes: int) -> dict[str, Any]:
    """Read a JSON object of so many bytes at most.

    Raises:
        DocumentError: It is none.
    """
    return mapping(parse_json(data, most_bytes=most_bytes), "it")


def only_fields(body: Mapping[str, Any], *expected: str) -> None:
    """Demand that these fields are there, and no other."""
    if set(body) != set(expected):
        odd = ", ".join(sorted(set(expected) ^ set(body)))
        raise DocumentError(f"it lacks or has unknown fields: {odd}")


def mapping(value: object, what: str) -> dict[str, Any]:
    """Demand a JSON object."""
    if not isinstance(value, dict):
        raise DocumentError(f"{what} is not a JSON object")
    return value


def sequence(value: object, what: str, *, length: int | None = None) -> list[Any]:
    """Demand a list, of so many things."""
    if not isinstance(value, list):
        raise DocumentError(f"{what} is not a list")
    if length is not None and len(value) != length:
        raise DocumentError(f"{what} is not a list of {length}")
    return value


def text(value: object, what: str) -> str:
    """Demand a text that can be shown."""
    # Names come to stand in messages, where they shall not move a terminal's cursor.
    if not isinstance(value, str) or not value.isprintable():
        raise DocumentError(f"{what} is not text")
    return value


def whole(value: object, what: str, *, low: int, high: int) -> int:
    """Demand a whole number."""
    if type(value) is not int or not low <= value <= high:
        raise DocumentError(
            f"{what} is {reprlib.repr(value)}, not a whole number from {low} to {high}"
        )
    return value
