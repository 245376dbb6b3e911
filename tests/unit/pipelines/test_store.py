"""The same, from a real S3 server."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.decode.contract import DecodeConfig
from pipelines.errors import (
    CorruptShardError,
    MissingDatasetError,
    MissingShardError,
    OccupiedPrefixError,
    StoreUnreachableError,
)
from pipelines.ingest.__main__ import main
from pipelines.ingest.target import has_dataset
from pipelines.ingest.verify import verify
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Cursor, Loader
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.clock import Clock
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.make_bucket("images")


def keys(s3: S3Server, prefix: str) -> list[str]:
    listing = s3.client.list_objects_v2(Bucket="images", Prefix=prefix)
    return [entry["Key"] for entry in listing.get("Contents", [])]


def config(cache: Path) -> ShardsConfig:
    return ShardsConfig(cache_dir=str(cache), download_patience_s=1, download_timeout_s=5)


def test_round_trip(
    s3: S3Server, bucket: str, tmp_path: Path, pristine: Path, images: list[LabelledImage]
) -> None:
    prefix = f"{bucket}/round/train"
    assert not has_dataset(prefix)
    write_dataset(images, prefix, shard_bytes=2000)
    assert has_dataset(prefix)
    remote = ShardedDataset(prefix, config=config(tmp_path))
    local = ShardedDataset(str(pristine))
    assert remote.digest == local.digest
    batches = []
    for dataset in (remote, local):
        with Loader(
            dataset,
            config=LoaderConfig(),
            decode=DecodeConfig(image_size=8),
            seed=0,
            batch_images=48,
        ) as loader:
            batches.append(next(loader.batches(Cursor()))[0])
    for one, other in zip(batches[0].bands, batches[1].bands, strict=True):
        assert torch.equal(one, other)
    write_dataset(images, prefix, shard_bytes=2000)  # the same again
    with pytest.raises(OccupiedPrefixError):
        write_dataset(images[:9], prefix, shard_bytes=2000)


def test_an_interrupted_upload_is_no_dataset(
    s3: S3Server, bucket: str, images: list[LabelledImage]
) -> None:
    def broken() -> object:
        yield from images[:30]
        raise OSError("the source went away")

    prefix = f"{bucket}/broken/train"
    with pytest.raises(OSError, match="went away"):
        write_dataset(broken(), prefix, shard_bytes=2000)  # type: ignore[arg-type]
    assert keys(s3, "broken/")
    assert not has_dataset(prefix)
    write_dataset(images, prefix, shard_bytes=2000)
    assert has_dataset(prefix)


def test_damage_in_the_store(
    s3: S3Server, bucket: str, tmp_path: Path, images: list[LabelledImage]
) -> None:
    prefix = f"{bucket}/damaged"
    write_dataset(images, prefix, shard_bytes=2000)
    s3.client.put_object(Bucket="images", Key="damaged/shard.00000.mds", Body=b"junk")
    s3.client.delete_object(Bucket="images", Key="damaged/shard.00001.mds")
    dataset = ShardedDataset(prefix, config=config(tmp_path))
    with pytest.raises(CorruptShardError, match=r"shard\.00000\.mds .*second time"):
        dataset.read(0)
    with pytest.raises(MissingShardError, match=r"shard\.00001\.mds"):
        dataset.read(dataset.shard_sizes[0])
    assert dataset.read(len(dataset) - 1).data == images[-1].data


def test_mistakes_are_named(
    s3: S3Server,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source_clock: Clock,
) -> None:
    with pytest.raises(MissingDatasetError, match="no dataset at s3://images/nothing"):
        ShardedDataset(f"{bucket}/nothing", config=config(tmp_path))
    with pytest.raises(MissingDatasetError, match="s3://no-such-bucket/data"):
        ShardedDataset("s3://no-such-bucket/data", config=config(tmp_path))
    with pytest.raises(StoreUnreachableError, match="no-such-bucket"):
        write_dataset([LabelledImage(b"x", 0)], "s3://no-such-bucket/data")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreUnreachableError, match=r"refused to give .*credentials"):
        ShardedDataset(f"{bucket}/nothing", config=config(tmp_path))
    assert source_clock.waits == []  # none of these is mended by time
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnreachableError, match=r"attempts: 2.*127\.0\.0\.1:1"):
        ShardedDataset(f"{bucket}/nothing", config=config(tmp_path))


ODD = "a b/100%41/ü+€;c&d=e@f,g:h'(i)~*!$/s3:/t"


def test_any_other_character_names_the_same_object_when_written_and_read(
    s3: S3Server, bucket: str, tmp_path: Path, images: list[LabelledImage]
) -> None:
    prefix = f"{bucket}/{ODD}"
    write_dataset(images[:4], prefix, shard_bytes=2000)
    written = [key.removeprefix(f"{ODD}/") for key in keys(s3, ODD)]
    assert written == ["index.json", "shard.00000.mds"]
    dataset = ShardedDataset(prefix, config=config(tmp_path))
    assert [dataset.read(place).data for place in range(4)] == [image.data for image in images[:4]]
    assert verify(prefix).faults == []


def test_a_public_bucket_is_read_without_credentials(
    s3: S3Server,
    bucket: str,
    tmp_path: Path,
    images: list[LabelledImage],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Swift answers unsigned requests under its own address of the account."""
    for name, acl in (("public", "public-read"), ("private", "private")):
        write_dataset(images, f"{s3.make_bucket(name)}/set", shard_bytes=2000)
        s3.client.put_bucket_acl(Bucket=name, ACL=acl)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("S3_ENDPOINT_URL", f"{s3.endpoint_url}/v1/AUTH_test")
    with pytest.raises(StoreUnreachableError, match=r"shards\.anonymous=true"):
        ShardedDataset("s3://public/set", config=config(tmp_path))
    anonymous = replace(config(tmp_path), anonymous=True)
    dataset = ShardedDataset("s3://public/set", config=anonymous)
    assert dataset.read(len(dataset) - 1).data == images[-1].data
    with pytest.raises(StoreUnreachableError, match="refused to give"):
        ShardedDataset("s3://private/set", config=anonymous)
    assert main(["verify", "s3://public/set", "--anonymous", "--workers", "1"]) == 0
    assert "FINE" in capsys.readouterr().out
