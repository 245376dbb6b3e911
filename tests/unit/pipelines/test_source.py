"""Fetching files: what is tried again and for how long, and what is not."""

import logging
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from pipelines.domains import SettingError
from pipelines.errors import (
    CacheUnusableError,
    DataError,
    OversizedDocumentError,
    StoreUnreachableError,
)
from pipelines.ingest.__main__ import main
from pipelines.source import Source, SourceConfig
from tests.support.clock import Clock
from tests.support.s3_server import S3Server


class Failing:
    """A downloader whose store fails with the given errors, one for each call, then works."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def download(self, url: str, path: str, timeout: float) -> None:
        if self.errors:
            Path(path).write_bytes(b"half")  # what a broken transfer may leave
            raise self.errors.pop(0)
        Path(path).write_bytes(b"whole")

    def clean_up(self) -> None:
        pass


def answer(code: str, status: int) -> Exception:
    """An error of the shape that botocore raises."""
    error = Exception(f"An error occurred ({code})")
    metadata = {"HTTPStatusCode": status}
    error.response = {"Error": {"Code": code}, "ResponseMetadata": metadata}  # type: ignore
    return error


def source_of(errors: list[Exception], **config: Any) -> Source:
    source = Source("file:///store", config=SourceConfig(**config))
    source._downloaders.own = Failing(errors)
    return source


def test_a_flaky_store_is_asked_again(
    tmp_path: Path, source_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of([ConnectionError("reset"), TimeoutError("slow"), answer("503", 503)])
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        source.fetch("shard", tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == b"whole"
    assert source_clock.waits == pytest.approx([1, 2, 4], abs=0.5)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "/store/shard" in lines[2]
    assert "attempt 3" in lines[2]
    assert "503" in lines[2]


def test_a_store_that_comes_back_after_a_minute_is_waited_for(
    tmp_path: Path, source_clock: Clock
) -> None:
    """And after almost two; one that has gone for good is an error within three."""
    pauses = [1, 2, 4, 8, 16, 16, 16, 16, 16, 16, 16]
    tries_s = [0, *accumulate(pauses)]
    assert tries_s[-2] < 120 < tries_s[-1]
    tries = len(tries_s)
    away = [ConnectionError("refused")] * (tries - 2)  # 95 s of refusals, jitter apart
    source_of(away).fetch("shard", tmp_path / "shard")
    assert source_clock.waits == pytest.approx(pauses[: tries - 2], abs=0.5)
    source_clock.waits.clear()
    with pytest.raises(StoreUnreachableError, match=r"in 1\d\d s .*refused.*S3_ENDPOINT_URL"):
        source_of([ConnectionError("refused")] * 100).fetch("shard", tmp_path / "other")
    assert 120 <= sum(source_clock.waits) < 150
    assert not (tmp_path / "other").exists()


def test_time_spent_in_tries_counts(tmp_path: Path, source_clock: Clock) -> None:
    """A silent store is given up as soon as one that refuses, though a try of it takes a minute."""
    source = source_of([])

    def silent(url: str, path: str, timeout: float) -> None:
        source_clock.now_s += 60
        raise TimeoutError("nothing came")

    source._downloaders.own.download = silent
    with pytest.raises(StoreUnreachableError, match="nothing came"):
        source.fetch("shard", tmp_path / "shard")
    assert 120 <= source_clock.now_s - 1000 < 185
    assert len(source_clock.waits) >= 1


def test_a_slow_transfer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    monkeypatch.setattr("pipelines.cache._SLOW_S", 0.01)
    told = threading.Event()
    caplog.handler.addFilter(lambda record: told.set() or True)
    source = source_of([])
    source._downloaders.own.download = lambda url, path, timeout: told.wait()
    source.fetch("shard", tmp_path / "shard")
    assert [record.getMessage() for record in caplog.records] == [
        "still fetching /store/shard after 0 s"
    ]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (answer("403", 403), StoreUnreachableError, "refused to give .*credentials"),
        (answer("ExpiredToken", 401), StoreUnreachableError, "refused to give .*ExpiredToken"),
        (answer("RequestTimeTooSkewed", 403), StoreUnreachableError, "refused .*TimeTooSkewed"),
        (answer("NoSuchKey", 404), FileNotFoundError, "/store/shard"),
        (OSError(28, "No space left on device"), CacheUnusableError, "Free some space"),
        (OSError(27, "File too large"), CacheUnusableError, "File too large.*cache_dir"),
    ],
)
def test_failures_that_time_does_not_heal(
    tmp_path: Path, source_clock: Clock, error: Exception, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        source_of([error]).fetch("shard", tmp_path / "shard")
    assert not source_clock.waits
    assert not (tmp_path / "shard").exists()


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("ftp://host/data", "cannot be read from 'ftp://host/data'"),
        ("s3://key:hunter2@bucket/data", "must not carry a user name or password"),
        ("s3://hunter2:key/data", "must not carry a user name or password"),
        ("s3://bucket/data?token=hunter2", "The place 's3://…' cannot be used"),
        ("http:/host/data?token=hunter2", "The place 'http:/…' is not written as a URL"),
        ("https://host/data#hunter2", "The place 'https://…' cannot be used"),
        ("ray:user:hunter2@host:9", "The place 'ray:…' looks like a URL with credentials"),
        ("s3:///key:hunter2@bucket/data", "The place 's3:///…' is not written as a URL"),
    ],
)
def test_urls_that_are_not_read(prefix: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        Source(prefix, config=SourceConfig())
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        *[
            (text, "Begin it with s3://")
            for text in (
                "s3:/bucket/x",
                "s3:bucket/x",
                "S3://bucket/x",
                "s3:///bucket/x",
                " s3://b/x",
            )
        ],
        ("file:/data/x", "Begin it with file:///"),
        ("file://data/x", "Begin it with file:///"),
        ("gs:/bucket/x", "Begin it with gs://"),
        ("s3:/key:hunter2@bucket", r"The place 's3:/…' is not .*Begin it with s3://"),
        *[
            (f"s3://bucket/{path}", "libraries read it differently")
            for path in ("a#b", "a?b", "a\nb", "a\tb", "a//b", "a/../b", "./a", "a ", "a\x7f")
        ],
        ("s3://", "libraries read it differently"),
        ("http://host/data", "cannot be read from 'http://host/data'"),
    ],
)
def test_what_is_no_url_is_no_folder_either(prefix: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        Source(prefix, config=SourceConfig())
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://key:hunter2@host:9000",
        "http://host/?token=hunter2",
        "s3:/key:hunter2@x",
        "http://[1",
    ],
)
def test_an_endpoint_that_may_carry_credentials_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", url)
    with pytest.raises(DataError, match=r"The S3 endpoint .*S3_ENDPOINT_URL") as raised:
        Source("s3://bucket/data")
    assert "hunter2" not in str(raised.value)
    assert Source("/data").is_local


@pytest.mark.parametrize("prefix", ["a#b", "run:1/x", "/data/s3:/x", "./s3:/x", "c:/x", "ü b?"])
def test_folders_may_have_any_name(prefix: str) -> None:
    assert Source(prefix, config=SourceConfig()).is_local


@pytest.mark.parametrize("target", ["s3:/bucket/x", "s3://bucket/a#b", "S3://bucket/x"])
def test_nothing_is_listed_or_written_for_a_mistyped_target(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["image-folder", "none", target], ["digits", target], ["verify", target]):
        assert main(command) == 2
        assert target in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"download_patience_s": -1.0}, {"download_timeout_s": 0.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="{}={} must be".format(*next(iter(wrong.items())))):
        SourceConfig(**wrong)


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless"])
@pytest.mark.parametrize("prefix", ["{}", "file://{}"])
def test_what_is_no_file_is_not_read(
    kind: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "index.json"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/zero")
    assert main(["verify", prefix.format(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "index.json" in line


@pytest.mark.parametrize("name", ["index.json", "ingest.json", "latents.json"])
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_of_a_document_that_is_too_long_nothing_is_fetched(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    monkeypatch.setattr("pipelines.source.MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.endpoint_url)
    prefix = f"file://{tmp_path}"
    (tmp_path / name).write_bytes(bytes(1001))
    if kind == "s3":
        prefix = s3.make_bucket(f"long-{name.partition('.')[0]}")
        s3.client.upload_file(str(tmp_path / name), prefix.removeprefix("s3://"), name)
    source = Source(prefix, config=SourceConfig())

    def fetched(*_: object) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr(source._downloaders.own, "download", fetched)
    with pytest.raises(OversizedDocumentError, match=r"has 1001 bytes, more than 1000\. Restore"):
        source.read(name)
