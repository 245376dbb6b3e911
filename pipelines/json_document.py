"""JSON that others have written: read with bounds, and refused with one kind of error."""

import json
from typing import Any, NoReturn

MAX_DOCUMENT_BYTES = 1 << 28


class DocumentError(ValueError):
    """This is no JSON, or none that is read here; the text says why."""


def parse_json(content: bytes, *, most_bytes: int = MAX_DOCUMENT_BYTES) -> Any:
    """Parse JSON of sane size and depth, whose numbers are finite.

    Args:
        content: The text, as UTF-8.
        most_bytes: How long it may be.

    Raises:
        DocumentError: It is not as it should be.
    """
    if len(content) > most_bytes:
        raise DocumentError(f"it is {len(content)} bytes long, more than {most_bytes}")
    try:
        return json.loads(content, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise DocumentError("it is not JSON that is read here: it is nested too deep") from None
    except ValueError as error:  # also numbers of thousands of digits, and bytes that are no text
        raise DocumentError(f"it is not JSON ({error})") from None


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no finite number")
