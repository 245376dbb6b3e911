"""Batches out of real shards: whatever the sizes, the ranks and the depths, the same samples.

Each example writes shards, reads them through a cache as if they were remote, and decodes them.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augment import AugmentConfig, SampleKey
from pipelines.dataset import SampleDataset
from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import DecoderName, make_decoder
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Batch, Cursor, Loader
from pipelines.order import ConcatenatedDataset, MixedOrder, SampleOrder
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.unit.pipelines import pictures

FEW = settings(max_examples=10, deadline=None)
SIZE = 8
SIDES = (8, 8, 9, 13)  # some need a resize, and some do not
CLASSES = 7
CUT, NO_IMAGE = pictures.jpeg(24, 24)[:400], b"<html><body>404 Not Found</body></html>"

DECODERS = st.sampled_from(("dali", "pillow"))
AUGMENTS = st.builds(
    AugmentConfig, flip=st.booleans(), crop=st.sampled_from(("center", "random_resized"))
)


@lru_cache
def picture(seed: int) -> bytes:
    side = SIDES[seed % len(SIDES)]
    return pictures.png(side, side + seed % 3, seed=seed)


@dataclass(frozen=True)
class Stored:
    """A dataset to be written: how many samples, where its shards end, which are no images."""

    samples: int
    shard_bytes: int
    bad: frozenset[int] = frozenset()

    def write(self, folder: Path, *, seed: int) -> None:
        images = (
            LabelledImage((CUT, NO_IMAGE)[n % 2] if n in self.bad else picture(seed + n), n % 7)
            for n in range(self.samples)
        )
        write_dataset(images, str(folder), shard_bytes=self.shard_bytes)


@dataclass(frozen=True)
class Depths:
    """What must not matter."""

    prefetch_batches: int = 2
    download_threads: int = 1
    decode_threads: int = 1


DEPTHS = st.builds(Depths, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that decides the batches of a run."""

    datasets: Sequence[Path]
    cache: Path
    batch_images: int
    weights: tuple[float, ...] = ()
    block_samples: int = 64
    decoder: DecoderName = "pillow"
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 3

    def decode(self, depths: Depths) -> DecodeConfig:
        return DecodeConfig(
            image_size=SIZE, scales=3, decode_threads=depths.decode_threads, augment=self.augment
        )

    def open(self, depths: Depths) -> SampleDataset:
        config = ShardsConfig(cache_dir=str(self.cache), download_threads=depths.download_threads)
        parts = [ShardedDataset(f"file://{folder}", config=config) for folder in self.datasets]
        return parts[0] if len(parts) == 1 else ConcatenatedDataset(parts)

    def order(self) -> MixedOrder | SampleOrder:
        sizes = [ShardedDataset(str(folder)).shard_sizes for folder in self.datasets]
        given: dict[str, Any] = {"seed": self.seed, "block_samples": self.block_samples}
        if self.weights:
            return MixedOrder(sizes, weights=self.weights, **given)
        return SampleOrder([size for stream in sizes for size in stream], **given)

    def batches(
        self, count: int, *, start: int = 0, world: int = 1, depths: Depths | None = None
    ) -> list[Batch]:
        """Read global batches: all slices of the ranks, put together."""
        depths = depths or Depths()
        ranks = []
        for rank in range(world):
            loader = Loader(
                self.open(depths),
                config=LoaderConfig(
                    decoder=self.decoder,
                    prefetch_batches=depths.prefetch_batches,
                    max_bad_fraction=0.9,
                    shuffle_block_samples=self.block_samples,
                ),
                decode=self.decode(depths),
                seed=self.seed,
                order=self.order() if self.weights else None,
                batch_images=self.batch_images,
                rank=rank,
                world_size=world,
                classes=CLASSES,
            )
            with loader:
                read = list(islice(loader.batches(Cursor(start)), count))
            ends = [start + (n + 1) * self.batch_images for n in range(count)]
            assert [cursor.images for _, cursor in read] == ends
            assert {len(batch.labels) for batch, _ in read} == {self.batch_images // world}
            ranks.append([batch for batch, _ in read])
        return [joined(slices) for slices in zip(*ranks, strict=True)]


def joined(slices: Sequence[Batch]) -> Batch:
    return Batch(
        bands=tuple(map(torch.cat, zip(*(part.bands for part in slices), strict=True))),
        labels=torch.cat([part.labels for part in slices]),
        sample_ids=torch.cat([part.sample_ids for part in slices]),
        skipped=sum(part.skipped for part in slices),
    )


def assert_same(read: Sequence[Batch], expected: Sequence[Batch]) -> None:
    for one, other in zip(read, expected, strict=True):
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.skipped == other.skipped
        assert [torch.equal(*pair) for pair in zip(one.bands, other.bands, strict=True)] == [
            True
        ] * 3


@pytest.fixture(scope="module")
def fresh() -> Iterator[Any]:
    """Gives folders that nobody used, one for each example."""
    with tempfile.TemporaryDirectory() as root:
        yield lambda: Path(tempfile.mkdtemp(dir=root))


@pytest.mark.slow
@FEW
@given(data=st.data(), world=st.integers(1, 5), slice_images=st.integers(1, 6), depths=DEPTHS)
def test_each_epoch_shows_every_sample_once_as_it_would_be_shown_alone(
    fresh: Any, data: st.DataObject, world: int, slice_images: int, depths: Depths
) -> None:
    """Over any number of ranks, from any place: not the batch and no neighbour plays a part."""
    folder = fresh()
    stored = Stored(data.draw(st.integers(1, 30)), data.draw(st.integers(500, 6000)))
    stored.write(folder / "set", seed=data.draw(st.integers(0, 50)))
    run = Run(
        datasets=[folder / "set"],
        cache=folder / "cache",
        batch_images=world * slice_images,
        block_samples=data.draw(st.integers(1, 40)),
        decoder=data.draw(DECODERS),
        augment=data.draw(AUGMENTS),
        seed=data.draw(st.integers(0, 2**40)),
    )
    start = data.draw(st.integers(0, 3 * stored.samples))
    count = -(-2 * stored.samples // run.batch_images)  # one epoch is whole among them
    whole = joined(run.batches(count, start=start, world=world, depths=depths))

    ids = whole.sample_ids.tolist()
    epochs = [(start + place) // stored.samples for place in range(len(ids))]
    seen = list(zip(epochs, ids, strict=True))
    assert len(set(seen)) == len(seen)
    complete = [n for n in set(epochs) if epochs.count(n) == stored.samples]
    assert complete
    for epoch in complete:
        assert sorted(i for e, i in seen if e == epoch) == list(range(stored.samples))

    dataset, alone = run.open(depths), make_decoder(run.decoder, run.decode(depths), device="cpu")
    for place, (epoch, sample_id) in enumerate(seen):
        sample = dataset.read(sample_id)
        assert sample.label == whole.labels[place]
        bands = alone([sample.data], [SampleKey(run.seed, epoch, sample_id)])
        for band, own in zip(whole.bands, bands, strict=True):
            assert torch.equal(band[place], own[0])


@pytest.mark.slow
@FEW
@given(data=st.data(), worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)), depths=DEPTHS)
def test_a_resumed_run_sees_the_tail_on_any_number_of_ranks(
    fresh: Any, data: st.DataObject, worlds: tuple[int, int], depths: Depths
) -> None:
    """With one stream or several, and samples that are no images."""
    folder = fresh()
    streams = data.draw(st.integers(1, 3))
    for number in range(streams):
        samples = data.draw(st.integers(8, 24))
        bad = data.draw(st.frozensets(st.integers(0, samples - 1), max_size=2))
        stored = Stored(samples, data.draw(st.integers(500, 6000)), bad)
        stored.write(folder / str(number), seed=100 * number)
    run = Run(
        datasets=[folder / str(number) for number in range(streams)],
        cache=folder / "cache",
        batch_images=12,
        weights=tuple(data.draw(st.floats(0.5, 4)) for _ in range(streams if streams > 1 else 0)),
        decoder=data.draw(DECODERS),
        augment=data.draw(AUGMENTS),
        block_samples=data.draw(st.integers(24, 80)),
    )
    count = data.draw(st.integers(2, 8))
    done = data.draw(st.integers(1, count - 1))
    undisturbed = run.batches(count)
    before, after = worlds
    assert_same(run.batches(done, world=before), undisturbed[:done])
    resumed = run.batches(count - done, start=done * 12, world=after, depths=depths)
    assert_same(resumed, undisturbed[done:])


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_a_run_may_stop_after_any_step(decoder: DecoderName, tmp_path: Path) -> None:
    """Two streams of unequal weight, bad images, a lost shard, flips, random crops; all at once."""
    Stored(24, 1500, frozenset({2, 9, 17})).write(tmp_path / "large", seed=0)
    Stored(10, 1500, frozenset({4})).write(tmp_path / "small", seed=100)
    sizes = ShardedDataset(str(tmp_path / "large")).shard_sizes
    assert len(sizes) > 3
    (tmp_path / "large" / "shard.00001.mds").unlink()
    run = Run(
        datasets=[tmp_path / "large", tmp_path / "small"],
        cache=tmp_path / "cache",
        batch_images=12,
        weights=(2.0, 1.0),
        block_samples=24,
        decoder=decoder,
        augment=AugmentConfig(flip=True, crop="random_resized"),
    )
    steps = 10
    undisturbed = run.batches(steps)
    ids = torch.cat([batch.sample_ids for batch in undisturbed]).tolist()
    unusable = {2, 9, 17, 24 + 4, *range(sizes[0], sizes[0] + sizes[1])}
    assert not unusable & set(ids)
    wanted = run.order().turns(0, steps * 12).sample_ids.tolist()
    assert sum(batch.skipped for batch in undisturbed) == len([i for i in wanted if i in unusable])
    assert sum(sample_id >= 24 for sample_id in ids) == steps * 12 // 3
    for done in range(1, steps):
        resumed = run.batches(steps - done, start=done * 12, world=(1, 2, 3, 4, 6)[done % 5])
        assert_same(resumed, undisturbed[done:])
