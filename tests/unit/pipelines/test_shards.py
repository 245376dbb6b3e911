"""Reading shards, and all that can be wrong with them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.domains import SettingError
from pipelines.errors import (
    CorruptShardError,
    EmptyDatasetError,
    InvalidIndexError,
    MissingDatasetError,
    MissingShardError,
)
from pipelines.ingest.write import LabelledImage
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.unit.pipelines.stored import cached, expected, flip, read_all, shards_in


def test_samples_come_back_as_written(prefix: Path, images: list[LabelledImage]) -> None:
    dataset = ShardedDataset(f"{prefix}/")
    assert len(dataset) == len(images)
    assert sum(dataset.shard_sizes) == len(images)
    assert len(dataset.shard_sizes) > 3
    assert read_all(dataset) == expected(images)
    assert dataset.shard_of(0) == "shard.00000.mds"
    assert dataset.shard_of(dataset.shard_sizes[0]) == "shard.00001.mds"
    assert re.fullmatch("[0-9a-f]{64}", dataset.digest)


def test_datasets_of_others_are_read(tmp_path: Path, images: list[LabelledImage]) -> None:
    from streaming.base.format.mds import MDSWriter

    columns = {"label": "uint16", "image": "bytes", "name": "str", "weight": "float32"}
    folder = tmp_path / "other"
    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"]) as writer:
        for image in images:
            sample = {"image": image.data, "label": np.uint16(image.label), "name": "é"}
            writer.write(sample | {"weight": np.float32(1)})
    assert read_all(ShardedDataset(str(folder))) == expected(images)


@pytest.mark.parametrize("sample_id", [-1, 48])
def test_samples_that_are_not_there(prefix: Path, sample_id: int) -> None:
    with pytest.raises(IndexError, match=f"no sample {sample_id}; the dataset holds 48"):
        ShardedDataset(str(prefix)).read(sample_id)


def test_no_dataset(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingDatasetError, match=r"no index\.json.*ingest"):
            ShardedDataset(str(missing))


def test_an_empty_dataset(prefix: Path) -> None:
    (prefix / "index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(EmptyDatasetError):
        ShardedDataset(str(prefix))


def test_a_hostile_index_touches_nothing(prefix: Path, tmp_path: Path) -> None:
    index = json.loads((prefix / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../escaped.mds"
    shutil.copy(shards_in(prefix)[0], prefix.parent / "escaped.mds")
    (prefix / "index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidIndexError, match="escaped"):
        cached(prefix, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("through_cache", [False, True])
def test_a_missing_shard(prefix: Path, tmp_path: Path, through_cache: bool) -> None:
    shards_in(prefix)[1].unlink()
    dataset = cached(prefix, tmp_path / "c") if through_cache else ShardedDataset(str(prefix))
    dataset.read(0)
    with pytest.raises(MissingShardError, match=r"shard\.00001\.mds .*is not there"):
        dataset.read(dataset.shard_sizes[0])


@pytest.mark.parametrize("through_cache", [False, True])
def test_a_corrupt_shard(prefix: Path, tmp_path: Path, through_cache: bool) -> None:
    flip(shards_in(prefix)[0])
    dataset = cached(prefix, tmp_path / "c") if through_cache else ShardedDataset(str(prefix))
    for _ in range(2):  # asking again does not get it past the check
        with pytest.raises(CorruptShardError, match=r"shard\.00000\.mds .*sha256") as raised:
            dataset.read(0)
    assert ("second time" in str(raised.value)) == through_cache
    assert shards_in(prefix)[0].exists()  # the original is never deleted
    if through_cache:
        assert not shards_in(tmp_path / "c")


def test_a_shard_of_another_length(prefix: Path) -> None:
    shard = shards_in(prefix)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match=r"is \d+ bytes long instead of \d+"):
        ShardedDataset(str(prefix)).read(0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_shard_whose_table_lies(prefix: Path, count: int) -> None:
    """The hash is right: whoever wrote the shard wrote the index too."""
    import hashlib

    shard = shards_in(prefix)[0]
    content = bytearray(shard.read_bytes())
    content[4 * count : 4 * count + 4] = (2**32 - 1).to_bytes(4, "little")
    shard.write_bytes(content)
    index = json.loads((prefix / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"]["sha256"] = hashlib.sha256(content).hexdigest()
    (prefix / "index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptShardError, match="table of samples"):
        ShardedDataset(str(prefix)).read(0)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="download_threads=0 must be at least 1"):
        ShardsConfig(download_threads=0)
