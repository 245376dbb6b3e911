"""Batches: the right samples on each rank, the same bits after a resume, bad images replaced."""

import logging
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.augment import AugmentConfig
from pipelines.dataset import RawSample, SampleDataset
from pipelines.decode.contract import DecodeConfig
from pipelines.domains import SettingError
from pipelines.errors import (
    BadDataError,
    DataError,
    EmptyDatasetError,
    IndivisibleBatchError,
    LabelOutOfRangeError,
)
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Batch, Cursor, Loader
from pipelines.order import SampleOrder, replacement
from pipelines.shards import ShardedDataset
from tests.support.synthetic import SyntheticImages

BATCH, IMAGES = 12, 40


class Damaged:
    """A dataset some of whose images are cut short."""

    def __init__(self, bad: set[int], *, images: int = IMAGES) -> None:
        self._whole = SyntheticImages(images=images, image_size=8, shard_images=10)
        self.bad = bad

    @property
    def shard_sizes(self) -> Sequence[int]:
        return self._whole.shard_sizes

    def __len__(self) -> int:
        return len(self._whole)

    def prepare(self, sample_ids: NDArray[np.int64]) -> None:
        self._whole.prepare(sample_ids)

    def shard_of(self, sample_id: int) -> str:
        return self._whole.shard_of(sample_id)

    def read(self, sample_id: int) -> RawSample:
        sample = self._whole.read(sample_id)
        if sample_id not in self.bad:
            return sample
        return RawSample(sample.data[:60], sample.label, sample_id)


AUGMENTED = AugmentConfig(flip=True, crop="random_resized")


def loader(dataset: SampleDataset | None = None, **changes: Any) -> Loader:
    config = LoaderConfig(
        decoder=changes.pop("decoder", "dali"),
        max_bad_fraction=changes.pop("max_bad_fraction", 0.001),
        prefetch_batches=changes.pop("prefetch_batches", 2),
        shuffle_block_samples=changes.pop("shuffle_block_samples", 25),
    )
    augment = changes.pop("augment", AugmentConfig())
    arguments: dict[str, Any] = {"seed": 3, "batch_images": BATCH} | changes
    return Loader(
        dataset or SyntheticImages(images=IMAGES, image_size=8, shard_images=10),
        config=config,
        decode=DecodeConfig(
            image_size=8,
            channels=3,
            scales=3,
            decode_threads=1,
            augment=augment,
        ),
        **arguments,
    )


def take(count: int, source: Loader, start: int = 0) -> list[tuple[Batch, Cursor]]:
    with source:
        return list(islice(source.batches(Cursor(start)), count))


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.sample_ids, other.sample_ids)
    assert torch.equal(one.labels, other.labels)
    for band, twin in zip(one.bands, other.bands, strict=True):
        assert torch.equal(band, twin)


def test_a_batch_holds_what_the_order_says() -> None:
    dataset = SyntheticImages(images=IMAGES, image_size=8, shard_images=10)
    (batch, cursor), *_ = take(1, loader(dataset), 36)
    order = SampleOrder(dataset.shard_sizes, seed=3, block_samples=25)
    assert batch.sample_ids.tolist() == order.turns(36, BATCH).sample_ids.tolist()
    assert batch.labels.tolist() == [number % 10 for number in batch.sample_ids.tolist()]
    assert [tuple(band.shape) for band in batch.bands] == [
        (BATCH, 3, size, size) for size in (2, 4, 8)
    ]
    assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert (batch.skipped, cursor) == (0, Cursor(48))


@pytest.mark.parametrize("augment", [AugmentConfig(), AUGMENTED])
@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_resuming_gives_the_same_bits(decoder: str, augment: AugmentConfig) -> None:
    whole = take(9, loader(decoder=decoder, augment=augment))
    for done in (1, 4, 8):
        cursor = whole[done - 1][1]
        again = loader(decoder=decoder, augment=augment, prefetch_batches=5)
        resumed = take(9 - done, again, cursor.images)
        for (batch, after), (expected, expected_after) in zip(resumed, whole[done:], strict=True):
            assert_same(batch, expected)
            assert after == expected_after


def test_views_vary_with_the_epoch_and_the_seed_alone() -> None:
    """Each sample is shown in its own way in each epoch, the same in every run."""

    def seen(**changes: Any) -> dict[tuple[int, int], torch.Tensor]:
        images: dict[tuple[int, int], torch.Tensor] = {}
        place = 0
        for batch, _ in take(2 * IMAGES // BATCH, loader(augment=AUGMENTED, **changes)):
            for sample_id, image in zip(batch.sample_ids.tolist(), batch.bands[-1], strict=True):
                images[place // IMAGES, sample_id] = image
                place += 1
        return images

    first, again = seen(), seen(shuffle_block_samples=1000)
    both = first.keys() & again.keys()
    assert len(both) >= IMAGES
    assert all(torch.equal(first[key], again[key]) for key in both)
    pairs = [(first[0, i], first[1, i]) for i in range(IMAGES) if (1, i) in first]
    assert sum(not torch.equal(*pair) for pair in pairs) > 0.9 * len(pairs)
    other = seen(seed=4)
    assert sum(not torch.equal(first[key], other[key]) for key in both & other.keys()) > 50


@pytest.mark.parametrize("augment", [AugmentConfig(), AUGMENTED])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch(world: int, augment: AugmentConfig) -> None:
    options: dict[str, Any] = {"max_bad_fraction": 0.5, "augment": augment}
    whole = take(5, loader(Damaged({3, 30}), **options))
    ranks = [
        take(5, loader(Damaged({3, 30}), rank=rank, world_size=world, **options))
        for rank in range(world)
    ]
    for (batch, cursor), *slices in zip(whole, *ranks, strict=True):
        parts = [part for part, _ in slices]
        joined = Batch(
            bands=tuple(torch.cat(bands) for bands in zip(*(p.bands for p in parts), strict=True)),
            labels=torch.cat([part.labels for part in parts]),
            sample_ids=torch.cat([part.sample_ids for part in parts]),
            skipped=sum(part.skipped for part in parts),
        )
        assert_same(joined, batch)
        assert joined.skipped == batch.skipped
        assert {part_cursor for _, part_cursor in slices} == {cursor}


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_bad_images_are_replaced_counted_and_logged(
    decoder: str, caplog: pytest.LogCaptureFixture
) -> None:
    clean = take(10, loader(Damaged(set()), decoder=decoder))
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        batches = take(10, loader(Damaged({7, 22}), decoder=decoder, max_bad_fraction=0.01))
    skipped = 0
    for (batch, _), (expected, _) in zip(batches, clean, strict=True):
        for place, sample_id in enumerate(expected.sample_ids.tolist()):
            bad = sample_id in (7, 22)
            skipped += bad
            kept = replacement(sample_id, attempt=0, samples=IMAGES) if bad else sample_id
            assert batch.sample_ids[place] == kept
            assert batch.labels[place] == kept % 10
    assert sum(batch.skipped for batch, _ in batches) == skipped == 6  # three epochs
    lines = [record.getMessage() for record in caplog.records]
    assert any("sample 7 in shard synthetic.00000" in line for line in lines)
    assert any("sample 22 in shard synthetic.00002" in line for line in lines)


def test_a_bad_replacement_is_replaced_too() -> None:
    second = replacement(7, attempt=0, samples=IMAGES)
    batches = take(4, loader(Damaged({7, second}), max_bad_fraction=0.5))
    ids = torch.cat([batch.sample_ids for batch, _ in batches]).tolist()
    assert 7 not in ids
    assert second not in ids
    assert replacement(7, attempt=1, samples=IMAGES) in ids


def test_too_many_bad_images_stop_the_run() -> None:
    with pytest.raises(
        BadDataError,
        match=r"11 of \d+ samples .*max_bad_fraction=0.001.*sample \d+ in shard synthetic\.0000\d",
    ):
        take(100, loader(Damaged(set(range(0, IMAGES, 2)))))
    # Eight samples after it cannot stand in for one either.
    with pytest.raises(BadDataError, match=r"9 of \d+ samples .*sample \d+ in shard synthetic"):
        take(100, loader(Damaged(set(range(IMAGES)))))
    with pytest.raises(BadDataError, match=r"1 of \d+ samples.*max_bad_fraction=0.0 .*sample 5 in"):
        take(100, loader(Damaged({5}), max_bad_fraction=0.0))


def test_a_dataset_without_one_good_image_does_not_hang() -> None:
    with pytest.raises(BadDataError):
        take(1, loader(Damaged({0}, images=1), max_bad_fraction=0.9))


def test_problems_in_the_thread_reach_the_consumer(prefix: Path) -> None:
    for shard in prefix.glob("*.mds"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BadDataError, match=r"shard\.0000\d\.mds .* bytes long instead of"):
        take(100, loader(ShardedDataset(str(prefix))))
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("damage", ["missing", "cut short", "other bytes"])
def test_samples_of_a_lost_shard_are_counted_and_replaced(
    prefix: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard = prefix / "shard.00001.mds"
    content = shard.read_bytes()
    lost = set(range(6, 12))
    if damage == "missing":
        shard.unlink()
    elif damage == "cut short":
        shard.write_bytes(content[:-1])
    else:
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    batches = take(4, loader(ShardedDataset(str(prefix))))
    ids = torch.cat([batch.sample_ids for batch, _ in batches])
    assert len(ids) == 48
    assert not lost & set(ids.tolist())
    assert set(range(48)) - lost <= set(ids.tolist())
    assert sum(batch.skipped for batch, _ in batches) == len(lost)
    assert "shard.00001.mds" in caplog.text
    with pytest.raises(BadDataError, match=r"sample (6|7|8|9|10|11) in shard shard\.00001\.mds"):
        take(4, loader(ShardedDataset(str(prefix)), max_bad_fraction=0.0))


def test_real_shards_are_loaded(pristine: Path) -> None:
    batches = take(4, loader(ShardedDataset(str(pristine))))
    ids = torch.cat([batch.sample_ids for batch, _ in batches])
    assert sorted(ids.tolist()) == list(range(48))


def test_only_one_thread_at_a_time() -> None:
    source = loader()
    first = source.batches(Cursor())
    next(first)
    second = source.batches(Cursor(BATCH))
    next(second)
    assert next(first, None) is None  # closed by the second
    next(second)
    source.close()
    source.close()
    assert next(second, None) is None
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert source.data_wait_s > 0


def test_labels_are_checked_against_the_classes() -> None:
    take(2, loader(classes=10))
    with pytest.raises(LabelOutOfRangeError, match=r"has the label \d.* 3 classes, 0 to 2"):
        take(2, loader(classes=3))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(IndivisibleBatchError, match=r"12 images .*5 ranks.*for example 15"):
        loader(world_size=5)
    with pytest.raises(IndivisibleBatchError, match="batch of 0"):
        loader(batch_images=0)
    with pytest.raises(DataError, match="from 0 to 1, got 2"):
        loader(world_size=2, rank=2)
    with pytest.raises(EmptyDatasetError):
        SyntheticImages(images=0, image_size=8)
    with pytest.raises(ValueError, match="got -1"):
        Cursor(-1)
    for wrong in ({"prefetch_batches": 0}, {"max_bad_fraction": 1.0}, {"max_bad_fraction": -0.1}):
        with pytest.raises(SettingError, match=f"{next(iter(wrong))}=.* must be"):
            LoaderConfig(**wrong)  # type: ignore[arg-type]


def test_synthetic_images_are_a_function_of_their_arguments() -> None:
    arguments = {"images": 25, "image_size": 6, "classes": 4, "shard_images": 10}
    one, other = (SyntheticImages(**arguments, seed=seed, channels=1) for seed in (0, 0))
    assert [one.read(n) for n in range(25)] == [other.read(n) for n in range(25)]
    assert one.read(1) != SyntheticImages(**arguments, seed=1, channels=1).read(1)
    assert one.shard_sizes == [10, 10, 5]
    assert one.shard_of(24) == "synthetic.00002"
    assert one.read(7).label == 3
    with pytest.raises(IndexError, match="no sample 25"):
        one.read(25)


class StoreAway(SyntheticImages):
    """Images from a store that does not answer any more after the first few shards."""

    def __init__(self) -> None:
        super().__init__(images=IMAGES, image_size=8, shard_images=10)
        self.asked = 0
        self.back = threading.Event()

    def prepare(self, sample_ids: NDArray[np.int64]) -> None:
        self.asked += 1
        if self.asked > 2:
            self.back.wait()


def test_closing_waits_for_nobody_but_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is told to stop writes its last checkpoint after that."""
    monkeypatch.setattr("pipelines.loading.loader._JOIN_S", 1.0)
    waits_in_vain = []
    join = threading.Thread.join

    def watched(thread: threading.Thread, timeout: float | None = None) -> None:
        join(thread, timeout)
        if thread.is_alive():
            waits_in_vain.append(thread.name)

    monkeypatch.setattr(threading.Thread, "join", watched)
    dataset = StoreAway()
    batches = loader(dataset).batches(Cursor())
    next(batches)
    while dataset.asked < 3:
        time.sleep(0.01)
    batches.close()  # type: ignore[attr-defined]
    assert len(waits_in_vain) == 1  # and not one for each of three threads
    dataset.back.set()
