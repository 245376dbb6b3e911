"""Whatever stands where a document should be, one kind of error tells why it is refused."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pipelines.documents import (
    CHECKSUM,
    MAX_DEPTH,
    DocumentError,
    canonical,
    parse_json,
    read_bounded,
    read_json,
    seal,
    unseal,
    validate_as,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
).filter(lambda value: "inf" not in repr(value))


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    share: Annotated[float, Field(gt=0, le=1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class Whole:
    size: Annotated[int, Field(ge=1, le=64)] = 4
    parts: tuple[Part, ...] = ()
    free: dict[str, object] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON"),
        (b"\xff\xfe\x00\xd8", "it is not JSON"),
        (b"\x80abc", "it is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deep"),
        (b"[NaN]", "NaN is no finite number"),
        (b"-Infinity", "-Infinity is no finite number"),
        (b"1e999", "1e999 is no finite number"),
        (b"1" * 41, "is a number of 41 digits"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "is a number of 5000 digits"),
        (b'"' + b"x" * 1000 + b'"', "it has 1002 bytes, more than 1000"),
    ],
)
def test_what_is_no_document_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        parse_json(content, max_bytes=1000 if reason.endswith("1000") else 1 << 20)


def test_what_is_as_deep_as_allowed_is_read() -> None:
    content = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(parse_json(content)).encode() == content


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    with suppress(DocumentError):
        parse_json(content)


@given(JSON)
def test_what_is_sealed_is_read_back(value: object) -> None:
    whole = json.dumps(seal({"value": value}), indent=2)
    assert unseal(parse_json(whole.encode())) == {"value": value}


def test_no_changed_byte_is_missed() -> None:
    body = {"frechet": 1.25, "samples": 100, "name": "random_conv"}
    whole = json.dumps(seal(body), indent=2).encode()
    silent = 0
    for place in range(len(whole)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(whole)
            changed[place] ^= flip
            try:
                found = unseal(parse_json(bytes(changed)))
            except DocumentError:
                continue
            assert found == body  # white space
            silent += 1
    assert silent < len(whole)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "not a JSON object"),
        ({"a": 1}, "has no checksum"),
        ({"a": 1, CHECKSUM: "0" * 64}, "its checksum is wrong"),
        ({"a": 1, CHECKSUM: 3}, "its checksum is wrong"),
    ],
)
def test_a_missing_or_wrong_sum_is_told(values: object, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        unseal(values)


def test_a_number_that_is_not_finite_is_not_sealed() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal({"a": float("nan")})
    assert canonical({"b": 1, "a": [1.0]}) == b'{"a":[1.0],"b":1}'


def test_types_are_taken_as_they_are() -> None:
    found = validate_as(Whole, {"size": 2, "parts": [{"name": "a", "share": 1}], "unknown": 3})
    assert found == Whole(size=2, parts=(Part(name="a", share=1.0),))
    assert validate_as(Whole, {}) == Whole()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "it: "),
        ({"size": "2"}, "size: Input should be a valid integer"),
        ({"size": True}, "size: "),
        ({"size": 2.0}, "size: "),
        ({"size": 65}, "size: Input should be less than or equal to 64"),
        ({"size": [2]}, "size: "),
        ({"parts": {"a": 1}}, "parts: "),
        ({"parts": [{}]}, "parts.0.name: Field required"),
        ({"parts": [{"name": "\ud800"}]}, "hex escape"),
        ({"parts": [{"name": "a", "share": False}]}, "parts.0.share: "),
    ],
)
def test_another_type_is_named_with_its_place(values: object, reason: str) -> None:
    with pytest.raises(DocumentError) as caught:
        validate_as(Whole, values)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_looked_at_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("[1]")
    assert read_json(tmp_path / "good") == [1]
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DocumentError, match="bytes, more than"):
        read_bounded(tmp_path / "sparse")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(OSError, match=str(place)):
            read_bounded(place)
