"""JSON and YAML of others: read with bounds, and JSON sealed by a SHA-256 of its content.

All JSON that comes from a file, a store or another process is read here and nowhere else, so that
each reader is bound alike: size, depth, numbers, types.

It is no signature: who can write there can write another sum as well.
"""

import errno
import hashlib
import json
import os
import re
import stat
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from pipelines.console import visible

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 1 << 28
MAX_DEPTH = 64
"""How deep lists and objects may be nested; what this project writes has no more than a dozen."""

_MAX_DIGITS = 40  # more than any number of ours; each has a place among the floats
_MAX_REASONS = 3

MAX_YAML_BYTES = 1 << 16
_MAX_YAML_EVENTS = 1 << 12
_NUMBER = re.compile(r"[-+.\d][-+.:_\deE]*")
"""What YAML may take for a number, also of hours and minutes."""


class DocumentError(ValueError):
    """This is no JSON, or none that is read here; the text says why."""


def parse_json(content: bytes, *, max_bytes: int = MAX_DOCUMENT_BYTES, finite: bool = True) -> Any:
    """Parse JSON of sane size and depth, whose numbers are finite.

    Args:
        content: The text, as UTF-8.
        max_bytes: How long it may be.
        finite: Whether NaN and infinity, which Python writes, are refused.

    Raises:
        DocumentError: It is not as it should be.
    """
    if len(content) > max_bytes:
        raise DocumentError(f"it has {len(content)} bytes, more than {max_bytes}")
    try:
        values = json.loads(
            content,
            parse_constant=_refuse if finite else float,
            parse_float=_parse_float if finite else float,
            parse_int=_parse_int,
        )
    except RecursionError:
        raise _depth_error() from None
    except ValueError as error:  # also bytes that are no text
        raise DocumentError(f"it is not JSON ({error})") from None
    _check_depth(values)
    return values


def read_json(path: Path, *, max_bytes: int = MAX_DOCUMENT_BYTES, finite: bool = True) -> Any:
    """Parse a file of JSON, after a look at its size and kind: see `parse_json`.

    Raises:
        OSError: It cannot be read, or is no regular file.
        DocumentError: It is not as it should be.
    """
    content = read_bounded(path, max_bytes=max_bytes)
    return parse_json(content, max_bytes=max_bytes, finite=finite)


def read_yaml_text(path: Path) -> str:
    """Read a file of YAML that a parser without bounds may have: it says all that it means.

    Raises:
        OSError: It cannot be read, or is no regular file.
        DocumentError: It is no YAML, too long or too deep, or has too many values, anchors, tags or
            numbers of many digits.
    """
    content = read_bounded(path, max_bytes=MAX_YAML_BYTES)
    depth = 0
    try:
        text = content.decode()
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise DocumentError("it is nested too deep")
            if number > _MAX_YAML_EVENTS:
                raise DocumentError(f"it has more than {_MAX_YAML_EVENTS} values")
            if isinstance(event, yaml.NodeEvent):
                _check_node(event)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DocumentError(f"it is not YAML ({error})") from None
    return text


def _check_node(event: yaml.NodeEvent) -> None:
    line = "it" if event.start_mark is None else f"line {event.start_mark.line + 1}"
    if event.anchor is not None:
        raise DocumentError(f"{line} has an anchor or an alias, {event.anchor[:40]}")
    if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
        return
    if event.tag not in (None, "!"):
        raise DocumentError(f"{line} has a tag, {event.tag[:40]}")
    if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
        long = event.value if len(event.value) > _MAX_DIGITS else ""
        if _NUMBER.fullmatch(long):
            raise DocumentError(f"{line} has a number of {len(long)} digits")


def read_bounded(path: Path, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Read a file that should be small; a sparse one takes no space on its disk.

    Raises:
        OSError: It cannot be read, or is no regular file, such as a pipe that never ends.
        DocumentError: It is longer than ``max_bytes``.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > max_bytes:
            raise DocumentError(f"it has {status.st_size} bytes, more than {max_bytes}")
        return file.read(max_bytes + 1)


def validate_as(kind: type[T], values: Any) -> T:
    """Give what was parsed the types of a dataclass, without any conversion.

    Args:
        kind: The type; unknown fields are passed over, missing ones take their defaults.
        values: What `parse_json` returned.

    Raises:
        DocumentError: Something is missing or of another type, or outside its bounds.
    """
    hashable: Any = kind  # whatever mypy thinks of the classes of dataclasses
    try:
        # As JSON, in which alone a list may be a tuple while a text is still no number.
        return typing.cast(T, _adapter(hashable).validate_json(json.dumps(values), strict=True))
    except ValidationError as error:
        reasons = [_say_why(each) for each in error.errors(include_url=False)[:_MAX_REASONS]]
        raise DocumentError(f"it does not hold what it should ({'; '.join(reasons)})") from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Make what reads a type, which takes longer than most documents."""
    return TypeAdapter(kind)


def _say_why(error: ErrorDetails) -> str:
    name = visible(".".join(map(str, error["loc"])))[:80] or "it"
    found = "" if error["type"] == "missing" else f", not {visible(repr(error['input']))[:40]}"
    return f"{name}: {visible(error['msg'])[:120]}{found}"


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _check_depth(values: Any) -> None:
    """Refuse what a function that calls itself could not walk through."""
    level = [values]
    for _ in range(MAX_DEPTH + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return
        level = [
            child for each in level for child in (each.values() if isinstance(each, dict) else each)
        ]
    raise _depth_error()


def _depth_error() -> DocumentError:
    return DocumentError("it is not JSON that is read here: it is nested too deep")


def _parse_float(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _refuse(text)


def _parse_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text[:40]}… is a number of {len(text)} digits")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no finite number")


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


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object as plain JSON values, with its sum as a further field, the last one.

    Raises:
        TypeError: Something in it is no JSON value.
        ValueError: It has a number that is not finite.
    """
    # As it will be read: with lists for tuples, and texts for the names of fields.
    plain = parse_json(json.dumps(body, allow_nan=False).encode())
    return {**plain, CHECKSUM: _digest(plain)}


def unseal(values: Any, *, required: bool = True) -> dict[str, Any]:
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
