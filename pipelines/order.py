"""In which order a run sees the samples: a pure function of (seed, position).

Images are counted through the whole run, over all ranks: position p belongs to epoch p // n. Each
epoch visits every sample once, in two steps: the shards are put in random order, and then samples
are shuffled within consecutive blocks of that sequence. So a reader needs only the shards of one
block at a time, while a block as long as the dataset gives a uniform shuffle. The order knows
nothing of ranks; a rank reads its slice of each global batch.

Permutations are made by sorting raw Philox words. NumPy promises that raw words never change
between versions; it does not promise that for `Generator.permutation`.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

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

    def stand_in(self, sample_id: int, *, attempt: int) -> int:
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

    def stand_in(self, sample_id: int, *, attempt: int) -> int:
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
