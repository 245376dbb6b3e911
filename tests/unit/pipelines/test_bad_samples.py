"""Every kind of damage to real shards, all at once: counted, skipped, and at last too much."""

import logging
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import DecoderName
from pipelines.errors import BadDataError
from pipelines.index import parse_index
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Cursor, Loader
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.unit.pipelines import pictures

SAMPLES = 60
JUDGED = 10_000  # a share is that of so many samples at least


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, dict[int, str]]:
    """A dataset, and those of its samples that cannot be used with the shard of each."""
    photo = pictures.jpeg(24, 24)
    broken = {7: photo[: len(photo) // 2], 20: b"<html><body>404</body></html>", 21: b""}
    images = [
        LabelledImage(broken.get(number, pictures.png(8, 8, seed=number)), number % 5)
        for number in range(SAMPLES)
    ]
    folder = tmp_path / "dataset"
    write_dataset(images, str(folder), shard_bytes=2000)
    shards = parse_index((folder / "index.json").read_bytes(), prefix="")
    names = [shard.name for shard in shards for _ in range(shard.samples)]
    *_, missing, short, flipped = (shard.name for shard in shards)
    (folder / missing).unlink()
    (folder / short).write_bytes((folder / short).read_bytes()[:-1])
    content = bytearray((folder / flipped).read_bytes())
    content[-1] ^= 1
    (folder / flipped).write_bytes(content)
    lost = {number for number, name in enumerate(names) if name in (missing, short, flipped)}
    assert not lost & broken.keys()
    assert len(lost) >= 6
    return folder, {number: names[number] for number in sorted(lost | broken.keys())}


def loader(prefix: str, cache: Path, *, decoder: DecoderName, max_bad_fraction: float) -> Loader:
    return Loader(
        ShardedDataset(prefix, config=ShardsConfig(cache_dir=str(cache))),
        config=LoaderConfig(
            decoder=decoder, max_bad_fraction=max_bad_fraction, shuffle_block_samples=SAMPLES
        ),
        decode=DecodeConfig(image_size=8),
        seed=3,
        batch_images=SAMPLES // 5,
    )


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
@pytest.mark.parametrize("through_cache", [False, True])
def test_all_are_counted_once_an_epoch_and_replaced(
    damaged: tuple[Path, dict[int, str]],
    decoder: DecoderName,
    through_cache: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, unusable = damaged
    prefix = f"file://{folder}" if through_cache else str(folder)
    source = loader(prefix, tmp_path / "cache", decoder=decoder, max_bad_fraction=0.5)
    with caplog.at_level(logging.WARNING, logger="pipelines"), source:
        batches = [batch for batch, _ in islice(source.batches(Cursor()), 5)]
    assert sum(batch.skipped for batch in batches) == len(unusable)
    ids = Counter(torch.cat([batch.sample_ids for batch in batches]).tolist())
    assert ids.keys() == set(range(SAMPLES)) - unusable.keys()
    assert ids.total() == SAMPLES
    told = [re.search(r"skipping sample (\d+) in shard (\S+),", line) for line in messages(caplog)]
    assert {(int(match[1]), match[2]) for match in told if match} == set(unusable.items())


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
@pytest.mark.parametrize("tolerated", [0, 1, 6, 20])
def test_one_more_than_allowed_stops_the_run_and_is_named(
    damaged: tuple[Path, dict[int, str]], decoder: DecoderName, tolerated: int, tmp_path: Path
) -> None:
    folder, unusable = damaged
    share = tolerated / JUDGED
    source = loader(str(folder), tmp_path, decoder=decoder, max_bad_fraction=share)
    with source, pytest.raises(BadDataError) as raised:
        list(islice(source.batches(Cursor()), 100))
    message = str(raised.value)
    assert re.match(rf"{tolerated + 1} of \d+ samples read cannot be used, more than", message)
    assert f"max_bad_fraction={share} allows" in message
    named = re.search(r"The last one is sample (\d+) in shard (\S+) \(", message)
    assert named
    assert unusable[int(named[1])] == named[2]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]
