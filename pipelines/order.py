"""In which order a run sees samples, of one dataset or several: a pure function of position.

Images are counted through the whole run, over all ranks: position p belongs to epoch p // n. Each
epoch visits every sample once, in two steps: the shards are put in random order, and then samples
are shuffled within consecutive blocks of that sequence. So a reader needs only the shards of one
block at a time, while a block as long as the dataset gives a uniform shuffle. The order knows
nothing of ranks; a rank reads its slice of each global batch.

Permutations are made by sorting raw Philox words. NumPy promises that raw words never change
between versions; it does not promise that for `Generator.permutation`.

Positions of the run are dealt to the streams in blocks: of the first n blocks each stream has its
exact fraction, to within one sample, and inside a block the streams are mixed at random. Each
stream goes through its own samples in its own order, each sample once in each of the stream's
epochs, so a small stream with a large fraction is repeated more often. All of it is a pure function
of (seed, position).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.dataset import RawSample, SampleDataset
from pipelines.domains import Checked
from pipelines.errors import DataError, EmptyDatasetError

SampleIds = NDArray[np.int64]

_BLOCK_SHARDS = 8
_SHARDS, _SAMPLES, _REPLACEMENT = range(3)


def permutation(count: int, *key: int) -> SampleIds:
    """Permute range(count), as a function of the key alone."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


def replacement(sample_id: int, *, attempt: int, samples: int) -> int:
    """Choose the sample that stands in for one that cannot be used.

    Args:
        sample_id: The unusable sample.
        attempt: 0 for the first choice, 1 if that is unusable too, and so on.
        samples: Samples in the dataset.

    Returns:
        A sample id, the same in every run and on every rank; another one than `sample_id` unless
        it is the only one.
    """
    if samples == 1:
        return sample_id
    seeds = np.random.SeedSequence((sample_id, attempt, _REPLACEMENT))
    step = 1 + int(np.random.Philox(seeds).random_raw()) % (samples - 1)
    return (sample_id + step) % samples


def usual_block(shard_sizes: Sequence[int]) -> int:
    """Count the samples in eight shards.

    A reader has to have a whole block before the first sample of it, so the length is counted in
    shards, which take a known time to fetch, whatever a sample's size.
    """
    return max(1, _BLOCK_SHARDS * -(-sum(shard_sizes) // max(1, len(shard_sizes))))


class Turns(NamedTuple):
    """Samples at consecutive positions of the run."""

    sample_ids: SampleIds
    """int64 [count]: which sample."""
    epochs: SampleIds
    """int64 [count]: how often all samples of its kind were seen before."""


class Order(Protocol):
    """Which sample comes when."""

    def turns(self, start: int, count: int) -> Turns:
        """Give the samples at positions start, …, start + count - 1 of the run.

        Args:
            start: Images before the first one asked for, over the whole run.
            count: How many; they may reach across the end of an epoch.
        """
        ...

    def blocks(self, start: int) -> Iterator[tuple[int, SampleIds]]:
        """Walk through the parts of the order that need few shards, for ever.

        Args:
            start: A position in the first part.

        Yields:
            The position at which the part ends, and the samples in it.
        """
        ...

    def replacement(self, sample_id: int, *, attempt: int) -> int:
        """Choose the sample that takes an unusable one's place; see `replacement`."""
        ...


class SampleOrder:
    """Each sample once in each epoch.

    Args:
        shard_sizes: Samples in each shard.
        seed: Two orders with the same seed and shards are the same.
        block_samples: Length of the blocks within which samples are shuffled; None is as many as
            eight shards hold. A block spans about block_samples / shard size + 2 shards.

    Raises:
        EmptyDatasetError: No shard holds a sample.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, block_samples: int | None) -> None:
        if block_samples is not None and block_samples < 1:
            raise DataError(f"shuffle_block_samples must be at least 1, got {block_samples}.")
        if seed < 0:
            raise DataError(f"The seed of the sample order must not be negative, got {seed}.")
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._block_samples = block_samples or usual_block(shard_sizes)
        self.samples = int(self._sizes.sum())
        if self.samples == 0:
            raise EmptyDatasetError(
                "The dataset holds no samples, so there is no order to read them in. Check that "
                "the data prefix is the one that was ingested."
            )
        self._shards = lru_cache(maxsize=2)(self._compute_shards)
        self._block = lru_cache(maxsize=4)(self._compute_block)

    def turns(self, start: int, count: int) -> Turns:
        """Give the samples at positions start, …, start + count - 1 of the run."""
        ids = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(start + done, self.samples)
            number, offset = divmod(place, self._block_samples)
            part = self._block(epoch, number)[offset : offset + count - done]
            ids[done : done + len(part)] = part
            done += len(part)
        return Turns(ids, np.arange(start, start + count) // self.samples)

    def blocks(self, start: int) -> Iterator[tuple[int, SampleIds]]:
        """Walk through the blocks from the one with position `start` on, for ever."""
        position = start
        while True:
            epoch, place = divmod(position, self.samples)
            number = place // self._block_samples
            ids = self._block(epoch, number)
            position = epoch * self.samples + number * self._block_samples + len(ids)
            yield position, ids

    def replacement(self, sample_id: int, *, attempt: int) -> int:
        """Choose the sample that takes an unusable one's place."""
        return replacement(sample_id, attempt=attempt, samples=self.samples)

    def _compute_shards(self, epoch: int) -> tuple[SampleIds, SampleIds]:
        """Give the shards in their order of the epoch, and the place in it where each one ends."""
        shards = permutation(len(self._sizes), self._seed, epoch, _SHARDS, 0)
        return shards, np.cumsum(self._sizes[shards])

    def _compute_block(self, epoch: int, number: int) -> SampleIds:
        shards, ends = self._shards(epoch)
        first = number * self._block_samples
        length = min(self._block_samples, self.samples - first)
        places = first + permutation(length, self._seed, epoch, _SAMPLES, number)
        at = np.searchsorted(ends, places, side="right")
        chosen = shards[at]
        ids: SampleIds = self._starts[chosen] + self._sizes[chosen] - (ends[at] - places)
        return ids


_DEALING, _STREAM = 7, 11  # keep these random numbers apart from those of the order


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Checked):
    """One of several datasets that a run reads.

    Attributes:
        prefix: Where it is; `train/` and `test/` lie below.
        weight: Its part of the images, relative to the other streams' weights; None, for all
            streams together, takes each sample once per epoch.

    Raises:
        DataError: The weight is not above 0.
    """

    prefix: str = field(metadata={"place": "uri"})
    weight: Annotated[float, Field(gt=0)] | None = None


class ConcatenatedDataset:
    """Datasets one after the other; sample ids count through all of them.

    Args:
        parts: The datasets; their labels mean the same classes.
    """

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self._parts = parts
        self.ends = list(accumulate(len(part) for part in parts))
        """Sample id behind the last one of each part."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each shard of all parts."""
        return [size for part in self._parts for size in part.shard_sizes]

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, sample_id: int) -> RawSample:
        """Read one sample."""
        part, own_id = self._locate(sample_id)
        return part.read(own_id)._replace(sample_id=sample_id)

    def prepare(self, sample_ids: SampleIds) -> None:
        """Bring near what is needed to read these samples soon."""
        start = 0
        for part, end in zip(self._parts, self.ends, strict=True):
            own = sample_ids[(sample_ids >= start) & (sample_ids < end)]
            if len(own):
                part.prepare(own - start)
            start = end

    def shard_of(self, sample_id: int) -> str:
        """Name the shard a sample lies in."""
        part, own_id = self._locate(sample_id)
        return part.shard_of(own_id)

    def _locate(self, sample_id: int) -> tuple[SampleDataset, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"There is no sample {sample_id}; the datasets hold {len(self)}.")
        number = int(np.searchsorted(self.ends, sample_id, side="right"))
        return self._parts[number], sample_id - (self.ends[number - 1] if number else 0)


class MixedOrder:
    """Samples of several streams, each with its fraction.

    Args:
        shard_sizes: For each stream, the samples in each of its shards.
        weights: Relative weight of each stream.
        seed: Two orders with the same seed, shards and weights are the same.
        block_samples: Length of the blocks that are dealt, and of those within which each stream is
            shuffled; None is as many as eight shards hold, of all streams and of its own.

    Raises:
        EmptyDatasetError: A stream holds no sample.
        DataError: A fraction is so small that a block may not hold it.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        *,
        weights: Sequence[float],
        seed: int,
        block_samples: int | None,
    ) -> None:
        dealt = block_samples or usual_block([size for sizes in shard_sizes for size in sizes])
        total = sum(map(Fraction, weights))
        for weight in weights:
            if dealt * Fraction(weight) < 2 * total:
                raise DataError(
                    f"A stream of weight {weight}, of {float(total)} in all, has less than two "
                    f"samples in a block of {dealt}. Raise its weight, or "
                    "loader.shuffle_block_samples."
                )
        # Exact: a stream's fraction must not depend on rounding, however long the run.
        self._fractions = [Fraction(0), *accumulate(Fraction(weight) / total for weight in weights)]
        self._orders: list[Order] = [
            SampleOrder(sizes, seed=_stream_seed(seed, number), block_samples=block_samples)
            for number, sizes in enumerate(shard_sizes)
        ]
        counts = [sum(sizes) for sizes in shard_sizes]
        self._starts = [0, *accumulate(counts[:-1])]
        self._seed = seed
        self._block_samples = dealt
        self._streams_of = lru_cache(maxsize=4)(self._deal)

    def turns(self, start: int, count: int) -> Turns:
        """Give the samples at positions start, …, start + count - 1 of the run."""
        result = Turns(np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64))
        done = 0
        while done < count:
            block, offset = divmod(start + done, self._block_samples)
            streams = self._streams_of(block)
            part = streams[offset : offset + count - done]
            for number, order in enumerate(self._orders):
                places = done + np.flatnonzero(part == number)
                before = int(np.count_nonzero(streams[:offset] == number))
                own = order.turns(self._count_dealt(number, block) + before, len(places))
                result.sample_ids[places] = own.sample_ids + self._starts[number]
                result.epochs[places] = own.epochs
            done += len(part)
        return result

    def blocks(self, start: int) -> Iterator[tuple[int, SampleIds]]:
        """Walk through the blocks from the one with position `start` on, for ever."""
        first = start // self._block_samples * self._block_samples
        while True:
            ids = self.turns(first, self._block_samples).sample_ids
            first += self._block_samples
            yield first, ids

    def replacement(self, sample_id: int, *, attempt: int) -> int:
        """Choose the sample, of the same stream, that takes an unusable one's place."""
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        start = self._starts[number]
        return start + self._orders[number].replacement(sample_id - start, attempt=attempt)

    def _count_dealt(self, number: int, blocks: int) -> int:
        """Count the samples of a stream in the first so many blocks."""
        positions = blocks * self._block_samples
        below, upto = self._fractions[number : number + 2]
        return int(upto * positions) - int(below * positions)

    def _deal(self, block: int) -> NDArray[np.int64]:
        """Say which stream each position of a block belongs to."""
        counts = [
            self._count_dealt(number, block + 1) - self._count_dealt(number, block)
            for number in range(len(self._orders))
        ]
        mixed = permutation(self._block_samples, self._seed, block, _DEALING)
        return np.repeat(np.arange(len(counts)), counts)[mixed]


def _stream_seed(seed: int, number: int) -> int:
    """Give each stream a seed of its own, or two of the same size would be read in step."""
    return int(np.random.SeedSequence((seed, number, _STREAM)).generate_state(1, np.uint64)[0])
