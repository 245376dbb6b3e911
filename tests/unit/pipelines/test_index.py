"""What is read of index.json, and what is refused."""

import copy
import json
from typing import Any

import pytest

from pipelines.errors import EmptyDatasetError, InvalidIndexError
from pipelines.index import parse_index

SHARD: dict[str, Any] = {
    "version": 2,
    "format": "mds",
    "compression": None,
    "hashes": ["sha1", "sha256"],
    "size_limit": 1000,
    "samples": 7,
    "raw_data": {
        "basename": "shard.00000.mds",
        "bytes": 500,
        "hashes": {"sha1": "ab" * 20, "sha256": "cd" * 32},
    },
    "zip_data": None,
    "column_names": ["image", "label", "name"],
    "column_encodings": ["jpeg", "int32", "str"],
    "column_sizes": [None, 4, None],
}


def index(*shards: object, version: object = 2) -> bytes:
    return json.dumps({"version": version, "shards": list(shards)}).encode()


def changed(**changes: object) -> dict[str, Any]:
    """The good shard with some fields replaced; raw_data__bytes goes one level down."""
    shard = copy.deepcopy(SHARD)
    for key, value in changes.items():
        *outer, last = key.split("__")
        target = shard[outer[0]] if outer else shard
        target[last] = value
    return shard


def columns(*listed: tuple[object, object, object]) -> dict[str, Any]:
    names, encodings, sizes = (list(part) for part in zip(*listed, strict=True))
    return changed(column_names=names, column_encodings=encodings, column_sizes=sizes)


MOMENTS = ("moments", "ndarray:float16:2,2,4,8,8", 2048)
IMAGE, LABEL = ("image", "bytes", None), ("label", "int", 8)


def test_a_good_index_is_read() -> None:
    other = changed(raw_data__basename="part-1/shard.00001.mds", samples=3)
    first, second = parse_index(index(SHARD, other), prefix="p")
    assert (first.name, first.samples, first.size_bytes) == ("shard.00000.mds", 7, 500)
    assert (first.hash_name, first.hash_value) == ("sha256", "cd" * 32)
    assert [column.encoding for column in first.columns] == ["jpeg", "int32", "str"]
    assert second.name == "part-1/shard.00001.mds"


@pytest.mark.parametrize(
    "name",
    [
        "../shard.mds",
        "a/../../shard.mds",
        "/etc/passwd",
        "a//b",
        "a/",
        "./a",
        ".hidden",
        "a/.locks",
        "..",
        "",
        "~root",
        "a\\b",
        "a\0b",
        "a b",
        "a\nb",
        "a%2fb",
        "．．/x",  # noqa: RUF001 - dots that are not dots
        "ａ.mds",  # noqa: RUF001
        "x" * 300,
        "a/b/c/d/e/f",
        "index.json",
        "INDEX.json",
        None,
        7,
        ["a"],
    ],
)
def test_names_are_confined(name: object) -> None:
    with pytest.raises(InvalidIndexError, match=r"in shard 1, the file name .* plain name"):
        parse_index(index(SHARD, changed(raw_data__basename=name)), prefix="p")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ([], "not an object"),
        (changed(format="csv"), "format is 'csv'"),
        (changed(version=3), "not MDS of version 2"),
        (changed(compression="zstd"), "compression 'zstd'"),
        (changed(zip_data={"basename": "x"}), "compression"),
        (changed(raw_data=None), "no raw_data"),
        (changed(samples=-1), "samples is '-1'"),
        (changed(samples=2**40), "samples is"),
        (changed(samples=True), "samples is 'True'"),
        (changed(samples="7"), "samples is"),
        (changed(samples=7.0), "samples is"),
        (changed(raw_data__bytes=2**32), "bytes is"),
        (changed(raw_data__bytes=-5), "bytes is"),
        (changed(raw_data__bytes=None), "bytes is"),
        (changed(raw_data__bytes=20), "20 bytes cannot hold 7 samples"),
        (changed(raw_data__hashes={}), "no usable hash"),
        (changed(raw_data__hashes=None), "no hashes"),
        (changed(raw_data__hashes={"crc32": "00000000"}), r"no usable hash \(found \['crc32'\]"),
        (changed(raw_data__hashes={"sha256": "not hexadecimal"}), "no usable hash"),
        (changed(raw_data__hashes={"sha256": 5}), "no usable hash"),
        (changed(column_names=None), "columns are not listed"),
        (changed(column_names=[]), "columns are not listed"),
        (changed(column_sizes=[None]), "differ in length"),
        (columns(IMAGE, LABEL, ("extra", "pkl", None)), "unknown encoding 'pkl'"),
        (columns(IMAGE, LABEL, ("extra", "json", None)), "unknown encoding 'json'"),
        (columns(IMAGE, LABEL, (5, "int", 8)), "not text"),
        (columns(IMAGE, LABEL, ("extra", "int", 4)), "wrong size 4"),
        (columns(IMAGE, LABEL, ("extra", "bytes", 10**9)), "wrong size"),
        (columns(IMAGE, LABEL, IMAGE), "twice"),
        (columns(IMAGE), "no column 'label'"),
        (columns(LABEL), "must be one column 'image' of"),
        (columns(IMAGE, ("label", "str", None)), "no column 'label' of integers"),
        (columns(("image", "int", 8), LABEL), "must be one column 'image' of"),
        (columns(IMAGE, MOMENTS, LABEL), "'moments' of latents, and not both"),
        (columns(("moments", MOMENTS[1], 8), LABEL), "wrong size 8"),
        (columns(("moments", "ndarray:float16:2,2,4,8,9", 4608), LABEL), "unknown encoding"),
        (
            columns(("moments", "ndarray:float16", None), LABEL),
            "unknown encoding 'ndarray:float16'",
        ),
    ],
)
def test_shards_are_checked(entry: object, problem: str) -> None:
    with pytest.raises(InvalidIndexError, match=problem) as raised:
        parse_index(index(entry), prefix="s3://bucket/data")
    message = str(raised.value)
    assert message.startswith("s3://bucket/data/index.json cannot be used: in shard 0, ")
    assert "pipelines.ingest" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"version": 2, "shards": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[]", "version 2"),
        (b'"text"', "version 2"),
        (index(SHARD, version=1), "version 2"),
        (b'{"version": 2}', "not a list"),
        (b'{"version": 2, "shards": {}}', "not a list"),
        (index(SHARD, SHARD), "'shard.00000.mds' is used twice"),
        (index(SHARD, changed(raw_data__basename="SHARD.00000.mds")), "used twice"),
    ],
)
def test_other_files_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(InvalidIndexError, match=problem):
        parse_index(content, prefix="p")


@pytest.mark.parametrize("content", [index(), index(changed(samples=0))])
def test_empty_datasets_are_refused(content: bytes) -> None:
    with pytest.raises(EmptyDatasetError, match="holds no samples"):
        parse_index(content, prefix="p")


def test_empty_shards_are_passed_over() -> None:
    empty = changed(samples=0, raw_data__basename="empty.mds")
    (shard,) = parse_index(index(empty, SHARD), prefix="p")
    assert shard.name == "shard.00000.mds"
