"""latents.json is checked before it is used."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InvalidLatentRecordError, MissingLatentRecordError
from pipelines.latent_format import LatentFormat
from pipelines.latent_record import (
    RECORD_NAME,
    BandStatistics,
    LatentRecord,
    parse_latent_record,
    read_latent_record,
)

BAND = BandStatistics(mean=0.5, std=2.0)
RECORD = LatentRecord(
    autoencoder="zelaki/eq-vae",
    autoencoder_sha256="a" * 64,
    encode_precision="bf16",
    factor=8,
    channels=4,
    scale=0.18215,
    shift=-0.5,
    image_size=256,
    views=2,
    dtype="float16",
    source="s3://bucket/images/train",
    source_sha256="b" * 64,
    samples=97,
    skipped=(0, 5, 99),
    bands={1: (BAND,), 2: (BAND, BAND)},
)


def content(**changes: Any) -> bytes:
    return json.dumps({**RECORD.as_json(), **changes}).encode()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_bytes(content())
    assert read_latent_record(str(tmp_path)) == RECORD
    assert RECORD.format == LatentFormat(dtype="float16", views=2, channels=4, size=32)


def test_a_record_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingLatentRecordError, match=r"no latents\.json at .*one split"):
        read_latent_record(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 1"),
        ({"autoencoder": ""}, "autoencoder: Value error, it is no line of text, not ''"),
        ({"autoencoder": "two\nlines"}, "it is no line of text, not 'two"),
        ({"autoencoder_sha256": "A" * 64}, "autoencoder_sha256"),
        (
            {"encode_precision": "fp8"},
            "Input should be 'fp32' or 'bf16', not 'fp8'",
        ),
        ({"factor": 0}, "factor: Input should be greater than or equal to 1, not 0"),
        ({"factor": True}, "factor: Input should be a valid integer, not True"),
        ({"factor": 7}, "no multiple of factor=7"),
        ({"channels": 4.0}, "channels"),
        ({"scale": float("nan")}, "NaN is no finite number"),
        ({"shift": "0"}, "shift"),
        ({"views": True}, "views"),
        ({"views": 3}, "views"),
        ({"dtype": "float64"}, "dtype"),
        ({"source": 5}, "source"),
        ({"source_sha256": ""}, "source_sha256"),
        ({"samples": -1}, "samples"),
        ({"samples": 1 << 40}, "samples"),
        ({"skipped": "none"}, "skipped: Input should be a valid array"),
        ({"skipped": [1.0]}, "skipped.0: Input should be a valid integer"),
        ({"skipped": [5, 0]}, "ascend"),
        ({"skipped": [5, 5]}, "ascend"),
        ({"skipped": [-1]}, "ascend"),
        ({"skipped": [98]}, "ascend"),
        ({"bands": {}}, "bands"),
        ({"bands": {"2": [{"mean": 0, "std": 1}] * 2}}, "1 bands for 1 scales"),
        ({"bands": {"1": []}}, "1 bands for 1 scales"),
        ({"bands": {"1": [3]}}, "bands.1.0: Input should be an object, not 3"),
        ({"bands": {"1": [{"mean": 0}]}}, "std"),
        (
            {"bands": {"1": [{"mean": 0, "std": -1}]}},
            "bands.1.0.std: Input should be greater",
        ),
    ],
)
def test_records_that_cannot_be_trusted(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidLatentRecordError) as caught:
        parse_latent_record(content(**changes), prefix="here")
    message = str(caught.value)
    assert "here/latents.json cannot be used" in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"{}", b"null", b"[" * 100_000])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidLatentRecordError, match="cannot be used"):
        parse_latent_record(data, prefix="here")
